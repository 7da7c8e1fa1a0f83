// How a quantised weight lies in memory; `native_packing.py` writes it. The same on every processor.
//
// A weight [N, K] is cut into blocks of 32 rows (missing rows are zero). A block holds its groups of `group` columns one
// after another, each as 32 float16 scales and then group / 32 strips of 32 columns:
//   4 bits: a strip is 4 steps of 8 columns, 128 bytes each: 32 rows x 4 bytes, byte j = column j in the low nibble and
//           column 4 + j in the high one, value + 8
//   8 bits: a strip is 8 steps of 4 columns, 128 bytes each: 32 rows x 4 bytes, value + 128
// A block of a paired weight (rows [gate | up]) holds 16 rows of gate and the 16 rows of up that go with them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moiie {

constexpr int64_t kBlockRows = 32;
constexpr int64_t kHalf = kBlockRows / 2;
constexpr int64_t kStrip = 32;                     // columns that share one activation scale
constexpr int64_t kScaleBytes = kBlockRows * 2;    // of one group

struct Layout {
  int64_t rows = 0;  // N, with a paired weight 2 x outputs
  int64_t columns = 0;
  int bits = 4;
  int64_t group = 32;
  bool paired = false;

  int64_t outputs() const { return paired ? rows / 2 : rows; }
  int64_t outputs_per_block() const { return paired ? kHalf : kBlockRows; }
  int64_t blocks() const { return (outputs() + outputs_per_block() - 1) / outputs_per_block(); }
  int64_t groups() const { return columns / group; }
  int64_t strips() const { return columns / kStrip; }
  int64_t strips_per_group() const { return group / kStrip; }
  size_t strip_bytes() const { return static_cast<size_t>(kBlockRows * kStrip * bits / 8); }
  size_t group_bytes() const { return kScaleBytes + strips_per_group() * strip_bytes(); }
  size_t block_bytes() const { return groups() * group_bytes(); }
  size_t bytes() const { return blocks() * block_bytes(); }
  int zero_point() const { return bits == 4 ? 8 : 128; }
};

}  // namespace moiie

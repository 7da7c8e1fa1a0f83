// For any processor: integer sums in plain loops.
#include "generic.h"

namespace moiie {
namespace {

size_t panel_bytes(int64_t rows, int64_t columns) { return rows * (columns / kStrip) * generic::kRowStripBytes; }

void fill(const Rows& rows, const Layout& layout, uint8_t* panel) { generic::fill(rows, layout, panel); }

void swiglu(const float* sums, int64_t rows, int64_t count, float* out, int64_t stride) {
  generic::swiglu(sums, rows, count, out, stride);
}

// The strip's weights, column by column: unpacked[k][32 rows].
void unpack(const uint8_t* strip, int bits, uint8_t unpacked[kStrip][kBlockRows]) {
  const int64_t step = bits == 4 ? 8 : 4;
  for (int64_t k = 0; k < kStrip; ++k) {
    const int64_t within = k % step;
    const uint8_t* bytes = strip + k / step * (kBlockRows * 4) + within % 4;
    const int shift = within >= 4 ? 4 : 0;
    const int mask = bits == 4 ? 15 : 255;
    for (int64_t n = 0; n < kBlockRows; ++n) unpacked[k][n] = static_cast<uint8_t>(bytes[n * 4] >> shift & mask);
  }
}

void block(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* weights, float* sums) {
  std::memset(sums, 0, rows * kBlockRows * sizeof(float));
  uint8_t unpacked[kStrip][kBlockRows];
  float scales[kBlockRows];
  const int64_t per_group = layout.strips_per_group();
  for (int64_t s = 0; s < layout.strips(); ++s) {
    if (s % per_group == 0) {
      for (int64_t n = 0; n < kBlockRows; ++n) {
        uint16_t half;
        std::memcpy(&half, weights + n * 2, 2);
        scales[n] = generic::half_to_float(half);
      }
      weights += kScaleBytes;
    }
    unpack(weights, layout.bits, unpacked);
    weights += layout.strip_bytes();
    const generic::Strip strip = generic::strip_at(panel, rows, s);
    for (int64_t r = 0; r < rows; ++r) {
      int32_t dots[kBlockRows];
      for (int32_t& dot : dots) dot = strip.starts[r];
      for (int64_t k = 0; k < kStrip; ++k) {
        const int32_t x = strip.values[r * kStrip + k];
        for (int64_t n = 0; n < kBlockRows; ++n) dots[n] += x * unpacked[k][n];
      }
      float* sum = sums + r * kBlockRows;
      for (int64_t n = 0; n < kBlockRows; ++n) sum[n] += static_cast<float>(dots[n]) * (scales[n] * strip.scales[r]);
    }
  }
}

}  // namespace

const Kernels kPortable = {"portable", 64, panel_bytes, fill, block, swiglu};

}  // namespace moiie

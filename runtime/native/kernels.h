// The arithmetic, once for each instruction set. Everything above this interface is the same on all processors.
#pragma once

#include "layout.h"

namespace moiie {

// Rows of a float32 matrix, consecutive or picked by index.
struct Rows {
  const float* data;
  int64_t stride;
  const int32_t* index;  // null: rows 0 .. count - 1
  int64_t count;

  const float* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * stride; }
};

struct Kernels {
  const char* name;
  int64_t max_rows;  // of a panel
  // Bytes of a panel: `rows` rows of `columns` activations in the form that `block` reads.
  size_t (*panel_bytes)(int64_t rows, int64_t columns);
  void (*fill)(const Rows& rows, const Layout& layout, uint8_t* panel);
  // sums[row][32] = panel x one block of the weight, transposed.
  void (*block)(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* block, float* sums);
  // out[row * stride + i] = silu(sums[row][i]) * sums[row][16 + i] for i < count
  void (*swiglu)(const float* sums, int64_t rows, int64_t count, float* out, int64_t stride);
};

// The fastest for one processor: `few` below `many_from` rows, `many` from there on.
struct Choice {
  const Kernels* few;
  const Kernels* many;
  int64_t many_from;

  const Kernels& at(int64_t rows) const { return rows < many_from ? *few : *many; }
};

// What this processor runs best; the environment variable MOIIE_CPU_ISA (portable, avx2, avx512, amx) asks for another.
// Throws when the processor has not what is asked for.
Choice choose_kernels();

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAmx;
bool enable_amx();  // asks the system for the tile registers; false when it refuses
#endif

}  // namespace moiie

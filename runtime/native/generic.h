// Plain loops that a compiler turns into vectors of whatever width the including function may use.
#pragma once

#include <cstring>

#include "kernels.h"

#define MOIIE_INLINE inline __attribute__((always_inline))

namespace moiie::generic {

// A panel of the integer kernels, strip by strip: rows x 32 int8, then a float32 scale for each row, then for each row what a
// sum over the strip starts from: minus the zero point of the weights times the sum of the activations.
struct Strip {
  int8_t* values;
  float* scales;
  int32_t* starts;
};

constexpr int64_t kRowStripBytes = kStrip + sizeof(float) + sizeof(int32_t);

MOIIE_INLINE Strip strip_at(const uint8_t* panel, int64_t rows, int64_t strip) {
  uint8_t* base = const_cast<uint8_t*>(panel) + strip * rows * kRowStripBytes;
  return {reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(base + rows * kStrip),
          reinterpret_cast<int32_t*>(base + rows * (kStrip + sizeof(float)))};
}

MOIIE_INLINE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MOIIE_INLINE float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Adding 1.5 x 2^23 leaves the nearest integer in the low bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4B400000;

MOIIE_INLINE void fill_strip(const float* x, int zero_point, int8_t* values, float* scale, int32_t* start) {
  int32_t largest = 0;  // as integers, magnitudes order like floats and a NaN is above all, so it reaches the scale
  for (int i = 0; i < kStrip; ++i) {
    const int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float peak = float_of(largest);
  const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < kStrip; ++i) {
    const int32_t q = bits_of(x[i] * inverse + kRound) - kRoundBits;
    values[i] = static_cast<int8_t>(q);
    sum += static_cast<int8_t>(q);
  }
  *scale = peak * (1.0f / 127.0f);
  *start = -zero_point * sum;
}

MOIIE_INLINE void fill(const Rows& rows, const Layout& layout, uint8_t* panel) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const float* row = rows.row(i);
    for (int64_t s = 0; s < layout.strips(); ++s) {
      const Strip strip = strip_at(panel, rows.count, s);
      fill_strip(row + s * kStrip, layout.zero_point(), strip.values + i * kStrip, strip.scales + i, strip.starts + i);
    }
  }
}

// e^x to about 2 units in the last place between -87 and 88, and their values outside.
MOIIE_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 1.6666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * float_of((bits_of(shifted) - kRoundBits + 127) * (1 << 23));
}

MOIIE_INLINE void swiglu(const float* sums, int64_t rows, int64_t count, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* gate = sums + r * kBlockRows;
    float values[kHalf];
    for (int i = 0; i < kHalf; ++i) values[i] = gate[i] / (1.0f + exponential(-gate[i])) * gate[kHalf + i];
    std::memcpy(out + r * stride, values, count * sizeof(float));
  }
}

MOIIE_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7FFF) << 13;
  // Moving the exponent by a product also gives subnormal numbers their value.
  const float magnitude = float_of(static_cast<int32_t>(rest)) * 5.192296858534828e33f;
  const uint32_t special = (half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(bits_of(magnitude)) | special | sign));
}

}  // namespace moiie::generic

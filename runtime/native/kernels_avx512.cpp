// AVX-512 with VNNI: four products of a byte pair a lane and instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include "generic.h"

#define MOIIE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define MOIIE_AVX512_INLINE inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))

namespace moiie {
namespace {

constexpr int64_t kAhead = 4096;  // bytes: a single row of activations is bound by how soon the weights arrive

size_t panel_bytes(int64_t rows, int64_t columns) { return rows * (columns / kStrip) * generic::kRowStripBytes; }

// What generic::fill_strip does. The largest magnitude is found among integers so that a NaN reaches the scale.
MOIIE_AVX512_INLINE void fill_strip(const float* x, int zero_point, int8_t* values, float* scale, int32_t* start) {
  const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  const __m512i larger = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(first), magnitude),
                                          _mm512_and_si512(_mm512_castps_si512(second), magnitude));
  const float peak = generic::float_of(_mm512_reduce_max_epi32(larger));
  const __m512 inverse = _mm512_set1_ps(peak > 1e-30f ? 127.0f / peak : 0.0f);
  const __m512i q0 = _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse));  // to the nearest, ties to even
  const __m512i q1 = _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtepi32_epi8(q0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 16), _mm512_cvtepi32_epi8(q1));
  *scale = peak * (1.0f / 127.0f);
  // Unsigned, because what comes of a NaN may overflow.
  const auto sum = static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1)));
  *start = static_cast<int32_t>(sum * static_cast<uint32_t>(-zero_point));
}

MOIIE_AVX512 void fill(const Rows& rows, const Layout& layout, uint8_t* panel) {
  const int64_t strips = layout.strips();
  const int zero_point = layout.zero_point();
  for (int64_t i = 0; i < rows.count; ++i) {
    const float* row = rows.row(i);
    for (int64_t s = 0; s < strips; ++s) {
      const generic::Strip strip = generic::strip_at(panel, rows.count, s);
      fill_strip(row + s * kStrip, zero_point, strip.values + i * kStrip, strip.scales + i, strip.starts + i);
    }
  }
}

MOIIE_AVX512 void swiglu(const float* sums, int64_t rows, int64_t count, float* out, int64_t stride) {
  generic::swiglu(sums, rows, count, out, stride);
}

MOIIE_AVX512_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }

MOIIE_AVX512_INLINE __m512 load_scales(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Four activations in every lane.
MOIIE_AVX512_INLINE __m512i spread4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

MOIIE_AVX512_INLINE __m512i low(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
MOIIE_AVX512_INLINE __m512i high(__m512i v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }

struct Pair {
  __m512 first, second;  // rows 0..15 and 16..31 of the block
};

struct IntPair {
  __m512i first, second;
};

template <int Bits>
MOIIE_AVX512_INLINE IntPair dot_strip(const uint8_t* weights, const int8_t* x, int32_t start) {
  // Two sums for each half, or every product would wait for the one before.
  IntPair even = {_mm512_set1_epi32(start), _mm512_set1_epi32(start)};
  IntPair odd = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    const __m512i x0 = spread4(x + step * 8), x1 = spread4(x + step * 8 + 4);
    const uint8_t* p = weights + step * (32 * Bits);
#pragma GCC unroll 4
    for (int line = 0; line < Bits / 2; ++line) _mm_prefetch(reinterpret_cast<const char*>(p + kAhead + line * 64), _MM_HINT_T0);
    const __m512i first = load(p), second = load(p + 64);
    if constexpr (Bits == 4) {
      even.first = _mm512_dpbusd_epi32(even.first, low(first), x0);
      even.second = _mm512_dpbusd_epi32(even.second, low(second), x0);
      odd.first = _mm512_dpbusd_epi32(odd.first, high(first), x1);
      odd.second = _mm512_dpbusd_epi32(odd.second, high(second), x1);
    } else {
      even.first = _mm512_dpbusd_epi32(even.first, first, x0);
      even.second = _mm512_dpbusd_epi32(even.second, second, x0);
      odd.first = _mm512_dpbusd_epi32(odd.first, load(p + 128), x1);
      odd.second = _mm512_dpbusd_epi32(odd.second, load(p + 192), x1);
    }
  }
  return {_mm512_add_epi32(even.first, odd.first), _mm512_add_epi32(even.second, odd.second)};
}

MOIIE_AVX512_INLINE void add_scaled(Pair& sums, const IntPair& dots, const Pair& scales, float scale) {
  const __m512 x = _mm512_set1_ps(scale);
  sums.first = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots.first), _mm512_mul_ps(scales.first, x), sums.first);
  sums.second = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots.second), _mm512_mul_ps(scales.second, x), sums.second);
}

// One row: everything stays in registers.
template <int Bits>
MOIIE_AVX512_INLINE void block_one(const uint8_t* panel, const Layout& layout, const uint8_t* weights, float* sums) {
  Pair sum = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const int64_t groups = layout.groups(), per_group = layout.strips_per_group();
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    const Pair scales = {load_scales(weights), load_scales(weights + 32)};
    weights += kScaleBytes;
    for (int64_t i = 0; i < per_group; ++i, ++s, weights += kStrip * kBlockRows * Bits / 8) {
      const generic::Strip strip = generic::strip_at(panel, 1, s);
      add_scaled(sum, dot_strip<Bits>(weights, strip.values, *strip.starts), scales, *strip.scales);
    }
  }
  _mm512_storeu_ps(sums, sum.first);
  _mm512_storeu_ps(sums + kHalf, sum.second);
}

// A strip of the block as bytes: 16 vectors of 16 rows x 4 columns, first and second half in turn.
template <int Bits>
MOIIE_AVX512_INLINE void unpack(const uint8_t* weights, __m512i w[16]) {
  if constexpr (Bits == 8) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) w[i] = load(weights + i * 64);
  } else {
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      const __m512i first = load(weights + step * 128), second = load(weights + step * 128 + 64);
      w[step * 4] = low(first);
      w[step * 4 + 1] = low(second);
      w[step * 4 + 2] = high(first);
      w[step * 4 + 3] = high(second);
    }
  }
}

// One strip for `Count` rows side by side: a single row's sums wait for each other.
template <int Count>
MOIIE_AVX512_INLINE void strip_side_by_side(const generic::Strip& strip, int64_t r, const __m512i w[16], const Pair& scales, float* sums) {
  IntPair dots[Count];
#pragma GCC unroll 4
  for (int j = 0; j < Count; ++j) dots[j].first = dots[j].second = _mm512_set1_epi32(strip.starts[r + j]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Count; ++j) {
      const __m512i four = spread4(strip.values + (r + j) * kStrip + i * 4);
      dots[j].first = _mm512_dpbusd_epi32(dots[j].first, w[i * 2], four);
      dots[j].second = _mm512_dpbusd_epi32(dots[j].second, w[i * 2 + 1], four);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Count; ++j) {
    float* row = sums + (r + j) * kBlockRows;
    Pair sum = {_mm512_loadu_ps(row), _mm512_loadu_ps(row + kHalf)};
    add_scaled(sum, dots[j], scales, strip.scales[r + j]);
    _mm512_storeu_ps(row, sum.first);
    _mm512_storeu_ps(row + kHalf, sum.second);
  }
}

// One strip for many rows: the weights are unpacked once and stay in registers.
template <int Bits>
MOIIE_AVX512_INLINE void strip_rows(const generic::Strip& strip, int64_t rows, const uint8_t* weights, const Pair& scales, float* sums) {
  __m512i w[16];
  unpack<Bits>(weights, w);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) strip_side_by_side<4>(strip, r, w, scales, sums);
  for (; r < rows; ++r) strip_side_by_side<1>(strip, r, w, scales, sums);
}

template <int Bits>
MOIIE_AVX512_INLINE void block_rows(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* weights, float* sums) {
  std::memset(sums, 0, rows * kBlockRows * sizeof(float));
  const int64_t groups = layout.groups(), per_group = layout.strips_per_group();
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    const Pair scales = {load_scales(weights), load_scales(weights + 32)};
    weights += kScaleBytes;
    for (int64_t i = 0; i < per_group; ++i, ++s, weights += kStrip * kBlockRows * Bits / 8)
      strip_rows<Bits>(generic::strip_at(panel, rows, s), rows, weights, scales, sums);
  }
}

MOIIE_AVX512 void block(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* weights, float* sums) {
  if (layout.bits == 4)
    rows == 1 ? block_one<4>(panel, layout, weights, sums) : block_rows<4>(panel, rows, layout, weights, sums);
  else
    rows == 1 ? block_one<8>(panel, layout, weights, sums) : block_rows<8>(panel, rows, layout, weights, sums);
}

}  // namespace

const Kernels kAvx512 = {"avx512", 64, panel_bytes, fill, block, swiglu};

}  // namespace moiie
#endif

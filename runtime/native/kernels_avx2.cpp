// AVX2: products of byte pairs in 16 bits.
#if defined(__x86_64__)
#include <immintrin.h>

#include "generic.h"

#define MOIIE_AVX2 __attribute__((target("avx2,f16c,fma")))
#define MOIIE_AVX2_INLINE inline __attribute__((always_inline, target("avx2,f16c,fma")))

namespace moiie {
namespace {

constexpr int kVectors = 4;                    // of 8 rows, in a block
constexpr int kQuads = static_cast<int>(kStrip / 4);  // of columns, in a strip

size_t panel_bytes(int64_t rows, int64_t columns) { return rows * (columns / kStrip) * generic::kRowStripBytes; }

MOIIE_AVX2 void fill(const Rows& rows, const Layout& layout, uint8_t* panel) { generic::fill(rows, layout, panel); }

MOIIE_AVX2 void swiglu(const float* sums, int64_t rows, int64_t count, float* out, int64_t stride) {
  generic::swiglu(sums, rows, count, out, stride);
}

MOIIE_AVX2_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

MOIIE_AVX2_INLINE __m256i spread4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// A strip with 4 columns of 32 rows after the other: unsigned from 4 bits, signed from 8.
template <int Bits>
MOIIE_AVX2_INLINE void unpack(const uint8_t* strip, __m256i w[kQuads][kVectors]) {
  for (int quad = 0; quad < kQuads; ++quad) {
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (Bits == 8) {
        w[quad][v] = _mm256_xor_si256(load(strip + quad * 128 + v * 32), _mm256_set1_epi8(-128));
      } else {
        const __m256i bytes = load(strip + quad / 2 * 128 + v * 32);
        const __m256i nibbles = quad % 2 == 0 ? bytes : _mm256_srli_epi16(bytes, 4);
        w[quad][v] = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
      }
    }
  }
}

// Sums over a strip for 32 rows of the weight.
template <int Bits>
MOIIE_AVX2_INLINE void dot(const __m256i w[kQuads][kVectors], const int8_t* x, int32_t start, __m256i dots[kVectors]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int quad = 0; quad < kQuads; ++quad) {
    const __m256i four = spread4(x + quad * 4);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (Bits == 4) {  // 16 products of at most 15 x 127 fit into 16 bits
        sums[v] = _mm256_add_epi16(sums[v], _mm256_maddubs_epi16(w[quad][v], four));
      } else {  // two products of at most 128 x 127 do
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[quad][v]), _mm256_sign_epi8(four, w[quad][v]));
        sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  for (int v = 0; v < kVectors; ++v)
    dots[v] = Bits == 4 ? _mm256_add_epi32(_mm256_madd_epi16(sums[v], ones), _mm256_set1_epi32(start)) : sums[v];
}

template <int Bits>
MOIIE_AVX2_INLINE void block_rows(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* weights, float* sums) {
  std::memset(sums, 0, rows * kBlockRows * sizeof(float));
  const int64_t groups = layout.groups(), per_group = layout.strips_per_group();
  __m256i w[kQuads][kVectors], dots[kVectors];
  __m256 scales[kVectors];
  for (int64_t g = 0, s = 0; g < groups; ++g) {
    for (int v = 0; v < kVectors; ++v)
      scales[v] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + v * 16)));
    weights += kScaleBytes;
    for (int64_t i = 0; i < per_group; ++i, ++s, weights += kStrip * kBlockRows * Bits / 8) {
      unpack<Bits>(weights, w);
      const generic::Strip strip = generic::strip_at(panel, rows, s);
      for (int64_t r = 0; r < rows; ++r) {
        dot<Bits>(w, strip.values + r * kStrip, strip.starts[r], dots);
        const __m256 x = _mm256_set1_ps(strip.scales[r]);
        float* sum = sums + r * kBlockRows;
        for (int v = 0; v < kVectors; ++v) {
          const __m256 product = _mm256_mul_ps(scales[v], x);
          _mm256_storeu_ps(sum + v * 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[v]), product, _mm256_loadu_ps(sum + v * 8)));
        }
      }
    }
  }
}

MOIIE_AVX2 void block(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* weights, float* sums) {
  if (layout.bits == 4)
    block_rows<4>(panel, rows, layout, weights, sums);
  else
    block_rows<8>(panel, rows, layout, weights, sums);
}

}  // namespace

const Kernels kAvx2 = {"avx2", 64, panel_bytes, fill, block, swiglu};

}  // namespace moiie
#endif

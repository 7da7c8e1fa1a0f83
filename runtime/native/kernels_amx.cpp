// AMX for many rows: weights become bfloat16 once for a block, and the tile unit multiplies 16 x 32 by 32 x 16 at a time.
//
// Activations are rounded to bfloat16 here, not to 8 bits: no scale has to be applied between the groups.
#if defined(__x86_64__)
#include <immintrin.h>

#include "generic.h"
#include "panels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MOIIE_AMX_TARGET "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma"
#define MOIIE_AMX __attribute__((target(MOIIE_AMX_TARGET)))
#define MOIIE_AMX_INLINE inline __attribute__((always_inline, target(MOIIE_AMX_TARGET)))

namespace moiie {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = kTileRows * 64;
constexpr int64_t kStepBytes = 2 * kTileBytes;  // of a block as bfloat16: 32 columns, both halves of the rows

int64_t whole_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

size_t panel_bytes(int64_t rows, int64_t columns) { return whole_tiles(rows) * columns * 2; }

// Panel: for each 32 columns, the rows with their 64 bytes; rows up to a whole tile are zero.
MOIIE_AMX void fill(const Rows& rows, const Layout& layout, uint8_t* panel) {
  const int64_t height = whole_tiles(rows.count), strips = layout.strips();
  for (int64_t r = 0; r < height; ++r) {
    const float* x = r < rows.count ? rows.row(r) : nullptr;
    for (int64_t s = 0; s < strips; ++s) {
      __m512bh both = {};
      if (x != nullptr) both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + s * kStrip + 16), _mm512_loadu_ps(x + s * kStrip));
      std::memcpy(panel + (s * height + r) * 64, &both, 64);
    }
  }
}

MOIIE_AMX void swiglu(const float* sums, int64_t rows, int64_t count, float* out, int64_t stride) {
  generic::swiglu(sums, rows, count, out, stride);
}

// Scales of 8 rows, each twice: a lane for the even and one for the odd column of a pair.
struct Scales {
  __m512 low, high;  // rows 0..7 and 8..15
};

MOIIE_AMX_INLINE Scales load_scales(const uint8_t* p) {
  const __m512 s = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return {_mm512_permutexvar_ps(low, s), _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), s)};
}

// Values of columns whose bits start at `shift` (a lane each), times their scale.
template <int Bits>
MOIIE_AMX_INLINE __m512 values(__m512i words, __m512i shift, __m512 scale) {
  const __m512i shifted = _mm512_srlv_epi32(words, shift);
  if constexpr (Bits == 4) {
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_mul_ps(_mm512_permutexvar_ps(shifted, table), scale);  // looks at the low four bits only
  } else {
    const __m512i bytes = _mm512_and_si512(shifted, _mm512_set1_epi32(255));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(bytes, _mm512_set1_epi32(128))), scale);
  }
}

// 64 packed bytes (16 rows x 4 bytes) -> the tile rows of their pairs of columns.
template <int Bits>
MOIIE_AMX_INLINE void expand(const uint8_t* packed, const Scales& scales, uint8_t* tile) {
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i v = _mm512_loadu_si512(packed);
  const __m512i first = _mm512_permutexvar_epi32(low, v);
  const __m512i second = _mm512_permutexvar_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(8)), v);
  constexpr int kPairs = Bits == 4 ? 4 : 2;
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    const int at = pair % 2 * 16 + pair / 2 * 4;  // bytes 0 1, bytes 2 3; with 4 bits then their high halves
    const __m512i shift = _mm512_set1_epi64(static_cast<int64_t>(at) | static_cast<int64_t>(at + 8) << 32);
    const __m512bh row = _mm512_cvtne2ps_pbh(values<Bits>(second, shift, scales.high), values<Bits>(first, shift, scales.low));
    std::memcpy(tile + pair * 64, &row, 64);
  }
}

template <int Bits>
MOIIE_AMX_INLINE void expand_block(const Layout& layout, const uint8_t* packed, uint8_t* tiles) {
  const int64_t groups = layout.groups(), per_group = layout.strips_per_group();
  for (int64_t g = 0; g < groups; ++g) {
    const Scales first = load_scales(packed), second = load_scales(packed + 32);
    packed += kScaleBytes;
    for (int64_t i = 0; i < per_group; ++i, tiles += kStepBytes) {
#pragma GCC unroll 8
      for (int step = 0; step < Bits; ++step, packed += 128) {
        const int64_t row = step * kTileBytes / Bits;
        expand<Bits>(packed, first, tiles + row);
        expand<Bits>(packed + 64, second, tiles + kTileBytes + row);
      }
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// One or two times 16 rows of activations by a block. Tiles: 0..3 sums of two by two, 4 5 activations, 6 7 weights.
template <bool Two>
MOIIE_AMX_INLINE void multiply(const uint8_t* x, int64_t x_step, const uint8_t* tiles, int64_t strips, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < strips; ++s, x += x_step, tiles += kStepBytes) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, tiles, 64);
    _tile_loadd(7, tiles + kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Two) {
      _tile_loadd(5, x + kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kRow = kBlockRows * sizeof(float);
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kHalf, kRow);
  if constexpr (Two) {
    _tile_stored(2, sums + kTileRows * kBlockRows, kRow);
    _tile_stored(3, sums + kTileRows * kBlockRows + kHalf, kRow);
  }
}

MOIIE_AMX void block(const uint8_t* panel, int64_t rows, const Layout& layout, const uint8_t* weights, float* sums) {
  thread_local Buffer buffer;
  uint8_t* tiles = buffer.take<uint8_t>(layout.strips() * kStepBytes);
  if (layout.bits == 4)
    expand_block<4>(layout, weights, tiles);
  else
    expand_block<8>(layout, weights, tiles);
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t height = whole_tiles(rows), step = height * 64;
  int64_t r = 0;
  for (; r + 2 * kTileRows <= height; r += 2 * kTileRows)
    multiply<true>(panel + r * 64, step, tiles, layout.strips(), sums + r * kBlockRows);
  if (r < height) multiply<false>(panel + r * 64, step, tiles, layout.strips(), sums + r * kBlockRows);
  _tile_release();
}

}  // namespace

const Kernels kAmx = {"amx", 512, panel_bytes, fill, block, swiglu};

bool enable_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace moiie
#endif

// Rounding to nearest of groups of weights, the same arithmetic as rtn.py in the same order: every operation is rounded as
// IEEE 754 says, and sums are taken by halves, so that the numbers are the same bit for bit whichever of the two made them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define SEEN extern "C" __attribute__((visibility("default")))
#define INSIDE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

constexpr float smallest = 1.0f / (1 << 24);  // of float16: subnormal, normal
constexpr float normal = 1.0f / (1 << 14);

// Rounds to even; for a float that is no float16's subnormal.
INSIDE float as_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0xFFF + ((bits >> 13) & 1);
  bits &= ~std::uint32_t{0x1FFF};
  std::memcpy(&value, &bits, sizeof bits);
  return value < 65536.0f ? value : std::numeric_limits<float>::infinity();
}

INSIDE float as_scale(float value) {
  const float rounded = value < normal ? std::ceil(value / smallest) * smallest : as_half(value);
  return rounded == 0.0f ? 1.0f : rounded;
}

INSIDE std::uint16_t stored(float scale) {  // one that as_scale gave
  if (!(scale < std::numeric_limits<float>::infinity())) return 0x7C00;
  if (scale < normal) return static_cast<std::uint16_t>(scale / smallest);
  std::uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  return static_cast<std::uint16_t>((bits >> 13) - ((127 - 15) << 10));
}

template <int size>
INSIDE void round_with(const float* group, float scale, float lowest, float highest, float* rounded) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: what is added and taken away again is rounded to even
  for (int i = 0; i < size; ++i) {
    float value = group[i] / scale;
    value = value < lowest - 1 ? lowest - 1 : value > highest + 1 ? highest + 1 : value;
    value = (value + shift) - shift;
    rounded[i] = value < lowest ? lowest : value > highest ? highest : value;
  }
}

template <int half>
INSIDE float sum(float* terms) {  // of 2 * half
  for (int i = 0; i < half; ++i) terms[i] += terms[i + half];
  if constexpr (half > 1) return sum<half / 2>(terms);
  return terms[0];
}

struct Range {
  float low, high;
  bool finite;
};

template <int half>
INSIDE void narrow(float* low, float* high, float* zero) {
  for (int i = 0; i < half; ++i) {
    low[i] = low[i + half] < low[i] ? low[i + half] : low[i];
    high[i] = high[i + half] > high[i] ? high[i + half] : high[i];
    zero[i] += zero[i + half];
  }
  if constexpr (half > 1) narrow<half / 2>(low, high, zero);
}

template <int size>
INSIDE Range range_of(const float* group) {
  alignas(64) float low[size], high[size], zero[size];
  for (int i = 0; i < size; ++i) low[i] = high[i] = group[i], zero[i] = group[i] * 0.0f;  // NaN where it is not finite
  narrow<size / 2>(low, high, zero);
  return {low[0], high[0], zero[0] == 0.0f};
}

template <int size>
INSIDE float round_group(const float* group, const float* range, bool fitted, std::int8_t* values) {
  alignas(64) float rounded[size], terms[size];
  const auto [low, high, finite] = range_of<size>(group);
  const float lowest = range[0], highest = range[1], up = high / range[2], down = low / range[3];
  float scale = finite ? as_scale(up > down ? up : down) : std::numeric_limits<float>::infinity();
  if (!(scale < std::numeric_limits<float>::infinity())) return scale;
  round_with<size>(group, scale, lowest, highest, rounded);
  if (fitted) {
    for (int i = 0; i < size; ++i) terms[i] = group[i] * rounded[i];
    const float product = sum<size / 2>(terms);
    for (int i = 0; i < size; ++i) terms[i] = rounded[i] * rounded[i];
    const float energy = sum<size / 2>(terms);
    scale = as_scale(energy > 0 ? product / energy : scale);
    if (!(scale < std::numeric_limits<float>::infinity())) return scale;
    round_with<size>(group, scale, lowest, highest, rounded);
  }
  for (int i = 0; i < size; ++i) values[i] = static_cast<std::int8_t>(rounded[i]);
  return scale;
}

}  // namespace

// groups x size numbers -> as many values and a float16 scale for each group, infinity where there is none: such groups have
// no values. `range`: lowest and highest value, and what a group's largest and smallest numbers are divided by. Returns
// whether the size is one of those known.
SEEN FOR_EACH_PROCESSOR int round_groups(const float* numbers, std::int64_t groups, std::int64_t size, const float* range,
                                         int fitted, std::int8_t* values, std::uint16_t* scales) {
  for (std::int64_t i = 0; i < groups; ++i) {
    const float* group = numbers + i * size;
    std::int8_t* to = values + i * size;
    if (size == 32) scales[i] = stored(round_group<32>(group, range, fitted, to));
    else if (size == 64) scales[i] = stored(round_group<64>(group, range, fitted, to));
    else if (size == 128) scales[i] = stored(round_group<128>(group, range, fitted, to));
    else return 0;
  }
  return 1;
}

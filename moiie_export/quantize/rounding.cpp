// Rounding to nearest of groups of weights, the same arithmetic as rtn.py in the same order: every operation is rounded as
// IEEE 754 says, and sums are taken by halves, so that the numbers are the same bit for bit whichever of the two made them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define SEEN extern "C" __attribute__((visibility("default")))
#define INSIDE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define FOR(processor) __attribute__((target(processor)))
#endif

namespace {

template <typename number, int count>
struct Several {
  typedef number type __attribute__((vector_size(count * sizeof(number))));
};
template <typename number, int count>
using Vector = typename Several<number, count>::type;
template <int lanes>
using Floats = Vector<float, lanes>;

constexpr float smallest = 1.0f / (1 << 24);  // of float16: subnormal, normal
constexpr float normal = 1.0f / (1 << 14);
constexpr float infinity = std::numeric_limits<float>::infinity();

// Rounds to even; for a float that is no float16's subnormal.
INSIDE float as_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0xFFF + ((bits >> 13) & 1);
  bits &= ~std::uint32_t{0x1FFF};
  std::memcpy(&value, &bits, sizeof bits);
  return value < 65536.0f ? value : infinity;
}

INSIDE float as_scale(float value) {
  const float rounded = value < normal ? std::ceil(value / smallest) * smallest : as_half(value);
  return rounded == 0.0f ? 1.0f : rounded;
}

INSIDE std::uint16_t stored(float scale) {  // one that as_scale gave
  if (!(scale < infinity)) return 0x7C00;
  if (scale < normal) return static_cast<std::uint16_t>(scale / smallest);
  std::uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  return static_cast<std::uint16_t>((bits >> 13) - ((127 - 15) << 10));
}

struct Sum {
  template <typename Any>
  INSIDE Any of(const Any& a, const Any& b) { return a + b; }
};
struct Least {
  template <typename Any>
  INSIDE Any of(const Any& a, const Any& b) { return b < a ? b : a; }
};
struct Most {
  template <typename Any>
  INSIDE Any of(const Any& a, const Any& b) { return b > a ? b : a; }
};

// Lane i of the result is lane i ^ by.
template <int by, int lanes, int... lane>
INSIDE Floats<lanes> swapped(const Floats<lanes>& terms, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(terms, terms, (lane ^ by)...);
#else
  return __builtin_shuffle(terms, Vector<std::int32_t, lanes>{(lane ^ by)...});
#endif
}

template <typename Operation, int lanes, int by = lanes / 2>
INSIDE float lanes_of(const Floats<lanes>& terms) {
  const Floats<lanes> found = Operation::of(terms, swapped<by, lanes>(terms, std::make_integer_sequence<int, lanes>()));
  if constexpr (by > 1) return lanes_of<Operation, lanes, by / 2>(found);
  return found[0];
}

// Of all the numbers, taken by halves; overwrites them.
template <typename Operation, int lanes, int vectors>
INSIDE float all_of(Floats<lanes>* terms) {
  for (int half = vectors / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) terms[i] = Operation::of(terms[i], terms[i + half]);
  return lanes_of<Operation, lanes>(terms[0]);
}

template <int lanes>
INSIDE void load(const void* numbers, std::int64_t at, bool brain, Floats<lanes>& to) {
  if (brain) {  // bfloat16: the upper half of a float32
    Vector<std::uint16_t, lanes> upper;
    std::memcpy(&upper, static_cast<const std::uint16_t*>(numbers) + at, sizeof upper);
    using Words = Vector<std::uint32_t, lanes>;
    const Words bits = __builtin_convertvector(upper, Words) << 16;
    std::memcpy(&to, &bits, sizeof to);
  } else {
    std::memcpy(&to, static_cast<const float*>(numbers) + at, sizeof to);
  }
}

template <int lanes>
INSIDE void round_with(const Floats<lanes>& numbers, float scale, float lowest, float highest, Floats<lanes>& rounded) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: what is added and taken away again is rounded to even
  const Floats<lanes> zero = {}, under = zero + (lowest - 1), over = zero + (highest + 1);
  const Floats<lanes> bottom = zero + lowest, top = zero + highest;
  Floats<lanes> value = numbers / scale;
  value = value < under ? under : value;
  value = value > over ? over : value;
  value = (value + shift) - shift;
  value = value < bottom ? bottom : value;
  rounded = value > top ? top : value;
}

template <int lanes>
INSIDE void store(const Floats<lanes>& rounded, bool packed, std::int8_t* to) {
  using Integers = Vector<std::int32_t, lanes>;
  const Integers numbers = __builtin_convertvector(rounded, Integers);
  if (packed) {  // two a byte, the even column in the low half
    using Nibbles = Vector<std::uint8_t, lanes / 2>;
    Vector<std::uint64_t, lanes / 2> pairs;
    std::memcpy(&pairs, &numbers, sizeof pairs);
    const Nibbles bytes = __builtin_convertvector((pairs & 15) | ((pairs >> 32) << 4), Nibbles);
    std::memcpy(to, &bytes, sizeof bytes);
  } else {
    using Bytes = Vector<std::int8_t, lanes>;
    const Bytes bytes = __builtin_convertvector(numbers, Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
  }
}

struct Work {
  const void* numbers;
  bool brain;
  std::int64_t groups, size;
  const float* range;
  bool fitted, packed;
  std::int8_t* values;
  std::uint16_t* scales;
};

template <int lanes, int size>
INSIDE float round_group(const Work& work, std::int64_t at) {
  constexpr int vectors = size / lanes;
  Floats<lanes> group[vectors], rounded[vectors], terms[vectors];
  for (int i = 0; i < vectors; ++i) load<lanes>(work.numbers, at + i * lanes, work.brain, group[i]);
  for (int i = 0; i < vectors; ++i) terms[i] = group[i] * 0.0f;  // NaN where it is not finite
  if (!(all_of<Sum, lanes, vectors>(terms) == 0.0f)) return infinity;
  for (int i = 0; i < vectors; ++i) terms[i] = group[i];
  const float low = all_of<Least, lanes, vectors>(terms);
  for (int i = 0; i < vectors; ++i) terms[i] = group[i];
  const float high = all_of<Most, lanes, vectors>(terms);
  const float lowest = work.range[0], highest = work.range[1], up = high / work.range[2], down = low / work.range[3];
  float scale = as_scale(up > down ? up : down);
  if (!(scale < infinity)) return scale;
  for (int i = 0; i < vectors; ++i) round_with<lanes>(group[i], scale, lowest, highest, rounded[i]);
  if (work.fitted) {
    for (int i = 0; i < vectors; ++i) terms[i] = group[i] * rounded[i];
    const float product = all_of<Sum, lanes, vectors>(terms);
    for (int i = 0; i < vectors; ++i) terms[i] = rounded[i] * rounded[i];
    const float energy = all_of<Sum, lanes, vectors>(terms);
    scale = as_scale(energy > 0 ? product / energy : scale);
    if (!(scale < infinity)) return scale;
    for (int i = 0; i < vectors; ++i) round_with<lanes>(group[i], scale, lowest, highest, rounded[i]);
  }
  for (int i = 0; i < vectors; ++i) {
    const std::int64_t first = at + i * lanes;
    store<lanes>(rounded[i], work.packed, work.values + (work.packed ? first / 2 : first));
  }
  return scale;
}

template <int lanes, int size>
INSIDE std::int64_t round_all(const Work& work) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < work.groups; ++i) {
    const float scale = round_group<lanes, size>(work, i * size);
    work.scales[i] = stored(scale);
    found += scale < infinity;
  }
  return found;
}

template <int lanes>
INSIDE std::int64_t round_by(const Work& work) {
  switch (work.size) {
    case 32: return round_all<lanes, 32>(work);
    case 64: return round_all<lanes, 64>(work);
    case 128: return round_all<lanes, 128>(work);
    default: return -1;
  }
}

// As wide as a processor's registers: compilers take vectors wider than these apart, number by number.
#ifdef FOR
FOR("avx512f") std::int64_t with_512_bits(const Work& work) { return round_by<16>(work); }
FOR("avx2") std::int64_t with_256_bits(const Work& work) { return round_by<8>(work); }
#endif
std::int64_t with_128_bits(const Work& work) { return round_by<4>(work); }

}  // namespace

// groups x size numbers, float32 or bfloat16 -> as many values, two a byte (`packed`) or one, and a float16 scale for each
// group, infinity where there is none: such groups have no values. `range`: lowest and highest value, and what a group's
// largest and smallest numbers are divided by. `bits`: of the registers to use, 0 for the widest there are. Returns how many
// groups have a scale; -1 when the size is none of those known, or the processor has no such registers.
SEEN std::int64_t round_groups(const void* numbers, int brain, std::int64_t groups, std::int64_t size, const float* range,
                               int fitted, int packed, int bits, std::int8_t* values, std::uint16_t* scales) {
  const Work work{numbers, brain != 0, groups, size, range, fitted != 0, packed != 0, values, scales};
#ifdef FOR
  if ((bits == 0 || bits == 512) && __builtin_cpu_supports("avx512f")) return with_512_bits(work);
  if ((bits == 0 || bits == 256) && __builtin_cpu_supports("avx2")) return with_256_bits(work);
#endif
  return bits == 0 || bits == 128 ? with_128_bits(work) : -1;
}

// Attend: rotary positions, new keys and values into their buffers, attention; one operator for a prompt and for a token.
#include <algorithm>
#include <cmath>
#include <string>

#include "generic.h"
#include "operators.h"
#include "panels.h"

#define MOIIE_ISA portable
#define MOIIE_TARGET
#include "attention_loops.h"
#undef MOIIE_ISA
#undef MOIIE_TARGET

#if defined(__x86_64__)
#include <immintrin.h>

#define MOIIE_ISA avx2
#define MOIIE_TARGET __attribute__((target("avx2,f16c,fma")))
#include "attention_loops.h"
#undef MOIIE_ISA
#undef MOIIE_TARGET

#define MOIIE_ISA avx512
#define MOIIE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))
#define MOIIE_WIDEN(p) reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))))
#include "attention_loops.h"
#undef MOIIE_ISA
#undef MOIIE_TARGET
#undef MOIIE_WIDEN
#endif

namespace moiie {
namespace {

using attention::Tile;

void attend_portable(const Tile& tile, bool half) {
  half ? attention::portable::attend<uint16_t>(tile) : attention::portable::attend<float>(tile);
}

#if defined(__x86_64__)
__attribute__((target("avx2,f16c,fma"))) void attend_avx2(const Tile& tile, bool half) {
  half ? attention::avx2::attend<uint16_t>(tile) : attention::avx2::attend<float>(tile);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma"))) void attend_avx512(const Tile& tile, bool half) {
  half ? attention::avx512::attend<uint16_t>(tile) : attention::avx512::attend<float>(tile);
}
#endif

uint16_t to_half(float x) {
  const uint32_t bits = static_cast<uint32_t>(generic::bits_of(x));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = generic::float_of(static_cast<int32_t>(bits & 0x7FFFFFFF));
  if (!(magnitude < 65520.0f)) return static_cast<uint16_t>(sign | (magnitude != magnitude ? 0x7E00 : 0x7C00));
  if (magnitude < 6.103515625e-05f) {  // subnormal: a count of 2^-24
    const float count = magnitude * 16777216.0f + generic::kRound;
    return static_cast<uint16_t>(sign | (generic::bits_of(count) - generic::kRoundBits));
  }
  const uint32_t rest = bits & 0x7FFFFFFF;
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13));
}

void put(float* to, const float* from, int64_t count) { std::copy_n(from, count, to); }

void put(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_half(from[i]);
}

// Halves of a head are the two coordinates of its rotations.
void rotate(const float* head, const float* cosines, const float* sines, float scale, int64_t size, float* out) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i] * scale, b = head[half + i] * scale;
    out[i] = a * cosines[i] - b * sines[i];
    out[half + i] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace

struct AttendArguments {
  const float* qkv;
  const int64_t* lengths;
  const float* cosines;
  const float* sines;
  void* keys;
  void* values;
  float* out;
  int64_t batch, tokens, capacity;
};

Attend::Attend(const Attributes& attributes, bool half)
    : heads_(attributes.required("num_heads")),
      key_heads_(attributes.required("kv_num_heads")),
      size_(attributes.required("head_size")),
      window_(attributes.optional("local_window_size", 0)),
      half_(half) {
  if (size_ < attention::kLanes || size_ % attention::kLanes != 0 || size_ > attention::kLargestHead)
    throw Error("Attend: head_size must be a multiple of 16 up to 512, not " + std::to_string(size_));
  if (key_heads_ < 1 || heads_ < key_heads_ || heads_ % key_heads_ != 0)
    throw Error("Attend: " + std::to_string(heads_) + " heads cannot share " + std::to_string(key_heads_) + " key heads");
  if (heads_ / key_heads_ > attention::kRows) throw Error("Attend: more than 64 heads share a key head");
  const std::string isa = choose_kernels().few->name;
  attend_ = attend_portable;
#if defined(__x86_64__)
  if (isa == "avx512") attend_ = attend_avx512;
  if (isa == "avx2") attend_ = attend_avx2;
#endif
}

AttendArguments Attend::arguments(const Call& call) const {
  const Tensor qkv = call.input(0), keys = call.input(1), values = call.input(2), lengths = call.input(3);
  const Tensor cosines = call.input(4), sines = call.input(5);
  const int64_t width = (heads_ + 2 * key_heads_) * size_;
  if (keys.dims.size() != 4 || keys.dims[1] != key_heads_ || keys.dims[3] != size_ || values.dims != keys.dims)
    throw Error("Attend: keys and values must be [B, " + std::to_string(key_heads_) + ", capacity, " + std::to_string(size_) +
                "], not " + keys.shape_text() + " and " + values.shape_text());
  const int64_t batch = keys.dims[0];
  if (qkv.dims.size() != 2 || qkv.dims[1] != width || batch < 1 || qkv.dims[0] % batch != 0)
    throw Error("Attend: qkv must be [tokens of " + std::to_string(batch) + " rows, " + std::to_string(width) + "], not " +
                qkv.shape_text());
  if (!lengths.has_dims({batch})) throw Error("Attend: past_lengths must be [B], not " + lengths.shape_text());
  AttendArguments a{};
  a.batch = batch;
  a.tokens = qkv.dims[0] / batch;
  a.capacity = keys.dims[2];
  if (!cosines.has_dims({a.capacity, size_ / 2}) || !sines.has_dims({a.capacity, size_ / 2}))
    throw Error("Attend: tables must be [capacity, " + std::to_string(size_ / 2) + "], not " + cosines.shape_text());
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t length = lengths.as<int64_t>()[row];
    if (length < 0 || length + a.tokens > a.capacity)
      throw Error("Attend: " + std::to_string(a.tokens) + " tokens behind " + std::to_string(length) + " do not fit a buffer of " +
                  std::to_string(a.capacity));
  }
  a.qkv = qkv.as<float>();
  a.lengths = lengths.as<int64_t>();
  a.cosines = cosines.as<float>();
  a.sines = sines.as<float>();
  a.out = call.output(0, {qkv.dims[0], heads_ * size_}).as<float>();
  a.keys = updated(call, 1, keys);
  a.values = updated(call, 2, values);
  return a;
}

// The output that holds what `past` held; the same memory where the caller bound both to one buffer.
void* Attend::updated(const Call& call, size_t output, const Tensor& past) const {
  void* present = call.output(output, past.dims).data;
  if (present != past.data) std::memcpy(present, past.data, static_cast<size_t>(past.elements()) * (half_ ? 2 : 4));
  return present;
}

void Attend::run(const Call& call) const {
  const AttendArguments a = arguments(call);
  if (a.tokens == 0) return;
  const int64_t pairs = a.batch * key_heads_, group = heads_ / key_heads_;
  const int64_t together = std::min(a.tokens, std::max<int64_t>(1, attention::kRows / group));
  const int64_t pieces = (a.tokens + together - 1) / together;
  if (pieces == 1) {
    call.parallel(pairs, [&](int64_t pair) {
      write(a, pair);
      look(a, pair, 0, a.tokens);
    });
    return;
  }
  call.parallel(pairs, [&](int64_t pair) { write(a, pair); });
  call.parallel(pairs * pieces, [&](int64_t task) {
    const int64_t first = task % pieces * together;
    look(a, task / pieces, first, std::min(together, a.tokens - first));
  });
}

// New keys, rotated, and values of one row and key head.
void Attend::write(const AttendArguments& a, int64_t pair) const {
  const int64_t row = pair / key_heads_, head = pair % key_heads_, width = (heads_ + 2 * key_heads_) * size_;
  float rotated[attention::kLargestHead];
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t position = a.lengths[row] + t, place = (pair * a.capacity + position) * size_;
    const float* key = a.qkv + (row * a.tokens + t) * width + (heads_ + head) * size_;
    const float* value = key + key_heads_ * size_;
    rotate(key, a.cosines + position * (size_ / 2), a.sines + position * (size_ / 2), 1.0f, size_, rotated);
    if (half_) {
      put(static_cast<uint16_t*>(a.keys) + place, rotated, size_);
      put(static_cast<uint16_t*>(a.values) + place, value, size_);
    } else {
      put(static_cast<float*>(a.keys) + place, rotated, size_);
      put(static_cast<float*>(a.values) + place, value, size_);
    }
  }
}

// Attention of tokens first .. first + count - 1 of a row, for all heads that share a key head.
void Attend::look(const AttendArguments& a, int64_t pair, int64_t first, int64_t count) const {
  const int64_t row = pair / key_heads_, head = pair % key_heads_, group = heads_ / key_heads_;
  const int64_t width = (heads_ + 2 * key_heads_) * size_;
  thread_local Buffer storage;
  float* queries = storage.take<float>(2 * attention::kRows * size_);
  float* found = queries + attention::kRows * size_;
  int64_t oldest[attention::kRows], newest[attention::kRows];
  const float scale = 1.0f / std::sqrt(static_cast<float>(size_));
  for (int64_t t = 0; t < count; ++t) {
    const int64_t position = a.lengths[row] + first + t;
    const float* token = a.qkv + (row * a.tokens + first + t) * width + head * group * size_;
    const float* cosines = a.cosines + position * (size_ / 2);
    const float* sines = a.sines + position * (size_ / 2);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t r = t * group + g;
      rotate(token + g * size_, cosines, sines, scale, size_, queries + r * size_);
      newest[r] = position;
      oldest[r] = window_ > 0 ? std::max<int64_t>(0, position + 1 - window_) : 0;
    }
  }
  const int64_t bytes = half_ ? 2 : 4, place = pair * a.capacity * size_ * bytes;
  attend_(Tile{queries, oldest, newest, count * group, size_, static_cast<const char*>(a.keys) + place,
               static_cast<const char*>(a.values) + place, found},
          half_);
  for (int64_t t = 0; t < count; ++t)
    std::copy_n(found + t * group * size_, group * size_,
                a.out + ((row * a.tokens + first + t) * heads_ + head * group) * size_);
}

}  // namespace moiie

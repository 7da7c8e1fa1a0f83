// Attention over static buffers, in loops over vectors of 16 floats. Included once for each instruction set, with MOIIE_ISA its
// name and MOIIE_TARGET the attribute that lets functions use it: what one vector becomes is settled before inlining. Where
// MOIIE_WIDEN is defined, it makes a vector of 16 halves in memory.
//
// A tile is some queries of one row that share a key head: R vectors of D floats. Keys come in blocks of kKeys; a running
// maximum and sum (online softmax) make one pass over them enough.
#include <limits>

#include "attention_tile.h"
#include "generic.h"

#define MOIIE_LOOP inline __attribute__((always_inline)) MOIIE_TARGET

namespace moiie::attention::MOIIE_ISA {

constexpr int64_t kWide = 4;  // vectors of a sum that stay in registers

typedef float Vector __attribute__((vector_size(64), aligned(4)));

MOIIE_LOOP Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MOIIE_LOOP void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

MOIIE_LOOP Vector load(const uint16_t* p) {
#if defined(MOIIE_WIDEN)
  return MOIIE_WIDEN(p);
#else
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = generic::half_to_float(p[i]);
  return v;
#endif
}

MOIIE_LOOP Vector spread(float x) { return Vector{} + x; }

MOIIE_LOOP float sum(Vector v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// A block of keys or values as floats; those that are floats already are used where they lie.
MOIIE_LOOP const float* as_floats(const float* stored, int64_t, float*) { return stored; }

MOIIE_LOOP const float* as_floats(const uint16_t* stored, int64_t count, float* room) {
  for (int64_t i = 0; i < count; i += kLanes) store(room + i, load(stored + i));
  return room;
}

// scores[row][key] of a block, one product at a time: for few rows.
MOIIE_LOOP void scores_of_few(const Tile& tile, const float* keys, int64_t count, float* scores) {
  for (int64_t j = 0; j < count; ++j) {
    const float* key = keys + j * tile.size;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* query = tile.queries + r * tile.size;
      Vector total = load(query) * load(key);
      for (int64_t d = kLanes; d < tile.size; d += kLanes) total += load(query + d) * load(key + d);
      scores[r * kKeys + j] = sum(total);
    }
  }
}

// The same with keys as columns, which pays when many rows share the turning.
MOIIE_LOOP void scores_of_many(const Tile& tile, const float* keys, int64_t count, float* turned, float* scores) {
  for (int64_t j = 0; j < kKeys; ++j)
    for (int64_t d = 0; d < tile.size; ++d) turned[d * kKeys + j] = j < count ? keys[j * tile.size + d] : 0.0f;
  constexpr int64_t kTogether = 4;
  for (int64_t r = 0; r < tile.rows; r += kTogether) {
    Vector totals[kTogether][kKeys / kLanes] = {};
    const int64_t here = tile.rows - r < kTogether ? tile.rows - r : kTogether;
    for (int64_t d = 0; d < tile.size; ++d) {
      Vector columns[kKeys / kLanes];
#pragma GCC unroll 4
      for (int64_t c = 0; c < kKeys / kLanes; ++c) columns[c] = load(turned + d * kKeys + c * kLanes);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTogether; ++i) {
        const Vector q = spread(tile.queries[(r + (i < here ? i : 0)) * tile.size + d]);
#pragma GCC unroll 4
        for (int64_t c = 0; c < kKeys / kLanes; ++c) totals[i][c] += q * columns[c];
      }
    }
    for (int64_t i = 0; i < here; ++i)
      for (int64_t c = 0; c < kKeys / kLanes; ++c) store(scores + (r + i) * kKeys + c * kLanes, totals[i][c]);
  }
}

// Turns a row's scores into weights e^(score - peak), unseen keys into 0; returns what older sums must be multiplied with.
MOIIE_LOOP float soften(float* scores, int64_t begin, int64_t end, float* peak, float* total) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < begin; ++j) scores[j] = kNone;
  for (int64_t j = end; j < kKeys; ++j) scores[j] = kNone;
  Vector highs = load(scores);
  for (int64_t j = kLanes; j < kKeys; j += kLanes) {
    const Vector more = load(scores + j);
    highs = more > highs ? more : highs;
  }
  float highest = *peak;
  for (int64_t i = 0; i < kLanes; ++i) highest = highs[i] > highest ? highs[i] : highest;
  for (int64_t j = 0; j < kKeys; ++j) scores[j] = generic::exponential(scores[j] - highest);
  for (int64_t j = 0; j < begin; ++j) scores[j] = 0.0f;
  for (int64_t j = end; j < kKeys; ++j) scores[j] = 0.0f;
  Vector added = load(scores);
  for (int64_t j = kLanes; j < kKeys; j += kLanes) added += load(scores + j);
  const float older = generic::exponential(*peak - highest);
  *total = *total * older + sum(added);
  *peak = highest;
  return older;
}

// out = out x older + weights x values, `Count` vectors of a row at a time.
template <int64_t Count>
MOIIE_LOOP void gather(const float* weights, float older, const float* values, int64_t keys, int64_t size, float* out) {
  Vector totals[Count];
#pragma GCC unroll 4
  for (int64_t c = 0; c < Count; ++c) totals[c] = load(out + c * kLanes) * spread(older);
  for (int64_t j = 0; j < keys; ++j) {
    const Vector w = spread(weights[j]);
#pragma GCC unroll 4
    for (int64_t c = 0; c < Count; ++c) totals[c] += w * load(values + j * size + c * kLanes);
  }
#pragma GCC unroll 4
  for (int64_t c = 0; c < Count; ++c) store(out + c * kLanes, totals[c]);
}

template <typename Stored>
MOIIE_LOOP void attend(const Tile& tile) {
  alignas(64) float scores[kRows * kKeys];
  alignas(64) float room[kKeys * kLargestHead];
  alignas(64) float turned[kKeys * kLargestHead];
  float peaks[kRows], totals[kRows];
  int64_t oldest = tile.first[0], newest = tile.last[0];
  for (int64_t r = 0; r < tile.rows; ++r) {
    peaks[r] = -std::numeric_limits<float>::infinity();
    totals[r] = 0.0f;
    oldest = tile.first[r] < oldest ? tile.first[r] : oldest;
    newest = tile.last[r] > newest ? tile.last[r] : newest;
  }
  std::memset(tile.out, 0, tile.rows * tile.size * sizeof(float));
  for (int64_t start = oldest / kKeys * kKeys; start <= newest; start += kKeys) {
    const int64_t count = newest + 1 - start < kKeys ? newest + 1 - start : kKeys;
    const float* keys = as_floats(static_cast<const Stored*>(tile.keys) + start * tile.size, count * tile.size, room);
    if (tile.rows < 8)
      scores_of_few(tile, keys, count, scores);
    else
      scores_of_many(tile, keys, count, turned, scores);
    const float* values = as_floats(static_cast<const Stored*>(tile.values) + start * tile.size, count * tile.size, room);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t begin = tile.first[r] > start ? tile.first[r] - start : 0;
      const int64_t end = tile.last[r] + 1 - start < count ? tile.last[r] + 1 - start : count;
      if (begin >= end) continue;
      float* row = scores + r * kKeys;
      const float older = soften(row, begin, end, peaks + r, totals + r);
      float* out = tile.out + r * tile.size;
      int64_t d = 0;
      for (; d + kWide * kLanes <= tile.size; d += kWide * kLanes) gather<kWide>(row, older, values + d, end, tile.size, out + d);
      for (; d < tile.size; d += kLanes) gather<1>(row, older, values + d, end, tile.size, out + d);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Vector share = spread(1.0f / totals[r]);
    for (int64_t d = 0; d < tile.size; d += kLanes) store(tile.out + r * tile.size + d, load(tile.out + r * tile.size + d) * share);
  }
}

}  // namespace moiie::attention::MOIIE_ISA

#undef MOIIE_LOOP

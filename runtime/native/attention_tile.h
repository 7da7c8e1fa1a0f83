// What one piece of attention is about; the same for all instruction sets.
#pragma once

#include <cstdint>

namespace moiie::attention {

constexpr int64_t kLanes = 16;
constexpr int64_t kKeys = 64;
constexpr int64_t kRows = 64;  // of a tile at most
constexpr int64_t kLargestHead = 512;

// Queries of one tile, and what they look at.
struct Tile {
  const float* queries;  // [rows][size], rotated and scaled
  const int64_t* first;  // per row: the oldest key that it sees
  const int64_t* last;   // per row: the newest
  int64_t rows;
  int64_t size;
  const void* keys;  // [capacity][size], of one row and head
  const void* values;
  float* out;  // [rows][size]
};

}  // namespace moiie::attention

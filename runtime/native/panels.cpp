#include "panels.h"

namespace moiie {

float* sums_buffer(int64_t rows) {
  thread_local Buffer buffer;
  constexpr int64_t kSpare = 15;  // kernels may write whole tiles of 16 rows
  return buffer.take<float>((rows + kSpare) * kBlockRows);
}

int64_t blocks_per_task(const Layout& layout, int64_t rows) {
  constexpr int64_t kTaskBytes = 64 << 10;  // 4 to 8 microseconds of reading
  const int64_t wanted = kTaskBytes / static_cast<int64_t>(layout.block_bytes()) / std::max<int64_t>(1, rows / 4);
  return std::max<int64_t>(1, wanted);
}

}  // namespace moiie

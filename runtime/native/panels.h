// Activations in the kernels' form, and memory that is kept between runs.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace moiie {

// Uninitialised memory, aligned for any vector. It grows when asked for more, and shrinks when it was far too large, so
// that a prompt's buffers do not stay for the tokens after it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_ || (size_ > kKeep && bytes < size_ / 4)) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  static constexpr size_t kKeep = size_t{1} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Rows of activations, cut into panels that the kernels take.
struct Panels {
  const Kernels* kernels = nullptr;
  const Layout* layout = nullptr;
  Rows rows{};
  uint8_t* storage = nullptr;

  int64_t count() const { return (rows.count + kernels->max_rows - 1) / kernels->max_rows; }
  int64_t first_row(int64_t panel) const { return panel * kernels->max_rows; }
  int64_t rows_of(int64_t panel) const { return std::min(kernels->max_rows, rows.count - first_row(panel)); }
  size_t panel_bytes() const { return (kernels->panel_bytes(std::min(kernels->max_rows, rows.count), layout->columns) + 63) / 64 * 64; }
  size_t bytes() const { return static_cast<size_t>(count()) * panel_bytes(); }
  uint8_t* at(int64_t panel) const { return storage + static_cast<size_t>(panel) * panel_bytes(); }

  void fill(int64_t panel) const {
    Rows part = rows;
    part.count = rows_of(panel);
    if (part.index != nullptr)
      part.index += first_row(panel);
    else
      part.data += first_row(panel) * part.stride;
    kernels->fill(part, *layout, at(panel));
  }

  void block(int64_t panel, const uint8_t* weights, int64_t block, float* sums) const {
    kernels->block(at(panel), rows_of(panel), *layout, weights + static_cast<size_t>(block) * layout->block_bytes(), sums);
  }
};

// Of the thread that asks, `rows` rows of a block's sums.
float* sums_buffer(int64_t rows);

// Blocks that one task takes: enough weights, or enough work on them, to be worth handing out.
int64_t blocks_per_task(const Layout& layout, int64_t rows);

}  // namespace moiie

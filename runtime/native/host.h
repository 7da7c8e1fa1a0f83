// What the operators ask of the runtime: attributes, tensors, threads. Failures are thrown and end as the runtime's own errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace moiie {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws what `status` says; nothing for a null pointer, which is success.
void check(const ort::Api* api, ort::Status* status);

// Attributes of the node that a kernel is made for.
class Attributes {
 public:
  Attributes(const ort::Api* api, const ort::KernelInfo* info) : api_(api), info_(info) {}
  int64_t required(const char* name) const;
  int64_t optional(const char* name, int64_t otherwise) const;
  std::vector<int64_t> list(const char* name) const;

 private:
  const ort::Api* api_;
  const ort::KernelInfo* info_;
};

struct Tensor {
  std::vector<int64_t> dims;
  void* data = nullptr;  // null: an optional input that is absent

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t elements() const;
  bool has_dims(const std::vector<int64_t>& wanted) const { return dims == wanted; }
  std::string shape_text() const;
};

// One run of a node.
class Call {
 public:
  Call(const ort::Api* api, ort::KernelContext* context) : api_(api), context_(context) {}
  size_t input_count() const;
  Tensor input(size_t index) const;
  Tensor output(size_t index, const std::vector<int64_t>& dims) const;

  // Runs task(0) .. task(count - 1) on the session's threads and waits for all. Tasks must not throw.
  template <typename Task>
  void parallel(int64_t count, const Task& task) const {
    if (count == 1) return task(0);
    if (count > 1) spread(count, [](void* data, size_t i) { (*static_cast<const Task*>(data))(static_cast<int64_t>(i)); }, &task);
  }

 private:
  void spread(int64_t count, void (*run)(void*, size_t), const void* task) const;
  const ort::Api* api_;
  ort::KernelContext* context_;
};

}  // namespace moiie

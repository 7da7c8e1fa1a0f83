#include "host.h"

namespace moiie {

void check(const ort::Api* api, ort::Status* status) {
  if (status == nullptr) return;
  const std::string message = ort::ErrorMessage::of(api)(status);
  ort::ReleaseStatus::of(api)(status);
  throw Error(message);
}

int64_t Attributes::required(const char* name) const {
  int64_t value = 0;
  check(api_, ort::AttributeInt::of(api_)(info_, name, &value));
  return value;
}

int64_t Attributes::optional(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  ort::Status* status = ort::AttributeInt::of(api_)(info_, name, &value);
  if (status == nullptr) return value;
  ort::ReleaseStatus::of(api_)(status);
  return otherwise;
}

std::vector<int64_t> Attributes::list(const char* name) const {
  size_t size = 0;
  check(api_, ort::AttributeInts::of(api_)(info_, name, nullptr, &size));
  std::vector<int64_t> values(size);
  if (size > 0) check(api_, ort::AttributeInts::of(api_)(info_, name, values.data(), &size));
  return values;
}

int64_t Tensor::elements() const {
  int64_t product = 1;
  for (const int64_t dim : dims) product *= dim;
  return product;
}

std::string Tensor::shape_text() const {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + "]";
}

size_t Call::input_count() const {
  size_t count = 0;
  check(api_, ort::InputCount::of(api_)(context_, &count));
  return count;
}

Tensor Call::input(size_t index) const {
  const ort::Value* value = nullptr;
  check(api_, ort::Input::of(api_)(context_, index, &value));
  Tensor tensor;
  if (value == nullptr) return tensor;
  ort::ShapeInfo* shape = nullptr;
  check(api_, ort::ShapeOf::of(api_)(value, &shape));
  size_t count = 0;
  ort::Status* status = ort::DimensionCount::of(api_)(shape, &count);
  if (status == nullptr) {
    tensor.dims.resize(count);
    status = ort::Dimensions::of(api_)(shape, tensor.dims.data(), count);
  }
  ort::ReleaseShape::of(api_)(shape);
  check(api_, status);
  // The runtime has one accessor for both directions; inputs are only read.
  check(api_, ort::MutableData::of(api_)(const_cast<ort::Value*>(value), &tensor.data));
  return tensor;
}

Tensor Call::output(size_t index, const std::vector<int64_t>& dims) const {
  Tensor tensor;
  tensor.dims = dims;
  ort::Value* value = nullptr;
  check(api_, ort::Output::of(api_)(context_, index, dims.data(), dims.size(), &value));
  check(api_, ort::MutableData::of(api_)(value, &tensor.data));
  return tensor;
}

void Call::spread(int64_t count, void (*run)(void*, size_t), const void* task) const {
  check(api_, ort::ParallelFor::of(api_)(context_, run, static_cast<size_t>(count), 0, const_cast<void*>(task)));
}

}  // namespace moiie

#include <algorithm>
#include <cmath>
#include <limits>

#include "operators.h"

namespace moiie {
namespace {

// Sixteen sums side by side, which the compiler keeps in one register.
float dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return sums[0];
}

}  // namespace

Route::Route(const Attributes& attributes)
    : experts_(attributes.required("num_experts")),
      top_k_(attributes.required("top_k")),
      groups_{attributes.list("language_experts"), attributes.list("vision_experts")} {
  if (experts_ < 1 || experts_ > 1024) throw Error("Route: num_experts must be 1 to 1024, not " + std::to_string(experts_));
  if (top_k_ < 1 || top_k_ > experts_) throw Error("Route: top_k must be 1 to " + std::to_string(experts_));
  for (const auto& group : groups_)
    for (int64_t id : group)
      if (id < 0 || id >= experts_) throw Error("Route: there is no expert " + std::to_string(id));
}

void Route::run(const Call& call) const {
  const Tensor x = call.input(0);
  if (x.dims.size() != 2) throw Error("Route: x must be [T, H], not " + x.shape_text());
  const int64_t rows = x.dims[0], width = x.dims[1];
  const bool by_modality = call.input_count() > 2;
  Tensor gates[2] = {call.input(1), by_modality ? call.input(3) : Tensor{}};
  const Tensor modality = by_modality ? call.input(2) : Tensor{};
  for (int kind = 0; kind < (by_modality ? 2 : 1); ++kind)
    if (!gates[kind].has_dims({static_cast<int64_t>(groups_[kind].size()), width}))
      throw Error("Route: a gate must be [" + std::to_string(groups_[kind].size()) + ", " + std::to_string(width) + "], not " +
                  gates[kind].shape_text());
  if (by_modality && !modality.has_dims({rows})) throw Error("Route: the modality must be [T], not " + modality.shape_text());
  float* logits = call.output(0, {rows, experts_}).as<float>();
  int32_t* ids = call.output(1, {rows, top_k_}).as<int32_t>();
  float* weights = call.output(2, {rows, top_k_}).as<float>();
  const auto one = [&](int64_t row) {
    const int kind = by_modality && modality.as<int32_t>()[row] == 1 ? 1 : 0;
    float* own = logits + row * experts_;
    std::fill_n(own, experts_, -std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < groups_[kind].size(); ++i)
      own[groups_[kind][i]] = dot(x.as<float>() + row * width, gates[kind].as<float>() + static_cast<int64_t>(i) * width, width);
    choose(own, ids + row * top_k_, weights + row * top_k_);
  };
  constexpr int64_t kRows = 64;
  if (rows <= kRows) {
    for (int64_t row = 0; row < rows; ++row) one(row);
    return;
  }
  call.parallel((rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) one(row);
  });
}

// The k highest logits, of equal ones the lower id first, and their probabilities, which are made to add up to one.
void Route::choose(const float* logits, int32_t* ids, float* weights) const {
  for (int64_t k = 0; k < top_k_; ++k) {
    int32_t best = -1;
    for (int32_t id = 0; id < experts_; ++id) {
      const bool taken = std::find(ids, ids + k, id) != ids + k;
      if (!taken && (best < 0 || logits[id] > logits[best])) best = id;
    }
    ids[k] = best;
    weights[k] = std::exp(logits[best] - logits[ids[0]]);
  }
  float total = 0;
  for (int64_t k = 0; k < top_k_; ++k) total += weights[k];
  for (int64_t k = 0; k < top_k_; ++k) weights[k] /= total;
}

}  // namespace moiie

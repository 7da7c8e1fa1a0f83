#include "operators.h"
#include "panels.h"

namespace moiie {
namespace {

// One expert that has routes: its packed weights, its rows of the input, and where its rows of the hidden layer begin.
struct Active {
  const uint8_t* gate_up;
  const uint8_t* down;
  int64_t first;  // route
  int64_t count;
  Panels in, inner;
};

// Buffers of the thread that runs the node.
struct Scratch {
  Buffer rows, weights, in, hidden, inner;
};

// All routes, expert by expert, and within one in the order of the tokens.
struct Routes {
  int32_t* rows;
  float* weights;
  std::vector<Active> active;
  int64_t total = 0;
};

Routes group_routes(const Tensor& ids, const Tensor& weights, const std::vector<int64_t>& experts, Scratch& scratch) {
  const int64_t slots = ids.elements(), k = ids.dims[1];
  Routes routes;
  routes.rows = scratch.rows.take<int32_t>(slots);
  routes.weights = scratch.weights.take<float>(slots);
  for (size_t e = 0; e < experts.size(); ++e) {
    const int64_t first = routes.total;
    for (int64_t i = 0; i < slots; ++i) {
      if (ids.as<int32_t>()[i] != experts[e]) continue;
      routes.rows[routes.total] = static_cast<int32_t>(i / k);
      routes.weights[routes.total++] = weights.as<float>()[i];
    }
    Active active{};
    active.first = first;
    active.count = routes.total - first;
    routes.active.push_back(active);
  }
  return routes;
}

// Lets panels share one buffer, and quantises their rows.
template <typename Member>
void fill_all(const Call& call, std::vector<Active>& active, Member member, Buffer& buffer) {
  size_t bytes = 0;
  std::vector<std::pair<const Panels*, int64_t>> tasks;
  for (Active& a : active) bytes += (a.*member).bytes();
  uint8_t* storage = buffer.take<uint8_t>(static_cast<int64_t>(bytes));
  int64_t rows = 0;
  for (Active& a : active) {
    Panels& panels = a.*member;
    panels.storage = storage;
    storage += panels.bytes();
    rows += panels.rows.count;
    for (int64_t p = 0; p < panels.count(); ++p) tasks.emplace_back(&panels, p);
  }
  const auto fill = [&](int64_t task) { tasks[task].first->fill(tasks[task].second); };
  constexpr int64_t kAlone = 8;  // rows that are done before another thread has heard of them
  if (rows > kAlone) return call.parallel(static_cast<int64_t>(tasks.size()), fill);
  for (size_t task = 0; task < tasks.size(); ++task) fill(static_cast<int64_t>(task));
}

// hidden[route, I] = silu(gate) * up of all experts' routes, in one sweep over the weights of all of them.
void up_sweep(const Call& call, const std::vector<Active>& active, const Layout& layout, int64_t routes, float* hidden) {
  const int64_t blocks = layout.blocks(), width = layout.outputs();
  const int64_t most = (routes + static_cast<int64_t>(active.size()) - 1) / static_cast<int64_t>(active.size());
  const int64_t step = blocks_per_task(layout, most), tasks = (blocks + step - 1) / step;
  call.parallel(tasks * static_cast<int64_t>(active.size()), [&](int64_t task) {
    const Active& a = active[task / tasks];
    const Panels& panels = a.in;
    float* sums = sums_buffer(std::min(a.count, panels.kernels->max_rows));
    const int64_t begin = task % tasks * step, end = std::min(blocks, begin + step);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kHalf, count = std::min(kHalf, width - first);
      for (int64_t p = 0; p < panels.count(); ++p) {
        panels.block(p, a.gate_up, block, sums);
        float* out = hidden + (a.first + panels.first_row(p)) * width + first;
        panels.kernels->swiglu(sums, panels.rows_of(p), count, out, width);
      }
    }
  });
}

// out[row] += weight * sums of one panel with one block of the down projection.
void add_routes(const Routes& routes, const Active& a, int64_t panel, const float* sums, int64_t first, int64_t width, float* out) {
  const int64_t count = std::min(kBlockRows, width - first);
  const int64_t begin = a.first + a.inner.first_row(panel);
  for (int64_t r = 0; r < a.inner.rows_of(panel); ++r, sums += kBlockRows) {
    float* row = out + routes.rows[begin + r] * width + first;
    const float weight = routes.weights[begin + r];
    for (int64_t i = 0; i < count; ++i) row[i] += weight * sums[i];
  }
}

// out [tokens, H]: each task owns some columns and adds the experts to them in ascending order.
void down_sweep(const Call& call, const Routes& routes, const Layout& layout, int64_t tokens, float* out) {
  const int64_t blocks = layout.blocks(), width = layout.outputs();
  const int64_t step = blocks_per_task(layout, routes.total);
  call.parallel((blocks + step - 1) / step, [&](int64_t task) {
    for (int64_t block = task * step; block < std::min(blocks, (task + 1) * step); ++block) {
      const int64_t first = block * kBlockRows, count = std::min(kBlockRows, width - first);
      for (int64_t t = 0; t < tokens; ++t) std::fill_n(out + t * width + first, count, 0.0f);
      for (const Active& a : routes.active) {
        const Panels& panels = a.inner;
        float* sums = sums_buffer(std::min(a.count, panels.kernels->max_rows));
        for (int64_t p = 0; p < panels.count(); ++p) {
          panels.block(p, a.down, block, sums);
          add_routes(routes, a, p, sums, first, width, out);
        }
      }
    }
  });
}

}  // namespace

Experts::Experts(const Attributes& attributes)
    : gate_up_(checked_layout(2 * attributes.required("I"), attributes.required("H"), attributes.required("bits_gate_up"),
                              attributes.required("group_gate_up"), true)),
      down_(checked_layout(attributes.required("H"), attributes.required("I"), attributes.required("bits_down"),
                           attributes.required("group_down"), false)),
      experts_(attributes.list("experts")),
      choice_(choose_kernels()) {
  if (experts_.empty()) throw Error("QExperts: the attribute experts names none");
  for (size_t e = 0; e < experts_.size(); ++e)
    if (experts_[e] < 0 || (e > 0 && experts_[e] <= experts_[e - 1]))
      throw Error("QExperts: the attribute experts must be ascending and not negative");
}

void Experts::run(const Call& call) const {
  const size_t n = experts_.size();
  const Tensor x = call.input(0), ids = call.input(1), weights = call.input(2);
  if (x.dims.size() != 2 || x.dims[1] != gate_up_.columns)
    throw Error("QExperts: x must be [T, " + std::to_string(gate_up_.columns) + "], not " + x.shape_text());
  const int64_t tokens = x.dims[0], width = down_.outputs();
  if (ids.dims.size() != 2 || ids.dims[0] != tokens || weights.dims != ids.dims)
    throw Error("QExperts: expert_ids and expert_weights must both be [" + std::to_string(tokens) + ", k], not " +
                ids.shape_text() + " and " + weights.shape_text());
  if (tokens > INT32_MAX) throw Error("QExperts: too many tokens");
  if (call.input_count() != 3 + 2 * n)
    throw Error("QExperts: " + std::to_string(n) + " experts need " + std::to_string(2 * n) + " packed weights, not " +
                std::to_string(call.input_count() - 3));
  const Tensor out = call.output(0, {tokens, width});
  std::vector<const uint8_t*> packed;
  for (size_t i = 0; i < 2 * n; ++i) {
    const Tensor weight = call.input(3 + i);
    check_packed(weight, i < n ? gate_up_ : down_, i < n ? "QExperts, gate_up" : "QExperts, down");
    packed.push_back(weight.as<uint8_t>());
  }

  thread_local Scratch scratch;
  Routes routes = group_routes(ids, weights, experts_, scratch);
  for (size_t e = 0; e < n; ++e) {
    routes.active[e].gate_up = packed[e];
    routes.active[e].down = packed[n + e];
  }
  const auto idle = [](const Active& a) { return a.count == 0; };
  routes.active.erase(std::remove_if(routes.active.begin(), routes.active.end(), idle), routes.active.end());
  if (routes.active.empty()) {
    std::fill_n(out.as<float>(), tokens * width, 0.0f);
    return;
  }
  float* hidden = scratch.hidden.take<float>(routes.total * down_.columns);
  for (Active& a : routes.active) {
    const Kernels* kernels = &choice_.at(a.count);
    a.in = {kernels, &gate_up_, {x.as<float>(), gate_up_.columns, routes.rows + a.first, a.count}, nullptr};
    a.inner = {kernels, &down_, {hidden + a.first * down_.columns, down_.columns, nullptr, a.count}, nullptr};
  }
  fill_all(call, routes.active, &Active::in, scratch.in);
  up_sweep(call, routes.active, gate_up_, routes.total, hidden);
  fill_all(call, routes.active, &Active::inner, scratch.inner);
  down_sweep(call, routes, down_, tokens, out.as<float>());
}

}  // namespace moiie

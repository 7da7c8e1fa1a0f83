#include "operators.h"
#include "panels.h"

namespace moiie {

Layout checked_layout(int64_t rows, int64_t columns, int64_t bits, int64_t group, bool paired) {
  constexpr int64_t kLargest = int64_t{1} << 31;
  if (rows < 1 || rows > kLargest || columns < 1 || columns > kLargest)
    throw Error("a weight of " + std::to_string(rows) + " x " + std::to_string(columns) + " cannot be");
  if (paired && rows % 2 != 0) throw Error("a weight of gate and up rows has an even number of rows, not " + std::to_string(rows));
  if (bits != 4 && bits != 8) throw Error("bits must be 4 or 8, not " + std::to_string(bits));
  if (group != 32 && group != 64 && group != 128) throw Error("the group must be 32, 64 or 128, not " + std::to_string(group));
  if (columns % group != 0)
    throw Error("rows of " + std::to_string(columns) + " columns cannot be cut into groups of " + std::to_string(group));
  Layout layout;
  layout.rows = rows;
  layout.columns = columns;
  layout.bits = static_cast<int>(bits);
  layout.group = group;
  layout.paired = paired;
  return layout;
}

void check_packed(const Tensor& packed, const Layout& layout, const char* what) {
  const int64_t wanted = static_cast<int64_t>(layout.bytes());
  if (packed.data == nullptr || !packed.has_dims({wanted}))
    throw Error(std::string(what) + ": packed weight must be [" + std::to_string(wanted) + "], not " + packed.shape_text());
}

struct Linear::Arguments {
  Tensor x, packed, bias, residual, y;
  int64_t rows = 0;
};

Linear::Linear(const Attributes& attributes)
    : layout_(checked_layout(attributes.required("N"), attributes.required("K"), attributes.required("bits"),
                             attributes.required("group"), attributes.optional("swiglu", 0) != 0)),
      choice_(choose_kernels()) {}

Linear::Arguments Linear::arguments(const Call& call) const {
  Arguments a;
  const size_t inputs = call.input_count();
  a.x = call.input(0);
  a.packed = call.input(1);
  if (inputs > 2) a.bias = call.input(2);
  if (inputs > 3) a.residual = call.input(3);
  if (a.x.dims.empty() || a.x.dims.back() != layout_.columns)
    throw Error("QLinear: x must be [.., " + std::to_string(layout_.columns) + "], not " + a.x.shape_text());
  check_packed(a.packed, layout_, "QLinear");
  if (a.bias.data != nullptr && !a.bias.has_dims({layout_.rows}))
    throw Error("QLinear: bias must be [" + std::to_string(layout_.rows) + "], not " + a.bias.shape_text());
  std::vector<int64_t> dims = a.x.dims;
  dims.back() = layout_.outputs();
  if (a.residual.data != nullptr && !a.residual.has_dims(dims))
    throw Error("QLinear: the residual does not have the shape of the result: " + a.residual.shape_text());
  a.y = call.output(0, dims);
  a.rows = a.x.elements() / layout_.columns;
  return a;
}

void Linear::run(const Call& call) const {
  const Arguments a = arguments(call);
  if (a.rows == 0) return;
  thread_local Buffer storage;
  Panels panels;
  panels.kernels = &choice_.at(a.rows);
  panels.layout = &layout_;
  panels.rows = {a.x.as<float>(), layout_.columns, nullptr, a.rows};
  panels.storage = storage.take<uint8_t>(static_cast<int64_t>(panels.bytes()));
  call.parallel(panels.count(), [&](int64_t panel) { panels.fill(panel); });
  const int64_t step = blocks_per_task(layout_, a.rows), blocks = layout_.blocks();
  call.parallel((blocks + step - 1) / step, [&](int64_t task) {
    float* sums = sums_buffer(std::min(a.rows, panels.kernels->max_rows));
    for (int64_t block = task * step; block < std::min(blocks, (task + 1) * step); ++block) {
      for (int64_t p = 0; p < panels.count(); ++p) {
        panels.block(p, a.packed.as<uint8_t>(), block, sums);
        store(a, *panels.kernels, block, panels.first_row(p), panels.rows_of(p), sums);
      }
    }
  });
}

// Sums of rows row .. row + rows - 1 with one block -> y, with bias, activation and residual.
void Linear::store(const Arguments& a, const Kernels& kernels, int64_t block, int64_t row, int64_t rows, float* sums) const {
  const int64_t width = layout_.outputs(), first = block * layout_.outputs_per_block();
  const int64_t count = std::min(layout_.outputs_per_block(), width - first);
  if (a.bias.data != nullptr) {
    const float* bias = a.bias.as<float>() + first;
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = sums + r * kBlockRows;
      for (int64_t i = 0; i < count; ++i) sum[i] += bias[i];
      for (int64_t i = 0; layout_.paired && i < count; ++i) sum[kHalf + i] += bias[width + i];
    }
  }
  float* y = a.y.as<float>() + row * width + first;
  if (layout_.paired)
    kernels.swiglu(sums, rows, count, y, width);
  else
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sums + r * kBlockRows, count, y + r * width);
  if (a.residual.data == nullptr) return;
  const float* residual = a.residual.as<float>() + row * width + first;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; ++i) y[r * width + i] += residual[r * width + i];
}

}  // namespace moiie

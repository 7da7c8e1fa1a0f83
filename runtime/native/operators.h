// The operators of domain "moiie.cpu". A kernel is made for each node and may run on several threads at once.
#pragma once

#include <vector>

#include "attention_tile.h"
#include "host.h"
#include "kernels.h"

namespace moiie {

// Reads and checks the attributes of a packed weight.
Layout checked_layout(int64_t rows, int64_t columns, int64_t bits, int64_t group, bool paired);

// Throws unless `packed` has exactly the bytes of the layout.
void check_packed(const Tensor& packed, const Layout& layout, const char* what);

// QLinear(x [.., K], packed [bytes], bias [N]?, residual [.., N]?) -> y [.., N]
// attributes N, K, bits 4|8, group 32|64|128, swiglu 0|1: with swiglu the N rows are [gate | up] and y [.., N / 2] is
// silu(gate) * up; a bias is added before, a residual after.
class Linear {
 public:
  explicit Linear(const Attributes& attributes);
  void run(const Call& call) const;

 private:
  struct Arguments;
  Arguments arguments(const Call& call) const;
  void store(const Arguments& arguments, const Kernels& kernels, int64_t block, int64_t row, int64_t rows, float* sums) const;
  Layout layout_;
  Choice choice_;
};

// QExperts(x [T, H], expert_ids [T, k] int32, expert_weights [T, k], packed gate_up of n experts.., packed down of n experts..)
// -> out [T, H]; attributes H, I, bits_gate_up, bits_down, group_gate_up, group_down, experts (ids of the n, ascending).
// A route to an id that is not among them adds nothing. Experts are added in ascending order, whatever the threads do.
class Experts {
 public:
  explicit Experts(const Attributes& attributes);
  void run(const Call& call) const;

 private:
  Layout gate_up_;
  Layout down_;
  std::vector<int64_t> experts_;
  Choice choice_;
};

// Route(x [T, H], gate [Gl, H], modality [T] int32?, vision gate [Gv, H]?) -> logits [T, E], expert_ids [T, k] int32,
// expert_weights [T, k]; attributes num_experts E, top_k k, language_experts (ids of the gate's rows), vision_experts.
// A token with modality 1 is routed by the vision gate. Logits of experts that a token may not reach are -inf; weights are
// the softmax over the k highest.
class Route {
 public:
  explicit Route(const Attributes& attributes);
  void run(const Call& call) const;

 private:
  void choose(const float* logits, int32_t* ids, float* weights) const;
  int64_t experts_;
  int64_t top_k_;
  std::vector<int64_t> groups_[2];  // language, vision
};

// Attend(qkv [B * T, (Hq + 2 Hkv) * D], keys [B, Hkv, S, D], values, past_lengths [B] int64, cosines [S, D / 2], sines)
// -> out [B * T, Hq * D], keys, values; attributes num_heads Hq, kv_num_heads Hkv, head_size D, local_window_size.
// Rotates queries and keys, writes keys and values of the T tokens of each row behind those it has, and attends: a token sees
// itself and what is before it, with a window W > 0 only the W nearest. AttendHalf is the same on float16 buffers.
struct AttendArguments;

class Attend {
 public:
  Attend(const Attributes& attributes, bool half);
  void run(const Call& call) const;

 private:
  AttendArguments arguments(const Call& call) const;
  void* updated(const Call& call, size_t output, const Tensor& past) const;
  void write(const AttendArguments& arguments, int64_t pair) const;
  void look(const AttendArguments& arguments, int64_t pair, int64_t first, int64_t count) const;
  int64_t heads_, key_heads_, size_, window_;
  bool half_;
  void (*attend_)(const attention::Tile& tile, bool half);
};

struct AttendFloat : Attend {
  explicit AttendFloat(const Attributes& attributes) : Attend(attributes, false) {}
};

struct AttendHalf : Attend {
  explicit AttendHalf(const Attributes& attributes) : Attend(attributes, true) {}
};

}  // namespace moiie

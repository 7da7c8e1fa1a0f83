// ExpertDispatch, QuantizedExpertDispatch and Fp8ExpertDispatch: each token through its experts, weighted and summed.
//
// A bank holds the experts that the attribute `experts` names, ascending; a route to another id adds nothing, so a layer
// may be several nodes whose outputs are added. Ids are below 64, which lets kernels find an expert's place in its bank by
// counting the bits of one integer.

#include "../refusal.h"
#include "ops.h"

namespace moiie {
namespace {

constexpr int64_t kMaxExperts = 64;

void read_experts(Fields const& fields, Values& symbols) {
    std::vector<int64_t> const& experts = fields.list("experts");
    uint64_t bits = 0;
    int64_t last = -1;
    for (int64_t const id : experts) {
        if (id <= last || id >= kMaxExperts) {
            throw Refusal(text("attribute 'experts' names ", id, last < 0 ? "" : text(" after ", last),
                               "; ids ascend and lie between 0 and ", kMaxExperts - 1));
        }
        bits |= uint64_t{1} << id;
        last = id;
    }
    if (experts.empty()) {
        throw Refusal("attribute 'experts' names no expert");
    }
    symbols["n"] = static_cast<int64_t>(experts.size());
    symbols["experts"] = static_cast<int64_t>(bits);
}

void read_quantization(Fields const& fields, Values& symbols) {
    read_experts(fields, symbols);
    int64_t const bits = fields.whole("bits");
    int64_t const group = fields.whole("group_size");
    if (bits != 4 && bits != 8) {
        throw Refusal(text("attribute 'bits' is ", bits, "; expected 4 or 8"));
    }
    if (group != 32 && group != 64 && group != 128) {
        throw Refusal(text("attribute 'group_size' is ", group, "; expected 32, 64 or 128"));
    }
    symbols["values_per_byte"] = 8 / bits;
    symbols["group_size"] = group;
    symbols["group_shift"] = group == 32 ? 5 : group == 64 ? 6 : 7;
}

void count_routes(Values& symbols) {
    if (symbols.count("T") != 0 && symbols.count("top_k") != 0) {
        symbols["routes"] = value_of(symbols, "T") * value_of(symbols, "top_k");
    }
}

std::string float_format(Values const&, DataType type) { return type_name(type); }

std::string integer_format(Values const& symbols, DataType) {
    return value_of(symbols, "values_per_byte") == 2 ? "int4" : "int8";
}

std::string fp8_format(Values const&, DataType) { return "fp8"; }

}  // namespace

Op const kExpertDispatch = [] {
    Op op;
    op.name = "ExpertDispatch";
    op.fields = {{"experts", true, false, true, 0}};
    op.inputs = {
        {"hidden", parse_shape("T, H"), {DataType::kHALF, DataType::kBF16}},
        {"expert_ids", parse_shape("T, top_k"), {DataType::kINT32}},
        {"expert_weights", parse_shape("T, top_k"), {DataType::kFLOAT}},
        {"gate_up", parse_shape("n, 2*I, H"), {}},
        {"down", parse_shape("n, H, I"), {}},
    };
    op.outputs = {{"out", parse_shape("T, H"), {}}};
    op.from_fields = read_experts;
    op.from_shapes = count_routes;
    op.weights = float_format;
    return op;
}();

Op const kQuantizedExpertDispatch = [] {
    Op op;
    op.name = "QuantizedExpertDispatch";
    op.fields = {{"experts", true, false, true, 0}, {"bits", false, false, true, 0}, {"group_size", false, false, true, 0}};
    op.inputs = {
        {"hidden", parse_shape("T, H"), {DataType::kHALF, DataType::kBF16}},
        {"expert_ids", parse_shape("T, top_k"), {DataType::kINT32}},
        {"expert_weights", parse_shape("T, top_k"), {DataType::kFLOAT}},
        {"gate_up", parse_shape("n, 2*I, H/values_per_byte"), {DataType::kINT8}},
        {"down", parse_shape("n, H, I/values_per_byte"), {DataType::kINT8}},
        {"gate_up_scales", parse_shape("n, 2*I, H/group_size"), {DataType::kHALF}},
        {"down_scales", parse_shape("n, H, I/group_size"), {DataType::kHALF}},
    };
    op.outputs = {{"out", parse_shape("T, H"), {}}};
    op.from_fields = read_quantization;
    op.from_shapes = count_routes;
    op.weights = integer_format;
    return op;
}();

Op const kFp8ExpertDispatch = [] {
    Op op;
    op.name = "Fp8ExpertDispatch";
    op.fields = {{"experts", true, false, true, 0}};
    op.inputs = {
        {"hidden", parse_shape("T, H"), {DataType::kHALF, DataType::kBF16}},
        {"expert_ids", parse_shape("T, top_k"), {DataType::kINT32}},
        {"expert_weights", parse_shape("T, top_k"), {DataType::kFLOAT}},
        {"gate_up", parse_shape("n, 2*I, H"), {DataType::kFP8}},
        {"down", parse_shape("n, H, I"), {DataType::kFP8}},
        {"gate_up_scales", parse_shape("n, 2*I"), {DataType::kFLOAT}},
        {"down_scales", parse_shape("n, H"), {DataType::kFLOAT}},
    };
    op.outputs = {{"out", parse_shape("T, H"), {}}};
    op.from_fields = read_experts;
    op.from_shapes = count_routes;
    op.weights = fp8_format;
    return op;
}();

}  // namespace moiie

// DecodeAttention: a few new tokens over the keys and values that a static buffer holds (grouped heads, sliding window).

#include <cmath>

#include "../refusal.h"
#include "ops.h"

namespace moiie {
namespace {

constexpr int64_t kLargestHeadSize = 128;

void read_window(Fields const& fields, Values& symbols) {
    if (fields.whole("window") < 0) {
        throw Refusal(text("attribute 'window' is ", fields.whole("window"), "; expected 0 (none) or a number of keys"));
    }
    if (fields.real("scale") < 0) {
        throw Refusal(text("attribute 'scale' is ", fields.real("scale"), "; expected 0 (1/sqrt of the head size) or more"));
    }
    symbols["window"] = fields.whole("window");
}

void count_heads(Values& symbols) {
    if (symbols.count("D") != 0 && value_of(symbols, "D") > kLargestHeadSize) {
        throw Refusal(text("input 0 (query) has heads of ", value_of(symbols, "D"), " values; the kernels take up to ",
                           kLargestHeadSize));
    }
    for (char const* name : {"B", "Q", "G", "T"}) {
        if (symbols.count(name) == 0) {
            return;
        }
    }
    int64_t const batch = value_of(symbols, "B");
    int64_t const queries = value_of(symbols, "Q");
    int64_t const keys = value_of(symbols, "G");
    int64_t const tokens = value_of(symbols, "T");
    if (keys == 0 || queries % keys != 0) {
        throw Refusal(text("input 0 (query) has ", queries, " heads, no multiple of the ", keys, " of input 1 (key)"));
    }
    symbols["heads"] = batch * keys;
    symbols["shared"] = queries / keys * tokens;
    symbols["out_rows"] = batch * queries * tokens;
}

void scale_scores(Fields const& fields, Values const& symbols, std::map<std::string, float>& reals) {
    double const given = fields.real("scale");
    double const usual = 1.0 / std::sqrt(static_cast<double>(value_of(symbols, "D")));
    reals["scale"] = static_cast<float>(given == 0.0 ? usual : given);
}

}  // namespace

Op const kDecodeAttention = [] {
    Op op;
    op.name = "DecodeAttention";
    op.fields = {{"window", false, false, false, 0}, {"scale", false, true, false, 0}};
    op.inputs = {
        {"query", parse_shape("B, Q, T, D"), {DataType::kHALF}},
        {"key", parse_shape("B, G, S, D"), {}},
        {"value", parse_shape("B, G, S, D"), {}},
        {"past_lengths", parse_shape("B"), {DataType::kINT32}},
    };
    op.outputs = {{"out", parse_shape("B, Q, T, D"), {}}};
    op.from_fields = read_window;
    op.from_shapes = count_heads;
    op.reals = scale_scores;
    return op;
}();

}  // namespace moiie

// KVCacheUpdate: new keys or values written into a static buffer, in place.

#include "../refusal.h"
#include "ops.h"

namespace moiie {
namespace {

void count_rows(Values& symbols) {
    for (char const* name : {"B", "G", "T", "S"}) {
        if (symbols.count(name) == 0) {
            return;
        }
    }
    int64_t const tokens = value_of(symbols, "T");
    int64_t const slots = value_of(symbols, "S");
    if (tokens > slots) {
        throw Refusal(text("input 1 (update) holds ", tokens, " tokens, more than the ", slots, " slots of input 0 (cache)"));
    }
    symbols["rows"] = value_of(symbols, "B") * value_of(symbols, "G") * tokens;
}

}  // namespace

Op const kKVCacheUpdate = [] {
    Op op;
    op.name = "KVCacheUpdate";
    op.inputs = {
        {"cache", parse_shape("B, G, S, D"), {DataType::kHALF}},
        {"update", parse_shape("B, G, T, D"), {}},
        {"past_lengths", parse_shape("B"), {DataType::kINT32}},
    };
    op.outputs = {{"cache", parse_shape("B, G, S, D"), {}}};
    op.aliased_input = 0;
    op.from_shapes = count_rows;
    return op;
}();

}  // namespace moiie

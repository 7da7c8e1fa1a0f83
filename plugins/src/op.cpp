#include "op.h"

#include <algorithm>

#include "refusal.h"

namespace moiie {
namespace {

Tensor const& tensor_at(Op const& op, size_t position) {
    return position < op.inputs.size() ? op.inputs[position] : op.outputs.at(position - op.inputs.size());
}

std::string allowed_text(std::vector<DataType> const& types) {
    std::string list;
    for (size_t i = 0; i < types.size(); ++i) {
        list += text(i == 0 ? "" : i + 1 == types.size() ? " or " : ", ", type_name(types[i]));
    }
    return list;
}

}  // namespace

std::string Op::input_text(size_t index) const { return text("input ", index, " (", inputs.at(index).name, ")"); }

Values shape_symbols(Op const& op, Fields const& fields, std::vector<Dims> const& inputs) {
    if (inputs.size() != op.inputs.size()) {
        throw Refusal(text("the node has ", inputs.size(), " inputs; expected ", op.inputs.size()));
    }
    Values symbols;
    if (op.from_fields != nullptr) {
        op.from_fields(fields, symbols);
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
        match_shape(op.input_text(i), op.inputs[i].shape, inputs[i], symbols);
    }
    if (op.from_shapes != nullptr) {
        op.from_shapes(symbols);
    }
    return symbols;
}

bool type_allowed(Op const& op, size_t position, DataType type, DataType first) {
    std::vector<DataType> const& types = tensor_at(op, position).types;
    return types.empty() ? type == first : std::find(types.begin(), types.end(), type) != types.end();
}

void check_types(Op const& op, DataType const* types, size_t count) {
    if (count != op.inputs.size()) {
        throw Refusal(text("the node has ", count, " inputs; expected ", op.inputs.size()));
    }
    for (size_t i = 0; i < count; ++i) {
        if (!type_allowed(op, i, types[i], types[0])) {
            std::vector<DataType> const& allowed = op.inputs[i].types;
            throw Refusal(text(op.input_text(i), " is ", type_name(types[i]), "; expected ",
                               allowed.empty() ? text(type_name(types[0]), ", as input 0") : allowed_text(allowed)));
        }
    }
}

}  // namespace moiie

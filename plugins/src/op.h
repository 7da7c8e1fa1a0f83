// What an op is to TensorRT: its attributes, tensors and symbols, as one row of a table. Everything else - creators,
// shapes, formats, workspace, launches - follows from the row and the launch table.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "fields.h"
#include "shape.h"
#include "tensorrt.h"
#include "values.h"

namespace moiie {

inline constexpr char const* kPluginVersion = "1";

struct Tensor {
    std::string name;
    Shape shape;
    std::vector<DataType> types;  // allowed; empty: that of input 0
};

struct Op {
    char const* name;
    std::vector<FieldRule> fields;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    // Output 0 is this input, updated in place; -1: no output is.
    int32_t aliased_input = -1;
    // Checks the attributes and defines the symbols that follow from them alone; may be null.
    void (*from_fields)(Fields const& fields, Values& symbols) = nullptr;
    // Checks the shapes and defines the symbols that follow from them; may be null.
    void (*from_shapes)(Values& symbols) = nullptr;
    // Name of the weights' format in the launch table, given the attributes and the type of input 0; null: "".
    std::string (*weights)(Values const& symbols, DataType type) = nullptr;
    // Defines the kernel arguments that are real numbers, such as a softmax scale; may be null.
    void (*reals)(Fields const& fields, Values const& symbols, std::map<std::string, float>& reals) = nullptr;

    // "input 3 (gate_up)"
    std::string input_text(size_t index) const;
};

// Symbols of the tensors' shapes, dims -1 where not known yet (those symbols are then missing).
// Throws Refusal naming the first tensor and axis that does not fit.
Values shape_symbols(Op const& op, Fields const& fields, std::vector<Dims> const& inputs);

// Whether a tensor of the op (inputs first, then outputs) may have that type, input 0 having `first`.
bool type_allowed(Op const& op, size_t position, DataType type, DataType first);

// Checks the types of all inputs.
// Throws Refusal naming the tensor, what it may be and what it is.
void check_types(Op const& op, DataType const* types, size_t count);

}  // namespace moiie

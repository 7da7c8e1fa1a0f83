#include "output_shapes.h"

#include "refusal.h"

namespace moiie {
namespace {

using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;

// The input axis that is just that symbol.
IDimensionExpr const& axis_called(Op const& op, std::string const& name, DimsExprs const* inputs) {
    for (size_t input = 0; input < op.inputs.size(); ++input) {
        Shape const& shape = op.inputs[input].shape;
        for (size_t i = 0; i < shape.size(); ++i) {
            if (shape[i].text == name) {
                return *inputs[input].d[i];
            }
        }
    }
    throw Refusal(text("no axis of an input is '", name, "' (a fault in the op's table)"));
}

}  // namespace

std::vector<Dims> known_dims(DimsExprs const* inputs, int32_t count) {
    std::vector<Dims> result;
    for (int32_t i = 0; i < count; ++i) {
        Dims dims{};
        dims.nbDims = inputs[i].nbDims;
        for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
            IDimensionExpr const& length = *inputs[i].d[axis];
            dims.d[axis] = length.isConstant() ? length.getConstantValue() : -1;
        }
        result.push_back(dims);
    }
    return result;
}

DimsExprs output_shape(Op const& op, size_t index, DimsExprs const* inputs, nvinfer1::IExprBuilder& builder) {
    DimsExprs result{};
    Shape const& shape = op.outputs[index].shape;
    result.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) {
        IDimensionExpr const* length = nullptr;
        for (std::string const& name : shape[i].names) {
            IDimensionExpr const& next = axis_called(op, name, inputs);
            length = length == nullptr ? &next
                                       : builder.operation(nvinfer1::DimensionOperation::kPROD, *length, next);
        }
        result.d[i] = length == nullptr ? builder.constant(shape[i].factor) : length;
    }
    return result;
}

}  // namespace moiie

// Output shapes as expressions of input shapes, for networks whose lengths are known only at run time.
#pragma once

#include <vector>

#include "op.h"

namespace moiie {

// Lengths of the inputs' axes, -1 where TensorRT knows them only at run time.
std::vector<Dims> known_dims(nvinfer1::DimsExprs const* inputs, int32_t count);

// The shape of output `index`.
// Throws Refusal when the table's row does not say it in terms of the inputs' axes.
nvinfer1::DimsExprs output_shape(Op const& op, size_t index, nvinfer1::DimsExprs const* inputs,
                                 nvinfer1::IExprBuilder& builder);

}  // namespace moiie

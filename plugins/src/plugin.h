// A node of an engine: any op of the table as a TensorRT plugin.
#pragma once

#include "op.h"
#include "tensorrt.h"

namespace moiie {

// A new plugin, owned by the caller.
// Throws Refusal when the attributes do not suit the op.
nvinfer1::IPluginV3* make_plugin(Op const& op, nvinfer1::PluginFieldCollection const& attributes);

}  // namespace moiie

// What TensorRT's plugin registry holds: a maker of plugins for each op of the table.
#pragma once

#include <vector>

#include "op.h"

namespace moiie {

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(Op const& op);

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* attributes,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &names_; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

private:
    Op const& op_;
    std::vector<nvinfer1::PluginField> entries_;
    nvinfer1::PluginFieldCollection names_{};
};

}  // namespace moiie

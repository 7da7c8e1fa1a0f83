#include "creator.h"

#include "plugin.h"
#include "refusal.h"

namespace moiie {

Creator::Creator(Op const& op) : op_(op) {
    for (FieldRule const& rule : op.fields) {
        auto const type = rule.is_real ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32;
        entries_.emplace_back(rule.name, nullptr, type, rule.is_list ? 0 : 1);
    }
    names_.nbFields = static_cast<int32_t>(entries_.size());
    names_.fields = entries_.data();
}

nvinfer1::IPluginV3* Creator::createPlugin(nvinfer1::AsciiChar const* name,
                                           nvinfer1::PluginFieldCollection const* attributes,
                                           nvinfer1::TensorRTPhase) noexcept {
    std::string who = op_.name;
    if (name != nullptr && name[0] != '\0') {
        who += text(" '", name, "'");
    }
    return guarded<nvinfer1::IPluginV3*>(who, nullptr, [&] {
        static nvinfer1::PluginFieldCollection const none{};
        return make_plugin(op_, attributes == nullptr ? none : *attributes);
    });
}

}  // namespace moiie

#include "plugin.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "driver.h"
#include "output_shapes.h"
#include "plan.h"
#include "refusal.h"
#include "reserved.h"

namespace moiie {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = -1;

std::vector<Dims> dims_of(PluginTensorDesc const* tensors, int32_t count) {
    std::vector<Dims> result;
    for (int32_t i = 0; i < count; ++i) {
        result.push_back(tensors[i].dims);
    }
    return result;
}

// Whether a bound of a profile says something: TensorRT 10.3 leaves those that it does not know empty.
bool is_given(Dims const& bound, Dims const& declared) {
    return bound.nbDims == declared.nbDims &&
           std::any_of(bound.d, bound.d + bound.nbDims, [](int64_t length) { return length != 0; });
}

// The dims of the network, or a bound of the profile where there is one.
std::vector<Dims> dims_of(DynamicPluginTensorDesc const* tensors, int32_t count, Dims DynamicPluginTensorDesc::*bound) {
    std::vector<Dims> result;
    for (int32_t i = 0; i < count; ++i) {
        Dims const& declared = tensors[i].desc.dims;
        result.push_back(bound != nullptr && is_given(tensors[i].*bound, declared) ? tensors[i].*bound : declared);
    }
    return result;
}

// Throws Refusal where a length is not known: without the largest shapes there is no size of the workspace.
void check_known(Op const& op, std::vector<Dims> const& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
        int64_t const* const end = inputs[i].d + inputs[i].nbDims;
        if (std::find(inputs[i].d, end, -1) != end) {
            throw Refusal(text(op.input_text(i), " has the shape ", dims_text(inputs[i]),
                               ", and the profile says no largest one to size the workspace for"));
        }
    }
}

// What both kinds of plugin share: everything but the base class that tells TensorRT of updates in place.
template <typename Build>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public Build,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin(Op const& op, Fields const& fields, Reserved const& reserved)
        : op_(op), fields_(fields), reserved_(reserved) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<Build*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded<nvinfer1::IPluginV3*>(op_.name, nullptr, [&] { return new Plugin(op_, fields_, reserved_); });
    }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(op_.outputs.size()); }

    int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                               int32_t input_count) const noexcept override {
        return guarded(op_.name, kFailed, [&] {
            check_types(op_, inputs, static_cast<size_t>(input_count));
            std::fill_n(outputs, output_count, inputs[0]);
            return kOk;
        });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& builder) noexcept override {
        return guarded(op_.name, kFailed, [&] {
            shape_symbols(op_, fields_, known_dims(inputs, input_count));
            for (size_t i = 0; i < op_.outputs.size(); ++i) {
                outputs[i] = output_shape(op_, i, inputs, builder);
            }
            return kOk;
        });
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override {
        return guarded(op_.name, false, [&] {
            PluginTensorDesc const& tensor = tensors[position].desc;
            return static_cast<size_t>(input_count) == op_.inputs.size() && output_count == getNbOutputs() &&
                   tensor.format == nvinfer1::TensorFormat::kLINEAR &&
                   type_allowed(op_, static_cast<size_t>(position), tensor.type, tensors[0].desc.type);
        });
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return guarded(op_.name, kFailed, [&] {
            Dims DynamicPluginTensorDesc::*const all[] = {nullptr, &DynamicPluginTensorDesc::min,
                                                          &DynamicPluginTensorDesc::max};
            for (auto const bound : all) {
                Values const symbols = shape_symbols(op_, fields_, dims_of(inputs, count, bound));
                choose_plan(variant_of(op_, symbols, inputs[0].desc.type), symbols);
            }
            return kOk;
        });
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        // TensorRT knows no refusal here: after one it reserves nothing, whoever builds the engine is to ask for the
        // errors (moiieTakeErrors), and `enqueue` refuses.
        size_t const bytes = guarded(op_.name, size_t{0}, [&] {
            std::vector<Dims> const largest = dims_of(inputs, count, &DynamicPluginTensorDesc::max);
            check_known(op_, largest);
            Values const most = shape_symbols(op_, fields_, largest);
            return workspace_bytes(variant_of(op_, most, inputs[0].desc.type), most);
        });
        reserved_.ask(static_cast<int64_t>(bytes));
        return bytes;
    }

    // Of IPluginV3OneBuildV2 only; elsewhere a function that nobody calls.
    int32_t getAliasedInput(int32_t output) noexcept { return output == 0 ? op_.aliased_input : -1; }

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return guarded(op_.name, kFailed, [&] {
            Plan const& plan = plan_for(inputs, count, nullptr);
            if (has_context()) {
                load(plan);
            }
            return kOk;
        });
    }

    int32_t enqueue(PluginTensorDesc const* input_tensors, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return guarded(op_.name, kFailed, [&] {
            Launching what;
            Plan const& plan = plan_for(input_tensors, static_cast<int32_t>(op_.inputs.size()), &what.symbols);
            if (op_.aliased_input >= 0 && inputs[op_.aliased_input] != outputs[0]) {
                copy_input(input_tensors[op_.aliased_input], inputs[op_.aliased_input], outputs[0], stream);
            }
            bind(what, inputs, outputs);
            run(plan, std::move(what), workspace, reserved_, stream);
            return kOk;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        return guarded<nvinfer1::PluginFieldCollection const*>(op_.name, nullptr, [&] {
            if (reserved_.known()) {
                fields_.set_whole(kWorkspaceField, reserved_.bytes());
            }
            return fields_.collection();
        });
    }

private:
    Plan const& plan_for(PluginTensorDesc const* inputs, int32_t count, Values* symbols) const {
        std::vector<DataType> types;
        for (int32_t i = 0; i < count; ++i) {
            types.push_back(inputs[i].type);
        }
        check_types(op_, types.data(), types.size());
        Values values = shape_symbols(op_, fields_, dims_of(inputs, count));
        Plan const& plan = choose_plan(variant_of(op_, values, types[0]), values);
        if (symbols != nullptr) {
            *symbols = std::move(values);
        }
        return plan;
    }

    void bind(Launching& what, void const* const* inputs, void* const* outputs) const {
        for (size_t i = 0; i < op_.inputs.size(); ++i) {
            // The driver API takes one kind of pointer for what is read and what is written.
            what.pointers[op_.inputs[i].name] = const_cast<void*>(inputs[i]);
        }
        for (size_t i = 0; i < op_.outputs.size(); ++i) {
            what.pointers[op_.outputs[i].name] = outputs[i];
        }
        if (op_.reals != nullptr) {
            op_.reals(fields_, what.symbols, what.reals);
        }
    }

    static void copy_input(PluginTensorDesc const& tensor, void const* from, void* to, cudaStream_t stream) {
        int64_t elements = 1;
        for (int32_t i = 0; i < tensor.dims.nbDims; ++i) {
            elements *= tensor.dims.d[i];
        }
        copy_on_device(to, from, static_cast<size_t>(elements) * type_bytes(tensor.type), stream);
    }

    Op const& op_;
    Fields fields_;
    Reserved reserved_;
};

}  // namespace

nvinfer1::IPluginV3* make_plugin(Op const& op, nvinfer1::PluginFieldCollection const& attributes) {
    Fields const fields(op.fields, attributes);
    Values symbols;
    if (op.from_fields != nullptr) {
        op.from_fields(fields, symbols);
    }
    Reserved const reserved = fields.has(kWorkspaceField) ? Reserved(fields.whole(kWorkspaceField)) : Reserved();
    if (op.aliased_input >= 0) {
        return new Plugin<nvinfer1::IPluginV3OneBuildV2>(op, fields, reserved);
    }
    return new Plugin<nvinfer1::IPluginV3OneBuild>(op, fields, reserved);
}

}  // namespace moiie

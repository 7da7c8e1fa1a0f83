// Drives a plugin library as TensorRT does, without TensorRT: reads commands from standard input, answers on standard
// output, a line each. Tensors lie in a file that is mapped into memory, where the test prepares and examines them.
//   library PATH                      load it; prints its creators
//   arena PATH BYTES                  map the file; prints its address
//   field NAME int32|int64|float32 N V...    an attribute of the node to come
//   input|output TYPE N D... OFFSET [max D...]   a tensor of the node to come
//   profile given|empty|zeros         what the next builds are told of the bounds of shapes
//   build OP                          create, negotiate, configure; prints workspace and output shapes
//   without NAME                      what the next engines do not keep: a field that older ones lack
//   run WORKSPACE_OFFSET              serialise, create for run time, attach, shape change, enqueue
//   cycles OP COUNT                   create, clone, serialise, create again, destroy
//   formats OP                        for every tensor the types that the plugin takes
//   clear                             forget fields and tensors

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "fakes.h"
#include "given.h"

namespace {

struct State {
    std::vector<IPluginCreatorV3One*> creators;
    char* arena = nullptr;
    std::vector<Field> fields;
    std::vector<Given> inputs;
    std::vector<Given> outputs;
    std::string profile = "given";
    std::string without;
    std::unique_ptr<IPluginV3> plugin;
} state;

Finder finder;

template <typename Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

std::unique_ptr<IPluginV3> create(std::string const& name, PluginFieldCollection const& fields, TensorRTPhase phase) {
    for (IPluginCreatorV3One* const creator : state.creators) {
        if (name == creator->getPluginName()) {
            return std::unique_ptr<IPluginV3>(creator->createPlugin("node", &fields, phase));
        }
    }
    std::cout << "error no op " << name << std::endl;
    return nullptr;
}

std::unique_ptr<IPluginV3> create(std::string const& name) {
    std::vector<PluginField> entries;
    for (Field const& field : state.fields) {
        entries.emplace_back(field.name.c_str(), field.bytes.data(), field.type, field.count);
    }
    PluginFieldCollection const all{static_cast<int32_t>(entries.size()), entries.data()};
    return create(name, all, TensorRTPhase::kBUILD);
}

// What an engine keeps, read back as TensorRT does: the copy owns nothing of the plugin it came from.
std::unique_ptr<IPluginV3> reload(std::unique_ptr<IPluginV3> plugin) {
    std::string const name = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE)->getPluginName();
    auto* const runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    PluginFieldCollection const* const kept = runtime->getFieldsToSerialize();
    std::deque<Field> copies;
    std::vector<PluginField> entries;
    for (int32_t i = 0; i < kept->nbFields; ++i) {
        PluginField const& field = kept->fields[i];
        if (state.without == field.name) {
            continue;
        }
        auto const* const data = static_cast<char const*>(field.data);
        copies.push_back({field.name, field.type, field.length, {data, data + field.length * 8}});  // 64-bit kinds only
        Field const& copy = copies.back();
        entries.emplace_back(copy.name.c_str(), copy.bytes.data(), copy.type, copy.count);
    }
    plugin.reset();
    PluginFieldCollection const all{static_cast<int32_t>(entries.size()), entries.data()};
    return create(name, all, TensorRTPhase::kRUNTIME);
}

std::vector<DynamicPluginTensorDesc> bounds(std::vector<Given> const& tensors) {
    std::vector<DynamicPluginTensorDesc> result;
    for (Given const& each : tensors) {
        DynamicPluginTensorDesc tensor{each.now, each.now.dims, each.most, each.now.dims};
        for (int32_t i = 0; i < tensor.desc.dims.nbDims; ++i) {
            if (each.now.dims.d[i] != each.most.d[i]) {
                tensor.desc.dims.d[i] = -1;
            }
        }
        tensor.opt = Dims{};  // TensorRT 10.3 leaves it empty
        if (state.profile != "given") {
            tensor.min = tensor.max = Dims{};
        }
        if (state.profile == "zeros") {
            tensor.min.nbDims = tensor.opt.nbDims = tensor.max.nbDims = tensor.desc.dims.nbDims;
        }
        result.push_back(tensor);
    }
    return result;
}

bool infer(IPluginV3OneBuild& build) {
    std::vector<DataType> types;
    std::vector<DataType> produced(state.outputs.size());
    Lengths lengths;
    std::vector<DimsExprs> shapes;
    for (Given const& each : state.inputs) {
        types.push_back(each.now.type);
        DimsExprs shape{};
        shape.nbDims = each.now.dims.nbDims;
        for (int32_t i = 0; i < shape.nbDims; ++i) {
            shape.d[i] = lengths.make(each.now.dims.d[i], each.now.dims.d[i] == each.most.d[i]);
        }
        shapes.push_back(shape);
    }
    auto const inputs = static_cast<int32_t>(types.size());
    auto const outputs = static_cast<int32_t>(produced.size());
    std::vector<DimsExprs> results(produced.size());
    if (build.getOutputDataTypes(produced.data(), outputs, types.data(), inputs) != 0 ||
        build.getOutputShapes(shapes.data(), inputs, nullptr, 0, results.data(), outputs, lengths) != 0) {
        return false;
    }
    for (size_t i = 0; i < results.size(); ++i) {
        std::cout << "shape " << static_cast<int>(produced[i]);
        for (int32_t axis = 0; axis < results[i].nbDims; ++axis) {
            std::cout << ' ' << static_cast<Length const*>(results[i].d[axis])->value();
        }
        std::cout << std::endl;
    }
    return true;
}

bool build(std::string const& name) {
    state.plugin = create(name);
    if (state.plugin == nullptr) {
        return false;
    }
    auto* const build = capability<IPluginV3OneBuild>(*state.plugin, PluginCapabilityType::kBUILD);
    if (build->getNbOutputs() != static_cast<int32_t>(state.outputs.size()) || !infer(*build)) {
        return false;
    }
    auto inputs = bounds(state.inputs);
    auto outputs = bounds(state.outputs);
    auto const input_count = static_cast<int32_t>(inputs.size());
    auto const output_count = static_cast<int32_t>(outputs.size());
    auto all = inputs;
    all.insert(all.end(), outputs.begin(), outputs.end());
    for (int32_t i = 0; i < input_count + output_count; ++i) {
        if (!build->supportsFormatCombination(i, all.data(), input_count, output_count)) {
            std::cout << "unsupported " << i << std::endl;
            return false;
        }
    }
    if (build->configurePlugin(inputs.data(), input_count, outputs.data(), output_count) != 0) {
        return false;
    }
    std::cout << "interface " << build->getInterfaceInfo().major;
    if (build->getInterfaceInfo().major == 2) {
        std::cout << " alias " << static_cast<IPluginV3OneBuildV2*>(build)->getAliasedInput(0);
    }
    std::cout << std::endl;
    // Asked of a clone: TensorRT need not ask the plugin that it writes into the engine.
    std::unique_ptr<IPluginV3> const clone(state.plugin->clone());
    size_t const workspace = capability<IPluginV3OneBuild>(*clone, PluginCapabilityType::kBUILD)
                                 ->getWorkspaceSize(inputs.data(), input_count, outputs.data(), output_count);
    std::cout << "workspace " << workspace << std::endl;
    return true;
}

bool run(size_t workspace) {
    state.plugin = reload(std::move(state.plugin));
    if (state.plugin == nullptr) {
        return false;
    }
    std::vector<PluginTensorDesc> tensors[2];
    std::vector<void*> pointers[2];
    for (int side = 0; side < 2; ++side) {
        for (Given const& each : side == 0 ? state.inputs : state.outputs) {
            tensors[side].push_back(each.now);
            pointers[side].push_back(state.arena + each.offset);
        }
    }
    auto* const parent = capability<IPluginV3OneRuntime>(*state.plugin, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> const attached(parent->attachToContext(nullptr));
    auto* const runtime = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
    return runtime->onShapeChange(tensors[0].data(), static_cast<int32_t>(tensors[0].size()), tensors[1].data(),
                                  static_cast<int32_t>(tensors[1].size())) == 0 &&
           runtime->enqueue(tensors[0].data(), tensors[1].data(), pointers[0].data(), pointers[1].data(),
                            state.arena + workspace, nullptr) == 0;
}

bool cycles(std::string const& name, int count) {
    for (int i = 0; i < count; ++i) {
        auto first = create(name);
        if (first == nullptr) {
            return false;
        }
        std::unique_ptr<IPluginV3> second(first->clone());
        first.reset();
        auto third = reload(std::move(second));
        if (third == nullptr) {
            return false;
        }
        auto* const runtime = capability<IPluginV3OneRuntime>(*third, PluginCapabilityType::kRUNTIME);
        std::unique_ptr<IPluginV3> const attached(runtime->attachToContext(nullptr));
        runtime->getFieldsToSerialize();
        runtime->getFieldsToSerialize();
    }
    return true;
}

bool formats(std::string const& name) {
    auto const plugin = create(name);
    if (plugin == nullptr) {
        return false;
    }
    auto* const build = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
    auto all = bounds(state.inputs);
    auto const outputs = bounds(state.outputs);
    all.insert(all.end(), outputs.begin(), outputs.end());
    for (size_t i = 0; i < all.size(); ++i) {
        auto const declared = all[i].desc;
        std::cout << "types " << i;
        for (int type = 0; type <= static_cast<int>(DataType::kINT4); ++type) {
            all[i].desc.type = static_cast<DataType>(type);
            if (build->supportsFormatCombination(static_cast<int32_t>(i), all.data(),
                                                 static_cast<int32_t>(state.inputs.size()),
                                                 static_cast<int32_t>(state.outputs.size()))) {
                std::cout << ' ' << type;
            }
        }
        all[i].desc = declared;
        all[i].desc.format = TensorFormat::kCHW32;
        std::cout << (build->supportsFormatCombination(static_cast<int32_t>(i), all.data(),
                                                       static_cast<int32_t>(state.inputs.size()),
                                                       static_cast<int32_t>(state.outputs.size()))
                          ? " vectorised"
                          : "")
                  << std::endl;
        all[i].desc = declared;
    }
    return true;
}

bool load(std::string const& path) {
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        std::cout << "error " << dlerror() << std::endl;
        return false;
    }
    auto const creators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    auto const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    set_finder(&finder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = creators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
        state.creators.push_back(creator);
        std::cout << "creator " << creator->getInterfaceInfo().kind << '|' << creator->getPluginName() << '|'
                  << creator->getPluginVersion() << '|' << creator->getPluginNamespace();
        PluginFieldCollection const* const names = creator->getFieldNames();
        for (int32_t field = 0; field < names->nbFields; ++field) {
            std::cout << '|' << names->fields[field].name;
        }
        std::cout << std::endl;
    }
    return true;
}

bool map(std::string const& path, size_t bytes) {
    int const file = open(path.c_str(), O_RDWR);
    void* const address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (address == MAP_FAILED) {
        return false;
    }
    state.arena = static_cast<char*>(address);
    std::cout << "arena " << reinterpret_cast<uintptr_t>(address) << std::endl;
    return true;
}

bool execute(std::istream& in) {
    std::string verb;
    std::string name;
    size_t number = 0;
    in >> verb;
    if (verb == "library") {
        return in >> name && load(name);
    } else if (verb == "arena") {
        return in >> name >> number && map(name, number);
    } else if (verb == "field") {
        state.fields.push_back(read_field(in));
    } else if (verb == "input") {
        state.inputs.push_back(read_tensor(in));
    } else if (verb == "output") {
        state.outputs.push_back(read_tensor(in));
    } else if (verb == "profile") {
        in >> state.profile;
    } else if (verb == "without") {
        in >> state.without;
    } else if (verb == "build") {
        return in >> name && build(name);
    } else if (verb == "run") {
        return in >> number && run(number);
    } else if (verb == "cycles") {
        return in >> name >> number && cycles(name, static_cast<int>(number));
    } else if (verb == "formats") {
        return in >> name && formats(name);
    } else if (verb == "clear") {
        state.fields.clear();
        state.inputs.clear();
        state.outputs.clear();
        state.plugin.reset();
    } else {
        std::cout << "error no command " << verb << std::endl;
        return false;
    }
    return true;
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::cout << (execute(words) ? "done " : "failed ") << line << std::endl;
    }
}

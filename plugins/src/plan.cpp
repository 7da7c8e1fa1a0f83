#include "plan.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "driver.h"
#include "refusal.h"

namespace moiie {
namespace {

constexpr int64_t kBufferAlignment = 256;
constexpr uintptr_t kPointerAlignment = 16;
constexpr int64_t kAlignedMultiple = 16;
constexpr int64_t kLargestGridX = std::numeric_limits<int32_t>::max();
constexpr int64_t kLargestGridYZ = 65535;

int64_t or_zero(Values const& symbols, char const* name) {
    auto const found = symbols.find(name);
    return found == symbols.end() ? 0 : found->second;
}

// At least one: a plan is also asked for before the shapes are known, and with no rows nothing is launched at all.
int64_t route_count(Values const& symbols) { return std::max<int64_t>(or_zero(symbols, "routes"), 1); }

Aligned alignment(Values const& symbols) {
    for (char const* const length : {"H", "I", "D"}) {
        if (or_zero(symbols, length) % kAlignedMultiple != 0) {
            return Aligned::kNo;
        }
    }
    return Aligned::kYes;
}

bool is_for(Plan const& plan, Variant const& variant, Aligned aligned) {
    return plan.op == variant.op && plan.dtype == variant.dtype && plan.weights == variant.weights &&
           (plan.aligned != Aligned::kYes || aligned == Aligned::kYes);
}

bool takes(Plan const& plan, int64_t routes) {
    return routes >= plan.min_routes && (plan.max_routes == -1 || routes <= plan.max_routes);
}

void derive(Plan const& plan, Values& symbols) {
    for (DerivedSymbol const& symbol : plan.symbols) {
        int64_t sum = 0;
        for (size_t i = 0; i < symbol.terms.size(); ++i) {
            sum += (symbol.terms[i].empty() ? 1 : value_of(symbols, symbol.terms[i])) * symbol.factors[i];
        }
        symbols[symbol.name] = sum / symbol.divisor;
    }
}

// Offsets of the buffers, and the total.
int64_t lay_out(Plan const& plan, Values const& symbols, std::map<std::string, int64_t>& offsets) {
    int64_t total = 0;
    for (WorkspaceBuffer const& buffer : plan.workspace) {
        offsets["workspace." + buffer.name] = total;
        int64_t bytes = buffer.bytes;
        for (std::string const& dim : buffer.dims) {
            bytes *= value_of(symbols, dim);
        }
        total += (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    }
    return total;
}

uint32_t grid_length(GridAxis const& axis, Image const& image, Values const& symbols, int64_t largest,
                     std::string const& kernel) {
    if (axis.symbol.empty()) {
        return 1;
    }
    int64_t block = axis.length;
    if (!axis.block.empty()) {
        auto const found = image.blocks.find(axis.block);
        if (found == image.blocks.end()) {
            throw Refusal(text("kernel '", kernel, "' for SM", image.sm, " has no block '", axis.block, "'"));
        }
        block = found->second;
    }
    int64_t const length = (value_of(symbols, axis.symbol) + block - 1) / block;
    if (length > largest) {
        throw Refusal(text("kernel '", kernel, "': ", length, " blocks along '", axis.symbol, "' are more than the ",
                           largest, " that a launch may have"));
    }
    return static_cast<uint32_t>(length);
}

// One kernel argument, wide enough for every kind.
union Argument {
    void* pointer;
    int64_t whole;
    int32_t narrow;
    float real;
};

void* pointer_argument(Parameter const& parameter, std::string const& kernel, Launching const& what) {
    auto const found = what.pointers.find(parameter.name);
    if (found == what.pointers.end()) {
        throw Refusal(text("kernel '", kernel, "' asks for a buffer '", parameter.name, "' that the op has not"));
    }
    if (reinterpret_cast<uintptr_t>(found->second) % kPointerAlignment != 0) {
        throw Refusal(text("buffer '", parameter.name, "' begins at ", found->second, ", which is no multiple of ",
                           kPointerAlignment, " bytes"));
    }
    return found->second;
}

Argument argument(Parameter const& parameter, std::string const& kernel, Launching const& what) {
    Argument value;
    std::memset(&value, 0, sizeof value);
    switch (parameter.kind) {
        case Kind::kNull: break;
        case Kind::kPointer: value.pointer = pointer_argument(parameter, kernel, what); break;
        case Kind::kInt64: value.whole = value_of(what.symbols, parameter.name); break;
        case Kind::kInt32: {
            int64_t const whole = value_of(what.symbols, parameter.name);
            if (whole < std::numeric_limits<int32_t>::min() || whole > std::numeric_limits<int32_t>::max()) {
                throw Refusal(text("'", parameter.name, "' is ", whole, ", which 32 bits do not hold"));
            }
            value.narrow = static_cast<int32_t>(whole);
            break;
        }
        case Kind::kFloat32: {
            auto const found = what.reals.find(parameter.name);
            if (found == what.reals.end()) {
                throw Refusal(text("kernel '", kernel, "' asks for a number '", parameter.name, "' that the op has not"));
            }
            value.real = found->second;
            break;
        }
    }
    return value;
}

void launch_one(Launch const& one, Launching const& what, cudaStream_t stream) {
    Kernel const& kernel = find_kernel(one.kernel);
    LoadedKernel const loaded = load_kernel(kernel);
    Image const& image = *loaded.image;
    Dim3 const grid{grid_length(one.grid[0], image, what.symbols, kLargestGridX, kernel.name),
                    grid_length(one.grid[1], image, what.symbols, kLargestGridYZ, kernel.name),
                    grid_length(one.grid[2], image, what.symbols, kLargestGridYZ, kernel.name)};
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return;
    }
    std::vector<Argument> values;
    for (Parameter const& parameter : kernel.parameters) {
        values.push_back(argument(parameter, kernel.name, what));
    }
    std::vector<void*> addresses;
    for (Argument& value : values) {
        addresses.push_back(&value);
    }
    launch(loaded, kernel.name, grid, addresses.data(), stream);
}

}  // namespace

Variant variant_of(Op const& op, Values const& symbols, DataType first) {
    return {op.name, type_name(first), op.weights == nullptr ? "" : op.weights(symbols, first)};
}

Plan const& choose_plan(Variant const& variant, Values const& symbols) {
    int64_t const routes = route_count(symbols);
    for (Plan const& plan : launch_table().plans) {
        if (is_for(plan, variant, alignment(symbols)) && takes(plan, routes)) {
            return plan;
        }
    }
    throw Refusal(text("the library holds no kernels for ", variant.op, " in ", variant.dtype,
                       variant.weights.empty() ? "" : " with weights in ", variant.weights, " and ", routes, " routes",
                       variant.weights == "fp8" ? "; fp8 weights need SM89 or above, and a library that is built for one"
                                                : ""));
}

size_t workspace_bytes(Variant const& variant, Values const& largest) {
    int64_t const routes = route_count(largest);
    int64_t most = 0;
    for (Plan const& plan : launch_table().plans) {
        if (is_for(plan, variant, alignment(largest)) && routes >= plan.min_routes) {
            Values symbols = largest;
            if (plan.max_routes != -1 && routes > plan.max_routes) {
                symbols["routes"] = plan.max_routes;
            }
            derive(plan, symbols);
            std::map<std::string, int64_t> offsets;
            most = std::max(most, lay_out(plan, symbols, offsets));
        }
    }
    return static_cast<size_t>(most);
}

void run(Plan const& plan, Launching what, void* workspace, Reserved const& reserved, cudaStream_t stream) {
    derive(plan, what.symbols);
    std::map<std::string, int64_t> offsets;
    int64_t const needed = lay_out(plan, what.symbols, offsets);
    reserved.check(needed);
    if (needed > 0 && workspace == nullptr) {
        throw Refusal("TensorRT gave no workspace");
    }
    for (auto const& [name, offset] : offsets) {
        what.pointers[name] = static_cast<char*>(workspace) + offset;
    }
    for (Launch const& one : plan.launches) {
        launch_one(one, what, stream);
    }
}

void load(Plan const& plan) {
    for (Launch const& one : plan.launches) {
        load_kernel(find_kernel(one.kernel));
    }
}

}  // namespace moiie

// The launch table of plugins/compile.py as C++ data: which kernels an op launches, with which grid, arguments and
// workspace. plugins/embed.py turns launch_table.json into the lines that launch_table.cpp reads; README.md explains it.
// Everything is bound by name, so the order of a kernel's parameters is known to the table alone.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace moiie {

// floor(sum of terms[i] * factors[i] / divisor), in 64 bits.
struct DerivedSymbol {
    std::string name;
    int64_t divisor;
    std::vector<std::string> terms;  // an empty one is the number 1
    std::vector<int64_t> factors;
};

// `bytes` times the product of the symbols `dims`.
struct WorkspaceBuffer {
    std::string name;
    int64_t bytes;
    std::vector<std::string> dims;
};

// ceil(symbol / block); an empty symbol is 1. Each image gives a block that has a name its length.
struct GridAxis {
    std::string symbol;
    std::string block;
    int64_t length;
};

struct Launch {
    std::string kernel;
    std::array<GridAxis, 3> grid;
};

enum class Aligned { kNo, kYes, kEither };

struct Plan {
    std::string op;
    std::string dtype;
    std::string weights;
    Aligned aligned;
    int64_t min_routes;
    int64_t max_routes;  // -1: no bound
    std::vector<DerivedSymbol> symbols;
    std::vector<WorkspaceBuffer> workspace;
    std::vector<Launch> launches;
};

enum class Kind { kPointer, kInt32, kInt64, kFloat32, kNull };

struct Parameter {
    std::string name;
    Kind kind;
};

struct Image {
    int32_t sm;
    bool is_ptx;
    uint64_t offset;  // into the embedded images
    uint64_t size;
    uint32_t num_warps;
    uint32_t shared;  // bytes of dynamic shared memory
    std::map<std::string, int64_t> blocks;
};

struct Kernel {
    std::string name;
    std::string entry;  // name of the function in every image
    int32_t oldest_sm;  // the first GPUs that can run it; 0: all
    std::vector<Parameter> parameters;
    std::vector<Image> images;
};

struct LaunchTable {
    std::string source;
    std::vector<Plan> plans;
    std::vector<Kernel> kernels;
};

// The embedded table.
LaunchTable const& launch_table();

// The first byte of an embedded image.
char const* image_bytes(Image const& image);

// The kernel of that name.
// Throws Refusal when the table has none.
Kernel const& find_kernel(std::string const& name);

// The image that a device of compute capability `sm` (10 * major + minor) runs. The same device may also take the PTX
// when its driver is too old for the cubin: ask with `ptx_only`.
// Throws Refusal when the device is too old for the kernel, or with the SMs there are when none fits.
Image const& choose_image(Kernel const& kernel, int32_t sm, bool ptx_only = false);

}  // namespace moiie

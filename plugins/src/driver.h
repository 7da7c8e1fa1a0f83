// The CUDA driver, loaded when the first kernel is launched: the library itself loads and builds engines on a machine that
// has none. The few functions are declared here after the driver API's documentation, so that no CUDA header is needed.
#pragma once

#include <cstdint>
#include <string>

#include "launch_table.h"
#include "tensorrt.h"

namespace moiie {

using DevicePointer = uint64_t;
using FunctionHandle = struct CUfunc_st*;

struct Dim3 {
    uint32_t x = 1;
    uint32_t y = 1;
    uint32_t z = 1;
};

struct LoadedKernel {
    FunctionHandle function = nullptr;
    Image const* image = nullptr;
};

// Whether there is a driver and the calling thread has a context: a builder may have neither.
bool has_context();

// The kernel's function in the current context, its image loaded on first use and kept for the life of the process.
// Throws Refusal when the driver is missing, too old for the images, or the library has none for the device.
LoadedKernel load_kernel(Kernel const& kernel);

// Launches with `arguments` pointing to each parameter's value, as cuLaunchKernel takes them.
// Throws Refusal with the driver's reason.
void launch(LoadedKernel const& kernel, std::string const& name, Dim3 grid, void** arguments, cudaStream_t stream);

// Copies between device buffers in stream order.
void copy_on_device(void* target, void const* source, size_t bytes, cudaStream_t stream);

}  // namespace moiie

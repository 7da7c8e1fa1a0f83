#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <tuple>

#include "refusal.h"

namespace moiie {
namespace {

using Result = int;
using Context = struct CUctx_st*;
using Module = struct CUmod_st*;

// Values of the driver API's enumerations.
constexpr Result kSuccess = 0;
constexpr Result kInvalidPtx = 218;
constexpr Result kUnsupportedPtxVersion = 222;
constexpr Result kInvalidImage = 200;
constexpr Result kNoBinaryForGpu = 209;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxDynamicSharedSizeBytes = 8;
constexpr uint32_t kSharedWithoutOptIn = 48 * 1024;
constexpr uint32_t kThreadsPerWarp = 32;
constexpr char const* kLibrary = "libcuda.so.1";

struct Driver {
    Result (*ctx_get_current)(Context*);
    Result (*ctx_get_device)(int*);
    Result (*device_get_attribute)(int*, int, int);
    Result (*module_load_data)(Module*, void const*);
    Result (*module_get_function)(FunctionHandle*, Module, char const*);
    Result (*func_set_attribute)(FunctionHandle, int, int);
    Result (*launch_kernel)(FunctionHandle, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                            cudaStream_t, void**, void**);
    Result (*memcpy_dtod_async)(DevicePointer, DevicePointer, size_t, cudaStream_t);
    Result (*get_error_string)(Result, char const**);
    // Of CUDA 12.0; null before. Tells a context from a later one at the same address.
    Result (*ctx_get_id)(Context, unsigned long long*);
    std::string problem;  // why there is no driver; empty: there is one
};

template <typename Function>
void resolve(void* library, char const* name, Function& function, std::string& problem) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && problem.empty()) {
        problem = text(kLibrary, " has no function ", name, ": the NVIDIA driver is too old or damaged");
    }
}

Driver open_driver() {
    Driver driver{};
    void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        char const* const reason = dlerror();
        driver.problem = text("the NVIDIA driver cannot be loaded (", reason == nullptr ? kLibrary : reason,
                              "): kernels run on a machine with an NVIDIA GPU and its driver only");
        return driver;
    }
    resolve(library, "cuCtxGetCurrent", driver.ctx_get_current, driver.problem);
    resolve(library, "cuCtxGetDevice", driver.ctx_get_device, driver.problem);
    resolve(library, "cuDeviceGetAttribute", driver.device_get_attribute, driver.problem);
    resolve(library, "cuModuleLoadData", driver.module_load_data, driver.problem);
    resolve(library, "cuModuleGetFunction", driver.module_get_function, driver.problem);
    resolve(library, "cuFuncSetAttribute", driver.func_set_attribute, driver.problem);
    resolve(library, "cuLaunchKernel", driver.launch_kernel, driver.problem);
    resolve(library, "cuMemcpyDtoDAsync_v2", driver.memcpy_dtod_async, driver.problem);
    resolve(library, "cuGetErrorString", driver.get_error_string, driver.problem);
    std::string optional = "asked for nothing";
    resolve(library, "cuCtxGetId", driver.ctx_get_id, optional);
    return driver;
}

Driver const& driver() {
    static Driver const opened = open_driver();
    if (!opened.problem.empty()) {
        throw Refusal(opened.problem);
    }
    return opened;
}

void check(Result result, std::string const& action) {
    if (result == kSuccess) {
        return;
    }
    char const* reason = nullptr;
    driver().get_error_string(result, &reason);
    throw Refusal(text(action, ": the driver says '", reason == nullptr ? "an unknown error" : reason, "' (", result, ")"));
}

Context current_context() {
    Context context = nullptr;
    check(driver().ctx_get_current(&context), "asking for the current context");
    return context;
}

int32_t device_sm() {
    int device = 0;
    int major = 0;
    int minor = 0;
    check(driver().ctx_get_device(&device), "asking for the current device");
    check(driver().device_get_attribute(&major, kComputeCapabilityMajor, device), "asking for the compute capability");
    check(driver().device_get_attribute(&minor, kComputeCapabilityMinor, device), "asking for the compute capability");
    return 10 * major + minor;
}

// Whether another image may do what this one could not.
bool is_too_new(Result result) {
    return result == kInvalidImage || result == kNoBinaryForGpu || result == kInvalidPtx ||
           result == kUnsupportedPtxVersion;
}

LoadedKernel find_function(Kernel const& kernel, Image const& image, Module module) {
    LoadedKernel loaded{nullptr, &image};
    check(driver().module_get_function(&loaded.function, module, kernel.entry.c_str()),
          text("looking for '", kernel.entry, "' in kernel '", kernel.name, "'"));
    if (image.shared > kSharedWithoutOptIn) {
        check(driver().func_set_attribute(loaded.function, kMaxDynamicSharedSizeBytes, static_cast<int>(image.shared)),
              text("reserving ", image.shared, " bytes of shared memory for kernel '", kernel.name, "'"));
    }
    return loaded;
}

Result load_image(Module* module, Image const& image) {
    if (image.is_ptx) {  // a text has to end in a zero byte
        return driver().module_load_data(module, std::string(image_bytes(image), image.size).c_str());
    }
    return driver().module_load_data(module, image_bytes(image));
}

// An old driver refuses a cubin of a newer compiler; PTX of an older version may still be what it takes.
LoadedKernel load_for_device(Kernel const& kernel) {
    int32_t const sm = device_sm();
    Image const* image = &choose_image(kernel, sm);
    Module module = nullptr;
    Result result = load_image(&module, *image);
    if (!image->is_ptx && is_too_new(result)) {
        image = &choose_image(kernel, sm, true);
        result = load_image(&module, *image);
    }
    check(result, text("loading kernel '", kernel.name, "' for SM", sm,
                       ", which a driver older than the library's compiler may refuse (build the library on the device: "
                       "moiie plugins build --sm ", sm, ")"));
    return find_function(kernel, *image, module);
}

struct Key {
    Context context;
    unsigned long long context_id;
    Kernel const* kernel;

    bool operator<(Key const& other) const {
        return std::tie(context, context_id, kernel) < std::tie(other.context, other.context_id, other.kernel);
    }
};

}  // namespace

bool has_context() {
    try {
        return current_context() != nullptr;
    } catch (Refusal const&) {
        return false;
    }
}

LoadedKernel load_kernel(Kernel const& kernel) {
    static std::mutex guard;
    static std::map<Key, LoadedKernel> loaded;
    Key key{current_context(), 0, &kernel};
    if (key.context == nullptr) {
        throw Refusal("the calling thread has no CUDA context");
    }
    if (driver().ctx_get_id != nullptr) {
        driver().ctx_get_id(key.context, &key.context_id);
    }
    std::lock_guard<std::mutex> const lock(guard);
    auto const found = loaded.find(key);
    return found != loaded.end() ? found->second : loaded.emplace(key, load_for_device(kernel)).first->second;
}

void launch(LoadedKernel const& kernel, std::string const& name, Dim3 grid, void** arguments, cudaStream_t stream) {
    check(driver().launch_kernel(kernel.function, grid.x, grid.y, grid.z, kernel.image->num_warps * kThreadsPerWarp, 1, 1,
                                 kernel.image->shared, stream, arguments, nullptr),
          text("launching kernel '", name, "'"));
}

void copy_on_device(void* target, void const* source, size_t bytes, cudaStream_t stream) {
    check(driver().memcpy_dtod_async(reinterpret_cast<DevicePointer>(target), reinterpret_cast<DevicePointer>(source),
                                     bytes, stream),
          text("copying ", bytes, " bytes"));
}

}  // namespace moiie

// A libcuda.so.1 without a GPU. It reads the kernels it is given - parameters and block size are written in every cubin
// and PTX - refuses what a real driver would refuse, and writes each call as a line of JSON to $STUB_LOG.
//   STUB_SM         compute capability of the only device, 89 unless told
//   STUB_NO_CUBINS  refuse cubins, as a driver does that is older than the compiler
//   STUB_NO_CONTEXT the calling thread has no context

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int kInvalidValue = 1;
constexpr int kNoBinaryForGpu = 209;
constexpr int kInvalidPtx = 218;
constexpr int kNotFound = 500;
constexpr uint8_t kParameterInfo = 0x17;  // index, ordinal and offset, flags with the size from bit 18
constexpr uint8_t kRequiredThreads = 0x10;

struct Function {
    std::string name;
    std::vector<size_t> sizes;
    uint32_t threads[3] = {0, 0, 0};
    uint32_t checksum = 0;
    int shared_limit = 48 * 1024;
};

struct Module {
    std::string bytes;
    bool is_ptx;
};

int device_sm() {
    char const* const told = std::getenv("STUB_SM");
    return told == nullptr ? 89 : std::atoi(told);
}

void write_line(std::string const& line) {
    if (char const* const path = std::getenv("STUB_LOG")) {
        std::FILE* const file = std::fopen(path, "a");
        std::fprintf(file, "%s\n", line.c_str());
        std::fclose(file);
    }
}

uint32_t crc32(std::string const& bytes) {
    uint32_t crc = ~0u;
    for (unsigned char const each : bytes) {
        crc ^= each;
        for (int bit = 0; bit < 8; ++bit) {
            crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
        }
    }
    return ~crc;
}

template <typename T>
T read(std::string const& bytes, size_t at) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof value);
    return value;
}

size_t elf_size(void const* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header);
    std::string const all(static_cast<char const*>(image), header.e_shoff + header.e_shnum * sizeof(Elf64_Shdr));
    size_t end = all.size();
    for (size_t i = 0; i < header.e_shnum; ++i) {
        auto const section = read<Elf64_Shdr>(all, header.e_shoff + i * sizeof(Elf64_Shdr));
        end = std::max<size_t>(end, section.sh_type == SHT_NOBITS ? 0 : section.sh_offset + section.sh_size);
    }
    auto const segments = header.e_phoff + header.e_phnum * sizeof(Elf64_Phdr);
    return std::max<size_t>(end, header.e_phnum == 0 ? 0 : segments);
}

bool read_info(std::string const& bytes, Elf64_Shdr const& section, Function& function) {
    size_t at = section.sh_offset;
    size_t const end = at + section.sh_size;
    while (at + 4 <= end) {
        auto const format = read<uint8_t>(bytes, at);
        auto const attribute = read<uint8_t>(bytes, at + 1);
        auto const size = read<uint16_t>(bytes, at + 2);
        size_t const data = at + 4;
        if (format == 4 && attribute == kParameterInfo) {
            auto const ordinal = read<uint16_t>(bytes, data + 4);
            if (function.sizes.size() <= ordinal) {
                function.sizes.resize(ordinal + 1);
            }
            function.sizes[ordinal] = read<uint32_t>(bytes, data + 8) >> 18;
        }
        if (format == 4 && attribute == kRequiredThreads) {
            std::memcpy(function.threads, bytes.data() + data, sizeof function.threads);
        }
        at = data + (format == 4 ? size : 0);  // only format 4 carries data behind its header
    }
    return true;
}

bool find_in_elf(std::string const& bytes, Function& function) {
    auto const header = read<Elf64_Ehdr>(bytes, 0);
    auto const section_at = [&](size_t i) { return read<Elf64_Shdr>(bytes, header.e_shoff + i * sizeof(Elf64_Shdr)); };
    size_t const names = section_at(header.e_shstrndx).sh_offset;
    for (size_t i = 0; i < header.e_shnum; ++i) {
        auto const section = section_at(i);
        if (bytes.data() + names + section.sh_name == ".nv.info." + function.name) {
            return read_info(bytes, section, function);
        }
    }
    return false;
}

bool find_in_ptx(std::string const& text, Function& function) {
    size_t const begin = text.find(".entry " + function.name + "(");
    if (begin == std::string::npos) {
        return false;
    }
    size_t const end = text.find(')', begin);
    for (size_t at = text.find(".param .", begin); at < end; at = text.find(".param .", at + 1)) {
        function.sizes.push_back(std::strtoul(text.c_str() + at + 9, nullptr, 10) / 8);
    }
    size_t const threads = text.find(".reqntid", end);
    function.threads[0] = static_cast<uint32_t>(std::strtoul(text.c_str() + threads + 9, nullptr, 10));
    function.threads[1] = function.threads[2] = 1;
    return threads < text.find('{', end);
}

std::string hex(void const* bytes, size_t size) {
    std::string result;
    for (size_t i = 0; i < size; ++i) {
        char two[3];
        std::snprintf(two, sizeof two, "%02x", static_cast<unsigned char const*>(bytes)[i]);
        result += two;
    }
    return result;
}

}  // namespace

extern "C" {

int cuCtxGetCurrent(void** context) {
    static int only;
    *context = std::getenv("STUB_NO_CONTEXT") == nullptr ? &only : nullptr;
    return 0;
}

int cuCtxGetDevice(int* device) {
    *device = 0;
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? device_sm() / 10 : attribute == 76 ? device_sm() % 10 : 0;
    return attribute == 75 || attribute == 76 ? 0 : kInvalidValue;
}

int cuModuleLoadData(Module** module, void const* image) {
    bool const is_ptx = std::memcmp(image, ELFMAG, SELFMAG) != 0;
    std::string bytes = is_ptx ? std::string(static_cast<char const*>(image))
                               : std::string(static_cast<char const*>(image), elf_size(image));
    if (!is_ptx && std::getenv("STUB_NO_CUBINS") != nullptr) {
        return kNoBinaryForGpu;
    }
    if (is_ptx && bytes.find(".version") == std::string::npos) {
        return kInvalidPtx;
    }
    static std::vector<std::unique_ptr<Module>> loaded;  // for the life of the process, as the library keeps it
    loaded.push_back(std::make_unique<Module>(Module{std::move(bytes), is_ptx}));
    *module = loaded.back().get();
    return 0;
}

int cuModuleGetFunction(Function** function, Module* module, char const* name) {
    static std::vector<std::unique_ptr<Function>> functions;
    auto found = std::make_unique<Function>();
    found->name = name;
    found->checksum = crc32(module->bytes);
    if (!(module->is_ptx ? find_in_ptx(module->bytes, *found) : find_in_elf(module->bytes, *found))) {
        return kNotFound;
    }
    *function = found.get();
    functions.push_back(std::move(found));
    return 0;
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8) {
        return kInvalidValue;
    }
    function->shared_limit = value;
    return 0;
}

int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void*, void** arguments, void** extra) {
    bool const right_block = bx == function->threads[0] && by == function->threads[1] && bz == function->threads[2];
    bool const right_grid = gx > 0 && gy > 0 && gz > 0 && gy <= 65535 && gz <= 65535;
    if (!right_block || !right_grid || extra != nullptr || static_cast<int>(shared) > function->shared_limit) {
        return kInvalidValue;
    }
    std::ostringstream line;
    line << R"({"call": "launch", "entry": ")" << function->name << R"(", "checksum": )" << function->checksum
         << R"(, "grid": [)" << gx << ", " << gy << ", " << gz << R"(], "block": [)" << bx << ", " << by << ", " << bz
         << R"(], "shared": )" << shared << R"(, "arguments": [)";
    for (size_t i = 0; i < function->sizes.size(); ++i) {
        line << (i == 0 ? "" : ", ") << '"' << hex(arguments[i], function->sizes[i]) << '"';
    }
    line << "]}";
    write_line(line.str());
    return 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void*) {
    std::ostringstream line;
    line << R"({"call": "copy", "target": )" << target << R"(, "source": )" << source << R"(, "bytes": )" << bytes << "}";
    write_line(line.str());
    return 0;
}

int cuGetErrorString(int error, char const** text) {
    *text = error == kNoBinaryForGpu ? "no kernel image is available for execution on the device"
            : error == kInvalidValue ? "invalid argument"
            : error == kNotFound     ? "named symbol not found"
                                     : "an error of the stub";
    return 0;
}

}  // extern "C"

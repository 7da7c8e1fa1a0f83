// TensorRT's headers, and what differs between its versions (10.3 to 11.x, TensorRT for RTX 1.x).
#pragma once

#include <NvInferRuntime.h>

// TensorRT for RTX counts its versions from 1.0 and has had plugins of this generation from the start.
#if defined(TRT_MAJOR_RTX)
#define MOIIE_TENSORRT_KIND "TensorRT for RTX"
#else
#define MOIIE_TENSORRT_KIND "TensorRT"
#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "MoIIE's plugins need the headers of TensorRT 10.3 or newer: set TENSORRT_INCLUDE_DIR"
#endif
#endif

namespace moiie {

using nvinfer1::DataType;
using nvinfer1::Dims;

// A tensor type's name as ONNX and PyTorch spell it: "float16", "int8". It is also how kernel variants are named.
inline char const* type_name(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "float32";
        case DataType::kHALF: return "float16";
        case DataType::kBF16: return "bfloat16";
        case DataType::kINT8: return "int8";
        case DataType::kINT32: return "int32";
        case DataType::kINT64: return "int64";
        case DataType::kBOOL: return "bool";
        case DataType::kUINT8: return "uint8";
        case DataType::kFP8: return "float8e4m3";
        case DataType::kINT4: return "int4";
        default: return "a type unknown to MoIIE's plugins";
    }
}

// Bytes of an element of the types that an op may update in place.
inline size_t type_bytes(DataType type) { return type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2; }

}  // namespace moiie

// The two handle types that TensorRT's headers take from CUDA's <cuda_runtime_api.h>.
//
// Both are opaque pointers whose tags are part of CUDA's stable ABI, and a stream of the runtime API is one of the driver
// API. With them the library is compiled on a machine that has TensorRT's headers but no CUDA toolkit.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

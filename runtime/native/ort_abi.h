// The part of ONNX Runtime's C interface that a library of custom operators needs.
//
// The interface is a table of functions that only ever grows at its end, so an entry is named by its place in the table.
// Version 21 of the table has all of them; any later runtime answers a request for version 21.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moiie::ort {

constexpr uint32_t kApiVersion = 21;

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct InferContext;

struct Api {
  void* entries[1];  // as many as the version has
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version) noexcept;
  const char* (*version)() noexcept;
};

enum Code : int { kFail = 1, kInvalidArgument = 2 };
enum Element : int { kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum Presence : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

// What an operator tells the runtime about itself; the order of the members is the interface.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel_v1)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  Element (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  Element (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute_v1)(void*, KernelContext*);
  void (*destroy_kernel)(void*);
  Presence (*input_presence)(const CustomOp*, size_t);
  Presence (*output_presence)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_minimum)(const CustomOp*);
  int (*variadic_input_one_type)(const CustomOp*);
  int (*variadic_output_minimum)(const CustomOp*);
  int (*variadic_output_one_type)(const CustomOp*);
  Status* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, InferContext*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  size_t (*may_reuse)(int** inputs, int** outputs);
  void (*release_reuse)(int* inputs, int* outputs);
  size_t (*aliases)(int** inputs, int** outputs);
  void (*release_aliases)(int* inputs, int* outputs);
};

template <size_t Index, typename Function>
struct Entry {
  static Function* of(const Api* api) { return reinterpret_cast<Function*>(api->entries[Index]); }
};

using CreateStatus = Entry<0, Status*(Code, const char*)>;
using ErrorMessage = Entry<2, const char*(const Status*)>;
using CreateDomain = Entry<26, Status*(const char*, Domain**)>;
using AddToDomain = Entry<27, Status*(Domain*, const CustomOp*)>;
using AddDomain = Entry<28, Status*(SessionOptions*, Domain*)>;
using MutableData = Entry<51, Status*(Value*, void**)>;
using ElementType = Entry<60, Status*(const ShapeInfo*, Element*)>;
using DimensionCount = Entry<61, Status*(const ShapeInfo*, size_t*)>;
using Dimensions = Entry<62, Status*(const ShapeInfo*, int64_t*, size_t)>;
using ShapeOf = Entry<65, Status*(const Value*, ShapeInfo**)>;
using AttributeInt = Entry<86, Status*(const KernelInfo*, const char*, int64_t*)>;
using InputCount = Entry<88, Status*(const KernelContext*, size_t*)>;
using Input = Entry<90, Status*(const KernelContext*, size_t, const Value**)>;
using Output = Entry<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>;
using ReleaseStatus = Entry<93, void(Status*)>;
using ReleaseShape = Entry<99, void(ShapeInfo*)>;
using AttributeInts = Entry<163, Status*(const KernelInfo*, const char*, int64_t*, size_t*)>;
using ParallelFor = Entry<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;

}  // namespace moiie::ort

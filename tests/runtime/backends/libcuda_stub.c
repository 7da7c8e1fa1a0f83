/* A libcuda.so.1 in host memory, for cuda-bindings as it is: what Python passes must arrive as the driver's types.
 * Everything is done at once; a recorded graph holds nothing. Structures as in cuda.h, whose layout is the driver's ABI. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_FOUND = 500 };
enum { TOTAL = 1 << 20 };
static size_t used;
static int handles, launches;
static size_t sizes[64];
static void *blocks[64];

typedef struct {
  size_t srcXInBytes, srcY;
  int srcMemoryType;
  const void *srcHost;
  CUdeviceptr srcDevice;
  void *srcArray;
  size_t srcPitch, dstXInBytes, dstY;
  int dstMemoryType;
  void *dstHost;
  CUdeviceptr dstDevice;
  void *dstArray;
  size_t dstPitch, WidthInBytes, Height;
} Copy2D;

CUresult cuInit(unsigned flags) { return flags == 0 ? OK : INVALID; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return OK; }
CUresult cuDeviceGet(int *device, int index) { *device = index; return index == 0 ? OK : INVALID; }
CUresult cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, "Stub GPU", size);
  return device == 0 ? OK : INVALID;
}
CUresult cuDeviceTotalMem_v2(size_t *size, int device) { *size = TOTAL; return device ? INVALID : OK; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : 7;
  return device ? INVALID : OK;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)7; return device ? INVALID : OK; }
CUresult cuDevicePrimaryCtxRelease(int device) { return device ? INVALID : OK; }
CUresult cuCtxSetCurrent(void *context) { return context == (void *)7 ? OK : INVALID; }
CUresult cuMemGetInfo(size_t *free, size_t *total) { *free = TOTAL - used; *total = TOTAL; return OK; }
CUresult cuMemAlloc(CUdeviceptr *address, size_t size) {
  if (used + size > TOTAL) return NO_MEMORY;
  for (int i = 0; i < 64; i++)
    if (!blocks[i]) {
      blocks[i] = malloc(size);
      sizes[i] = size;
      used += size;
      *address = (CUdeviceptr)blocks[i];
      return OK;
    }
  return NO_MEMORY;
}
CUresult cuMemFree(CUdeviceptr address) {
  for (int i = 0; i < 64; i++)
    if (blocks[i] == (void *)address) {
      free(blocks[i]);
      blocks[i] = 0;
      used -= sizes[i];
      return OK;
    }
  return INVALID;
}
CUresult cuMemHostAlloc(void **memory, size_t size, unsigned flags) { *memory = malloc(size); return flags ? INVALID : OK; }
CUresult cuMemFreeHost(void *memory) { free(memory); return OK; }
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, void *stream) {
  memset((void *)to, value, size);
  return stream ? OK : INVALID;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, void *stream) {
  memcpy((void *)to, from, size);
  return stream ? OK : INVALID;
}
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, void *stream) {
  memcpy(to, (void *)from, size);
  return stream ? OK : INVALID;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, void *stream) {
  memmove((void *)to, (void *)from, size);
  return stream ? OK : INVALID;
}
CUresult cuMemcpy2DAsync(const Copy2D *copy, void *stream) {
  if (copy->srcMemoryType != 2 || copy->dstMemoryType != 2 || copy->srcXInBytes || copy->dstY || !stream) return INVALID;
  for (size_t row = 0; row < copy->Height; row++)
    memmove((char *)copy->dstDevice + row * copy->dstPitch, (char *)copy->srcDevice + row * copy->srcPitch, copy->WidthInBytes);
  return OK;
}
CUresult cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)(intptr_t)++handles; return flags == 1 ? OK : INVALID; }
CUresult cuStreamDestroy(void *stream) { return stream ? OK : INVALID; }
CUresult cuStreamSynchronize(void *stream) { return stream ? OK : INVALID; }
CUresult cuStreamBeginCapture(void *stream, int mode) { return stream && mode == 1 ? OK : INVALID; }
CUresult cuStreamEndCapture(void *stream, void **graph) { *graph = (void *)64; return stream ? OK : INVALID; }
CUresult cuGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
  *executable = (void *)65;
  return graph == (void *)64 && !flags ? OK : INVALID;
}
CUresult cuGraphInstantiateWithFlags(void **e, void *g, unsigned long long f) { return cuGraphInstantiate(e, g, f); }
CUresult cuGraphDestroy(void *graph) { return graph == (void *)64 ? OK : INVALID; }
CUresult cuGraphExecDestroy(void *executable) { return executable == (void *)65 ? OK : INVALID; }
CUresult cuGraphLaunch(void *executable, void *stream) { launches++; return executable == (void *)65 && stream ? OK : INVALID; }
CUresult cuGetErrorString(CUresult code, const char **text) { *text = code == NO_MEMORY ? "out of memory" : "an error"; return OK; }
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  Dl_info here;
  dladdr((void *)cuInit, &here);
  *function = dlsym(dlopen(here.dli_fname, RTLD_NOW), strcmp(name, "cuGetProcAddress") ? name : "cuGetProcAddress_v2");
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : NOT_FOUND;
}
CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}

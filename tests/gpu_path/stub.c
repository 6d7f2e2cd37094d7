/* A libcuda.so.1 that runs nothing: it answers what Triton's driver asks of a GPU, and notes what it is told to launch.

   cuLaunchKernelEx gets an array of addresses, one for each parameter, but not their sizes: Python tells these
   beforehand (stub_expect), and reads what arrived afterwards (stub_last). Python holds a lock meanwhile. */
#include "cuda.h"
#include <stdint.h>
#include <string.h>

typedef struct {
    uint64_t function;
    uint32_t grid[3], block[3], shared;
    uint64_t stream;
    uint64_t values[128];
} Note;

static Note last;
static long launches = 0;
static int widths[128], expected = 0;
static int multiprocessors = 132, shared_limit = 232448;
static uint64_t handles = 4096;
static int context;

void stub_setup(int sms, int shared) { multiprocessors = sms; shared_limit = shared; }
void stub_expect(const int *sizes, int count) { expected = count; memcpy(widths, sizes, count * sizeof(int)); }
const Note *stub_last(void) { return &last; }
long stub_launches(void) { return launches; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    last.function = (uint64_t)function;
    last.shared = config->sharedMemBytes;
    last.stream = (uint64_t)config->hStream;
    last.grid[0] = config->gridDimX, last.grid[1] = config->gridDimY, last.grid[2] = config->gridDimZ;
    last.block[0] = config->blockDimX, last.block[1] = config->blockDimY, last.block[2] = config->blockDimZ;
    memset(last.values, 0, sizeof(last.values));
    for (int i = 0; i < expected; ++i) memcpy(&last.values[i], parameters[i], widths[i]);
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

/* The rest does nothing, and always well. */
#define OK return CUDA_SUCCESS;
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error of a GPU that is not there"; OK }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; OK }
CUresult cuDriverGetVersion(int *version) { *version = 13010; OK }
CUresult cuCtxGetCurrent(CUcontext *current) { *current = (CUcontext)&context; OK }
CUresult cuCtxSetCurrent(CUcontext current) { OK }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; OK }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK }
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) { *retained = (CUcontext)&context; OK }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)(handles += 8); OK }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)(handles += 8); OK
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer; OK
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) { OK }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = 1; OK
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) { OK }
CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                 const cuuint64_t *sizes, const cuuint64_t *strides, const int *lower, const int *upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) { OK }

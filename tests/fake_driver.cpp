// A CUDA driver without a GPU, under the name libcuda.so.1. An image is the path of a library made of tests/emulator.cpp, which
// runs its kernels on the CPU. FAKE_CUDA_FAIL names one call that fails.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

using Run = int (*)(void *function, const unsigned *grid, unsigned threads, const void *params);
struct Function {
  void *function;
  Run run;
};
static char context_of_device_0;

static int result(const char *call) {
  const char *failing = getenv("FAKE_CUDA_FAIL");
  return failing != nullptr && strcmp(failing, call) == 0 ? 700 : 0;
}

extern "C" {
int cuInit(unsigned) { return result("cuInit"); }
int cuGetExportTable(const void **, const void *) { return 500; }  // NVRTC asks for one; not found
int cuDriverGetVersion(int *version) { return *version = 13020, 0; }
int cuGetErrorString(int, const char **text) { return *text = "an illegal memory access was encountered", 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, result("cuDeviceGet"); }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &context_of_device_0, 0; }
int cuCtxPushCurrent_v2(void *context) { return context == &context_of_device_0 ? 0 : 201; }
int cuCtxPopCurrent_v2(void **) { return 0; }
int cuModuleLoadData(void **module, const void *image) {
  if (result("cuModuleLoadData")) return 700;
  *module = dlopen(static_cast<const char *>(image), RTLD_NOW | RTLD_LOCAL);
  return *module == nullptr ? 301 : 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  void *found = dlsym(module, name);
  if (found == nullptr) return 500;
  *function = new Function{found, reinterpret_cast<Run>(dlsym(module, "emulate"))};
  return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned by, unsigned bz,
                   unsigned shared_bytes, void *, void **arguments, void **) {
  if (result("cuLaunchKernel")) return 700;
  const auto *kernel = static_cast<Function *>(function);
  if (!gx || gx > 0x7fffffff || !gy || gy > 65535 || gz != 1 || !threads || threads > 1024 || by != 1 || bz != 1) return 1;
  if (shared_bytes) return 1;
  const unsigned grid[] = {gx, gy};
  return kernel->run(kernel->function, grid, threads, arguments[0]);
}
}

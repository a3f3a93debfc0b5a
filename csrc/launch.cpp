#include "launch.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>

namespace {

// The part of cuda.h that is used; CUresult is an int and every handle a pointer.
struct Driver {
  int (*Init)(unsigned);
  int (*DriverGetVersion)(int *);
  int (*GetErrorString)(int, const char **);
  int (*DeviceGet)(int *, int);
  int (*DevicePrimaryCtxRetain)(void **, int);
  int (*CtxPushCurrent)(void *);
  int (*CtxPopCurrent)(void **);
  int (*ModuleLoadData)(void **, const void *);
  int (*ModuleGetFunction)(void **, void *, const char *);
  int (*LaunchKernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                      void **);
  std::string missing;  // why the driver cannot serve; empty where it can

  Driver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing = dlerror();
      return;
    }
    const auto find = [&](auto &function, const char *symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
      if (function == nullptr) missing = std::string("libcuda.so.1 has no ") + symbol;
    };
    find(Init, "cuInit");
    find(DriverGetVersion, "cuDriverGetVersion");
    find(GetErrorString, "cuGetErrorString");
    find(DeviceGet, "cuDeviceGet");
    find(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(CtxPushCurrent, "cuCtxPushCurrent_v2");
    find(CtxPopCurrent, "cuCtxPopCurrent_v2");
    find(ModuleLoadData, "cuModuleLoadData");
    find(ModuleGetFunction, "cuModuleGetFunction");
    find(LaunchKernel, "cuLaunchKernel");
  }
};

const Driver &driver() {
  thread_local Driver instance;
  if (!instance.missing.empty()) instance = Driver();  // one may have been loaded since
  return instance;
}

void check(int result, const std::string &kernel, const char *call) {
  if (result == 0) return;
  const char *text = nullptr;
  driver().GetErrorString(result, &text);
  throw std::runtime_error(kernel + ": " + call + " failed: " + (text ? text : "error ") +
                           (text ? "" : std::to_string(result)));
}

// Makes a context current and the caller's current again, whatever happens in between.
class Current {
 public:
  Current(void *context, const std::string &kernel) {
    check(driver().CtxPushCurrent(context), kernel, "cuCtxPushCurrent");
  }
  ~Current() {
    void *popped;
    driver().CtxPopCurrent(&popped);
  }
  Current(const Current &) = delete;
  Current &operator=(const Current &) = delete;
};

}  // namespace

Kernel *load_kernel(const std::string &image, const std::string &name, int device) {
  const Driver &cuda = driver();
  if (!cuda.missing.empty()) throw std::runtime_error(name + ": no CUDA driver: " + cuda.missing);
  int handle;
  void *context, *module, *function;
  check(cuda.Init(0), name, "cuInit");
  check(cuda.DeviceGet(&handle, device), name, "cuDeviceGet");
  check(cuda.DevicePrimaryCtxRetain(&context, handle), name, "cuDevicePrimaryCtxRetain");
  const Current current(context, name);
  check(cuda.ModuleLoadData(&module, image.c_str()), name, "cuModuleLoadData");
  check(cuda.ModuleGetFunction(&function, module, name.c_str()), name, "cuModuleGetFunction");
  return new Kernel{name, context, function};
}

void launch_kernel(const Kernel *kernel, Grid grid, void *stream, const void *params) {
  const Current current(kernel->context, kernel->name);
  void *arguments[] = {const_cast<void *>(params)};
  check(driver().LaunchKernel(kernel->function, grid.x, grid.y, 1, grid.threads, 1, 1, 0, stream, arguments,
                              nullptr),
        kernel->name, "cuLaunchKernel");
}

int driver_version() {
  int version = 0;
  if (driver().missing.empty()) driver().DriverGetVersion(&version);
  return version;
}

// A CUDA driver without a GPU: cuLaunchKernel runs the kernel of the file KERNEL (a -D of the test) on the CPU, each
// thread a fiber that runs until its next barrier. FAKE_CUDA_FAIL names one call that fails.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <vector>

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// A fiber is entered once through its context; after that _setjmp and _longjmp switch without a system call.
static jmp_buf scheduler;
static std::vector<jmp_buf> waiting(1024);
static int arrived, counted;  // sums over the barrier being filled, and over the last one

static void yield() {
  if (_setjmp(waiting[threadIdx.x]) == 0) _longjmp(scheduler, 1);
}
static void __syncthreads() { yield(); }
static int __syncthreads_count(int predicate) {
  arrived += predicate != 0;
  yield();
  return counted;
}

#define __global__
#define __device__
#define __shared__ static
#include KERNEL

static SelectTokensParams argument;
static bool finished;
static void body() {
  select_tokens(argument);
  finished = true;
  _longjmp(scheduler, 1);
}

static void enter(unsigned t) {
  constexpr size_t stack = 64 << 10;
  static std::vector<char> stacks(1024 * stack);
  ucontext_t fiber;
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stacks.data() + t * stack;
  fiber.uc_stack.ss_size = stack;
  makecontext(&fiber, body, 0);
  setcontext(&fiber);
}

static void run_block(unsigned threads) {
  static bool started, done;  // static: a local would be lost in the jump
  static unsigned t;
  for (started = done = false; !done; started = true) {
    for (t = 0; t < threads; t++) {
      threadIdx = {t, 0, 0};
      finished = false;
      if (_setjmp(scheduler) == 0) {
        if (started) _longjmp(waiting[t], 1);
        enter(t);
      }
      if (t > 0 && finished != done) abort();  // some threads left and some wait at a barrier
      done = finished;
    }
    counted = arrived;
    arrived = 0;
  }
}

static int result(const char *call) {
  const char *failing = getenv("FAKE_CUDA_FAIL");
  return failing != nullptr && strcmp(failing, call) == 0 ? 700 : 0;
}

extern "C" {
int cuInit(unsigned) { return result("cuInit"); }
int cuDriverGetVersion(int *version) { return *version = 13020, 0; }
int cuGetErrorString(int, const char **text) { return *text = "an illegal memory access was encountered", 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, result("cuDeviceGet"); }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &scheduler, 0; }
int cuCtxPushCurrent_v2(void *context) { return context == &scheduler ? 0 : 201; }
int cuCtxPopCurrent_v2(void **) { return 0; }
int cuModuleLoadData(void **module, const void *) { return *module = &scheduler, result("cuModuleLoadData"); }
int cuModuleGetFunction(void **function, void *, const char *name) {
  *function = &scheduler;
  return strcmp(name, "select_tokens") == 0 ? 0 : 500;
}
int cuLaunchKernel(void *, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned by, unsigned bz, unsigned,
                   void *, void **arguments, void **) {
  if (result("cuLaunchKernel")) return 700;
  if (!gx || !gy || gy > 65535 || gz != 1 || !threads || threads > 1024 || by != 1 || bz != 1) return 1;
  argument = *static_cast<SelectTokensParams *>(arguments[0]);
  gridDim = {gx, gy, 1}, blockDim = {threads, 1, 1};
  for (unsigned y = 0; y < gy; y++)
    for (unsigned x = 0; x < gx; x++) {
      blockIdx = {x, y, 0};
      run_block(threads);
    }
  return 0;
}
}

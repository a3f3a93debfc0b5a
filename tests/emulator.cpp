// Runs the kernels of the file KERNEL, which take a PARAMS, as on compute capability __CUDA_ARCH__ / 100: blocks one after the
// other, each thread a fiber that runs until its next barrier or warp instruction. What a card would do wrong and a CPU would hide
// shows: memory past the end of an object in shared memory faults, what a block has not written there is NaN, an asynchronous copy lands
// only when waited for, barriers that some threads miss abort. Not covered: the timing of threads (races between barriers), the memory
// model, registers, speed.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
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
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

enum State { READY, AT_WARP, AT_BLOCK, DONE };
constexpr unsigned MAX_THREADS_OF_A_BLOCK = 1024, WARP = 32;
struct Copy {
  void *to;
  uint4 value;
};
struct Thread {
  jmp_buf at;
  State state;
  unsigned exchanges;              // warp instructions so far
  std::vector<std::vector<Copy>> copies;  // committed groups, and the one being filled
};
struct Exchange {
  uint64_t word[WARP][8];
};
static std::vector<Thread> thread_of(MAX_THREADS_OF_A_BLOCK);
static Exchange exchange_of[MAX_THREADS_OF_A_BLOCK / WARP][2];
static jmp_buf scheduler;
static int arrived, counted;  // sums over the barrier being filled, and over the last one

[[noreturn]] static void broken(const char *what) {
  fprintf(stderr, "emulator: block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  abort();
}

// A fiber is entered once through its context; after that _setjmp and _longjmp switch without a system call.
static void wait_at(State barrier) {
  Thread &self = thread_of[threadIdx.x];
  self.state = barrier;
  if (_setjmp(self.at) == 0) _longjmp(scheduler, 1);
}
static void __syncthreads() { wait_at(AT_BLOCK); }
static int __syncthreads_count(int predicate) {
  arrived += predicate != 0;
  wait_at(AT_BLOCK);
  return counted;
}
static int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
static void __syncwarp(unsigned = 0xffffffffu) { wait_at(AT_WARP); }

// Every lane shows its words to the others; two buffers, since a lane may be one instruction ahead.
static const Exchange &exchange(const uint64_t *words, int count) {
  Exchange &shared = exchange_of[threadIdx.x / WARP][thread_of[threadIdx.x].exchanges++ % 2];
  for (int i = 0; i < count; i++) shared.word[threadIdx.x % WARP][i] = words[i];
  wait_at(AT_WARP);
  return shared;
}
template <typename T>
static T shuffle(T x, unsigned lane) {
  uint64_t word = 0;
  memcpy(&word, &x, sizeof(T));
  T y;
  memcpy(&y, exchange(&word, 1).word[lane], sizeof(T));
  return y;
}
template <typename T>
static T __shfl_sync(unsigned, T x, int lane) { return shuffle(x, lane % WARP); }
template <typename T>
static T __shfl_xor_sync(unsigned, T x, int mask) { return shuffle(x, (threadIdx.x % WARP) ^ mask); }
template <typename T>
static T __shfl_up_sync(unsigned, T x, unsigned delta) {
  const unsigned lane = threadIdx.x % WARP;
  return shuffle(x, lane >= delta ? lane - delta : lane);
}
template <typename T>
static T __shfl_down_sync(unsigned, T x, unsigned delta) {
  const unsigned lane = threadIdx.x % WARP;
  return shuffle(x, lane + delta < WARP ? lane + delta : lane);
}
static unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t word = predicate != 0;
  const Exchange &all = exchange(&word, 1);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < WARP; lane++) ballot |= unsigned(all.word[lane][0]) << lane;
  return ballot;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
static inline T max(T a, T b) { return a < b ? b : a; }
using std::erf, std::exp, std::exp2, std::fabs, std::fmax, std::fmin, std::sqrt;

#define __global__
#define __device__ static
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define SHARED(type, name) static Shared<Type<type>> memory_of_##name; auto &name = memory_of_##name.object()
#define __align__(n) __attribute__((aligned(n)))
#define UNROLL
#define ROLLED

// A block's object in shared memory, filled anew in each, with its end against a page that faults.
static unsigned long long blocks_begun;
template <typename T>
class Shared {
  const size_t page = sysconf(_SC_PAGESIZE), bytes = (sizeof(T) + page - 1) / page * page;
  char *const memory = static_cast<char *>(mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  unsigned long long block = 0;

 public:
  Shared() {
    if (memory == MAP_FAILED || mprotect(memory + bytes, page, PROT_NONE)) broken("no memory");
  }
  T &object() {
    if (block != blocks_begun) memset(memory, 0xff, bytes);
    block = blocks_begun;
    return *reinterpret_cast<T *>(memory + bytes - (sizeof(T) + 15) / 16 * 16);
  }
};

#include "cuda/device.h"
#include KERNEL

// The instructions of csrc/cuda/device.h.
static inline float bits_to_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline unsigned float_to_bits(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float exp2_approximate(float x) { return std::exp2(x); }

static void aligned_to_16(const void *p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) broken("an address that must be a multiple of 16 is not");
}
static inline void copy16(void *shared, const void *global, bool valid) {
  aligned_to_16(shared);
  aligned_to_16(global);
  const uint4 value = valid ? *static_cast<const uint4 *>(global) : uint4{0, 0, 0, 0};
  if (__CUDA_ARCH__ < 800) {
    *static_cast<uint4 *>(shared) = value;
    return;
  }
  memset(shared, 0xff, 16);
  thread_of[threadIdx.x].copies.back().push_back({shared, value});
}
static inline void copies_commit() { thread_of[threadIdx.x].copies.emplace_back(); }
template <int pending>
static inline void copies_wait() {
  auto &copies = thread_of[threadIdx.x].copies;  // the last is not committed
  while (copies.size() > pending + 1u) {
    for (const Copy &copy : copies.front()) *static_cast<uint4 *>(copy.to) = copy.value;
    copies.erase(copies.begin());
  }
}

template <bool transposed>
static inline void load_matrices(unsigned (&r)[4], const void *row) {
  aligned_to_16(row);
  const uint64_t word = reinterpret_cast<uint64_t>(row);
  const Exchange &rows = exchange(&word, 1);
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const auto element = [&](int y, int x) -> unsigned { return reinterpret_cast<const uint16_t *>(rows.word[8 * i + y][0])[x]; };
    r[i] = transposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
  }
}

static float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                                         : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}
static const std::vector<float> HALVES = [] {
  std::vector<float> values(65536);
  for (int bits = 0; bits < 65536; bits++) values[bits] = half_to_float(bits);
  return values;
}();
static uint16_t float_to_half(float x) {  // to nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));
  const unsigned bits = float_to_bits(magnitude);
  return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}
static inline float to_float(f16 x) { return HALVES[x.bits]; }
static inline void from_float(float x, f16 &y) { y.bits = float_to_half(x); }

template <typename T>
static void emulated_mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const uint64_t words[] = {a[0], a[1], a[2], a[3], b0, b1};
  const Exchange &all = exchange(words, 6);
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const int high = i / 2, column = t + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; k++) {
      const int lane = k % 8 / 2, shift = k % 2 * 16;
      sum += double(to_float(T{uint16_t(all.word[4 * g + lane][high + k / 8 * 2] >> shift)})) *
             to_float(T{uint16_t(all.word[4 * column + lane][4 + k / 8] >> shift)});
    }
    c[i] += float(sum);
  }
}
static inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16) { emulated_mma<f16>(c, a, b0, b1); }
static inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) { emulated_mma<bf16>(c, a, b0, b1); }

static void (*kernel)(const PARAMS);
static PARAMS argument;
static void body() {
  kernel(argument);
  thread_of[threadIdx.x].state = DONE;
  _longjmp(scheduler, 1);
}

static void enter(unsigned t) {
  constexpr size_t stack = 64 << 10;
  static std::vector<char> stacks(MAX_THREADS_OF_A_BLOCK * stack);
  ucontext_t fiber;
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stacks.data() + t * stack;
  fiber.uc_stack.ss_size = stack;
  makecontext(&fiber, body, 0);
  setcontext(&fiber);
}

// Lets those go on who wait for nobody any more; false where the block is done.
static bool release(unsigned threads) {
  unsigned done = 0, at_block = 0, freed = 0;
  for (unsigned first = 0; first < threads; first += WARP) {
    unsigned at_warp = 0, last = first + WARP < threads ? first + WARP : threads;
    for (unsigned t = first; t < last; t++) {
      at_warp += thread_of[t].state == AT_WARP;
      done += thread_of[t].state == DONE;
      at_block += thread_of[t].state == AT_BLOCK;
    }
    if (at_warp == last - first)
      for (unsigned t = first; t < last; t++, freed++) thread_of[t].state = READY;
  }
  if (at_block == threads) {
    for (unsigned t = 0; t < threads; t++, freed++) thread_of[t].state = READY;
    counted = arrived, arrived = 0;
  }
  if (done == threads) return false;
  if (freed == 0) broken("some threads wait at a barrier that others never reach");
  return true;
}

static void run_block(unsigned threads) {
  static bool started;  // static: a local would be lost in the jump
  static unsigned t;
  blocks_begun++;
  for (t = 0; t < threads; t++) {
    thread_of[t].state = READY, thread_of[t].exchanges = 0;
    thread_of[t].copies.assign(1, {});
  }
  started = false;
  do {
    for (t = 0; t < threads; t++) {
      if (thread_of[t].state != READY) continue;
      threadIdx = {t, 0, 0};
      if (_setjmp(scheduler) == 0) {
        if (started) _longjmp(thread_of[t].at, 1);
        enter(t);
      }
    }
    started = true;
  } while (release(threads));
}

extern "C" int emulate(void *function, const unsigned *grid, unsigned threads, const void *params) {
  kernel = reinterpret_cast<void (*)(const PARAMS)>(function);
  argument = *static_cast<const PARAMS *>(params);
  gridDim = {grid[0], grid[1], 1}, blockDim = {threads, 1, 1};
  for (unsigned y = 0; y < grid[1]; y++)
    for (unsigned x = 0; x < grid[0]; x++) {
      blockIdx = {x, y, 0};
      run_block(threads);
    }
  return 0;
}

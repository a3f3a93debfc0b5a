// What the kernels of policy_attention share, forward and backward. A warp owns 16 rows of one head, queries or keys, while tiles of the
// other side pass by in steps of 16, so that little of a short sequence is padding.
#pragma once
#include "device.h"
#include "params.h"

constexpr float LOG2E = 1.44269504f;

// Blocks a multiprocessor shall hold of kernels in 16 bits up to 64 wide: as many as spill nothing. NVRTC allots a few registers more.
#ifdef __CUDACC_RTC__
constexpr int CROWD = 3;
#else
constexpr int CROWD = ARCH >= 800 ? 4 : 3;
#endif

template <typename T>
constexpr float FELT = sizeof(T) == 2 ? 1 / 16384.0f : 1 / 1048576.0f;  // a smaller share of eps in a row's sum is not felt

template <typename T, int WIDTH, int OWN>  // WIDTH: D rounded up; OWN: tensors of which a block owns rows
struct Tiles {
  static constexpr int BYTES = WIDTH * sizeof(T);  // the wider a row, the fewer at a time: 48 KB of shared memory everywhere
  static constexpr int WARPS = BYTES > 256 ? 2 / OWN : 4, ROWS = 16 * WARPS, STEP = BYTES > 128 ? 16 : 32;
  static constexpr int STAGES = ARCH >= 800 && BYTES * OWN <= 256 ? 2 : 1;
  static constexpr int UNIT = 16 / sizeof(T), UNITS = WIDTH / UNIT, PITCH = WIDTH + UNIT;
  static constexpr bool HELD = HAS_MMA<T> && WIDTH * OWN <= 128;  // own rows stay in registers
  __align__(16) T own[OWN][ROWS * PITCH];
  __align__(16) T passing[STAGES][2][STEP * PITCH];
};

// A tensor's rows of one head.
template <typename T>
struct Rows {
  const T *data;
  long long stride;
};

// The head and rows of a thread block, and of a thread in it: rows own + g and own + g + 8.
struct Place {
  int first, own, g, t;
  long long b, h, head;  // head: where its rows start in [B, H, N]
};
__device__ inline Place place(const PolicyAttentionParams &p, int rows) {
  const int lane = threadIdx.x % 32, parts = (p.N + rows - 1) / rows, first = blockIdx.x % parts * rows;
  const long long bh = blockIdx.x / parts;
  return {first, first + (int)threadIdx.x / 32 * 16, lane / 4, lane % 4 * 2, bh / p.H, bh % p.H, bh * p.N};
}
template <typename T>
__device__ Rows<T> rows_of(const void *x, const long long (&strides)[4], const Place &at) {
  return {(const T *)x + at.b * strides[0] + at.h * strides[1], strides[2]};
}

// Where the gradient of q (which = 0), k or v at that row begins.
template <typename T>
__device__ T *gradient_of(const PolicyAttentionParams &p, const Place &at, int row, int which) {
  return (T *)p.dqkv + (((at.b * p.N + row) * 3 + which) * p.H + at.h) * p.D;
}

template <typename S, int ROWS, typename T>
__device__ void fetch(T *to, const Rows<T> &from, int first, const PolicyAttentionParams &p) {
  copy_tile<ROWS, S::UNITS, S::PITCH, 32 * S::WARPS>(to, from.data + first * from.stride, from.stride, p.N - first, p.D);
}

__device__ inline bool finite(float x) { return x - x == 0; }

// Sets what is not finite in dropped rows of a tile to zero; each thread in what it has copied itself, before the barrier.
template <typename S, typename T>
__device__ void clean(T *tile, const float *policy, int first, const PolicyAttentionParams &p) {
  for (int row = threadIdx.x / S::UNITS; row < S::STEP; row += 32 * S::WARPS / S::UNITS) {
    if (first + row >= p.N || policy[first + row] > 0) continue;
    T *unit = tile + row * S::PITCH + threadIdx.x % S::UNITS * S::UNIT;
    for (int c = 0; c < S::UNIT; c++)
      if (!finite(to_float(unit[c]))) from_float(0, unit[c]);
  }
}

// A warp's 16 own rows, held in registers as the left side of products where there is room.
template <typename S, int WIDTH, typename T>
struct Left {
  const T *rows;
  unsigned held[S::HELD ? WIDTH / 16 : 1][4];
};
template <typename S, int WIDTH, typename T>
__device__ void hold(Left<S, WIDTH, T> &left) {
  const T *row = left.rows + threadIdx.x % 16 * S::PITCH + threadIdx.x % 32 / 16 * 8;
  if constexpr (S::HELD) UNROLL for (int k = 0; k < WIDTH / 16; k++) load_matrices<false>(left.held[k], row + k * 16);
}
// s [16, 16] += own rows times those of a tile.
template <typename S, int WIDTH, typename T>
__device__ void add_scores(float (&s)[2][4], const Left<S, WIDTH, T> &left, const T *tile) {
  if constexpr (S::HELD) {
    const int lane = threadIdx.x % 32;
    const T *right = tile + (lane % 8 + lane / 16 * 8) * S::PITCH + lane / 8 % 2 * 8;
    UNROLL for (int k = 0; k < WIDTH / 16; k++) {
      unsigned b[4];
      load_matrices<false>(b, right + k * 16);
      mma(s[0], left.held[k], b[0], b[1], T{});
      mma(s[1], left.held[k], b[2], b[3], T{});
    }
  } else {
    warp_product<false>(s, left.rows, S::PITCH, tile, S::PITCH, WIDTH);
  }
}

// The sum of a row's values over the four threads that share it.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

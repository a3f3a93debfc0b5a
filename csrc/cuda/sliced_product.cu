// The tiled matrix product that sliced_linear and sliced_mlp are made of: live blocks of full matrices, with bias, GELU and residual in
// its epilogue. grid (tiles of c): eight tiles below each other run together, and share their columns in the cache.
#include "device.h"
#include "params.h"

constexpr int GROUP = 8;
constexpr int PART = 4;  // steps whose sum is one term of the whole, in float32

template <typename T, int SIZE, bool DEPTH_ROWS>  // SIZE x SIZE of c for a thread block; DEPTH_ROWS: as in warp_product
__device__ void product(const SlicedProductParams &p) {
  constexpr int UNIT = 16 / sizeof(T), DEPTH = 4 * UNIT, HIGH = SIZE / 32, THREADS = 2 * SIZE;  // warps in two rows, each 32 columns wide
  constexpr int STAGES = ARCH < 800 ? 1 : SIZE == 64 ? 3 : 2;
  constexpr int A_ROW = DEPTH + UNIT, B_ROWS = DEPTH_ROWS ? DEPTH : SIZE, B_UNITS = (DEPTH_ROWS ? SIZE : DEPTH) / UNIT, B_ROW = (B_UNITS + 1) * UNIT;
  constexpr int A_TILE = SIZE * A_ROW, B_TILE = B_ROWS * B_ROW, C_ROW = SIZE + 8;
  constexpr int LOADED = STAGES * (A_TILE + B_TILE) * sizeof(T), STORED = 32 * C_ROW * sizeof(float);
  SHARED(unsigned char[(LOADED > STORED ? LOADED : STORED)], memory);
  T *a_tiles = (T *)memory, *b_tiles = a_tiles + STAGES * A_TILE;
  const int tid = threadIdx.x, lane = tid % 32, down = tid / 32 % 2, across = tid / 64;

  const long long tiles_down = (p.M + SIZE - 1) / SIZE, tiles_across = (p.N + SIZE - 1) / SIZE;
  const long long group = blockIdx.x / (GROUP * tiles_across) * GROUP, inside = blockIdx.x % (GROUP * tiles_across);
  const long long size = tiles_down - group < GROUP ? tiles_down - group : GROUP;
  const int first_row = (int)(group + inside % size) * SIZE, first_column = (int)(inside / size) * SIZE;
  auto place = [&](int unit, bool mapped) -> long long {
    if (!mapped) return unit;
    const int block = p.shift >= 0 ? unit >> p.shift : unit / p.width;
    return (long long)p.live[block] * p.width + (unit - block * p.width);
  };

  const T *a = (const T *)p.a, *b = (const T *)p.b;
  // Every thread copies 16 bytes of every LINES-th row. What lies across the depth is looked up once: its rows, or its only unit of columns.
  constexpr int A_LINES = THREADS * UNIT / DEPTH, B_LINES = THREADS / B_UNITS;
  static_assert(SIZE % A_LINES == 0 && B_ROWS % B_LINES == 0, "every thread copies as much");
  const int a_row = tid / (DEPTH / UNIT), a_unit = tid % (DEPTH / UNIT) * UNIT, b_line = tid / B_UNITS, b_unit = tid % B_UNITS * UNIT;
  const T *a_from = a + (first_row + a_row) * (long long)p.a_row + a_unit, *b_from[DEPTH_ROWS ? 1 : B_ROWS / B_LINES];
  bool b_inside[DEPTH_ROWS ? 1 : B_ROWS / B_LINES];
  UNROLL for (int i = 0; i < (DEPTH_ROWS ? 1 : B_ROWS / B_LINES); i++) {
    const int column = first_column + (DEPTH_ROWS ? b_unit : b_line + i * B_LINES);
    b_inside[i] = column < p.N;
    b_from[i] = b + (b_inside[i] ? place(column, p.live_columns) * (DEPTH_ROWS ? 1 : p.b_row) : 0);
  }
  auto fetch = [&](int k, int stage) {
    if (k < p.K) {
      UNROLL for (int i = 0; i < SIZE; i += A_LINES)
        copy16(a_tiles + stage * A_TILE + (a_row + i) * A_ROW + a_unit, a_from + i * (long long)p.a_row + k,
               first_row + a_row + i < p.M && k + a_unit < p.K);
      T *to = b_tiles + stage * B_TILE + b_line * B_ROW + b_unit;
      if constexpr (DEPTH_ROWS) {
        UNROLL for (int i = 0; i < B_ROWS; i += B_LINES) {
          const int depth = k + b_line + i;
          const bool valid = depth < p.K && b_inside[0];
          copy16(to + i * B_ROW, b_from[0] + (valid ? place(depth, p.live_depth) * p.b_row : 0), valid);
        }
      } else {
        const int depth = k + b_unit;
        const long long d = depth < p.K ? place(depth, p.live_depth) : 0;
        UNROLL for (int i = 0; i < B_ROWS / B_LINES; i++) copy16(to + i * B_LINES * B_ROW, b_from[i] + d, depth < p.K && b_inside[i]);
      }
    }
    copies_commit();
  };

  float total[HIGH][4][4] = {}, part[HIGH][4][4];
  for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage * DEPTH, stage);
  for (int k = 0, stage = 0; k < p.K; k += DEPTH) {
    fetch(k + (STAGES - 1) * DEPTH, (stage + STAGES - 1) % STAGES);
    copies_wait<STAGES - 1>();
    __syncthreads();
    const T *left = a_tiles + stage * A_TILE + down * 16 * HIGH * A_ROW, *right = b_tiles + stage * B_TILE + across * 32 * (DEPTH_ROWS ? 1 : B_ROW);
    if constexpr (sizeof(T) == 4) {  // sums of sums: as exact as a library that splits the depth
      if (k % (PART * DEPTH) == 0) UNROLL for (int h = 0; h < HIGH; h++) UNROLL for (int i = 0; i < 4; i++) UNROLL for (int e = 0; e < 4; e++)
        part[h][i][e] = 0;
      warp_product<DEPTH_ROWS>(part, left, A_ROW, right, B_ROW, DEPTH);
      if (k % (PART * DEPTH) == (PART - 1) * DEPTH || k + DEPTH >= p.K)
        UNROLL for (int h = 0; h < HIGH; h++) UNROLL for (int i = 0; i < 4; i++) UNROLL for (int e = 0; e < 4; e++)
          total[h][i][e] += part[h][i][e];
    } else {
      warp_product<DEPTH_ROWS>(total, left, A_ROW, right, B_ROW, DEPTH);
    }
    __syncthreads();
    stage = (stage + 1) % STAGES;
  }

  // Through shared memory, 32 rows at a time: threads side by side store columns side by side, and this code is there once. Unrolled over a
  // thread's elements it made 187 KB of a kernel.
  const T *bias = (const T *)p.bias;
  T *c = (T *)p.c, *other = (T *)p.other;
  float *rows = (float *)memory;
  const bool pairs = p.c_column == 1 && p.c_row % 2 == 0;
  ROLLED for (int pass = 0; pass < HIGH; pass++) {
    UNROLL for (int h = 0; h < HIGH; h++)
      if (h == pass) UNROLL for (int i = 0; i < 4; i++) UNROLL for (int r = 0; r < 2; r++)
        store_pair(rows + (down * 16 + r * 8 + lane / 4) * C_ROW + across * 32 + i * 8 + lane % 4 * 2, total[h][i][2 * r], total[h][i][2 * r + 1]);
    __syncthreads();
    ROLLED for (int at = tid; at < 32 * SIZE / 2; at += THREADS) {
      const int line = at / (SIZE / 2), inside = at % (SIZE / 2) * 2;
      const int row = first_row + (line / 16 * HIGH + pass) * 16 + line % 16, column = first_column + inside;
      if (row >= p.M || column >= p.N) continue;
      const bool two = column + 1 < p.N;
      float y[2] = {rows[line * C_ROW + inside], rows[line * C_ROW + inside + 1]};
      UNROLL for (int e = 0; e < 2; e++) {
        if (e == 1 && !two) continue;
        T *at = other + row * p.other_row + (column + e) * p.other_column;
        if (bias) y[e] += to_float(bias[place(column + e, p.live_columns)]);
        if (p.epilogue == 2) {
          const float x = to_float(*at), share = 0.5f * (1 + erff(x * 0.70710678f));
          y[e] *= share + x * 0.39894228f * expf(-0.5f * x * x);
          from_float(x * share, *at);
        } else {
          if (other) y[e] += to_float(*at);
          if (p.epilogue == 1) y[e] *= 0.5f * (1 + erff(y[e] * 0.70710678f));
        }
      }
      T *to = c + place(row, p.live_rows) * p.c_row + place(column, p.full_columns) * p.c_column;
      if (two && pairs) {
        store_pair(to, y[0], y[1]);
      } else {
        from_float(y[0], to[0]);
        if (two) from_float(y[1], to[p.c_column]);
      }
    }
    __syncthreads();
  }
}

// Large tiles pay where tensor cores would otherwise wait for memory. At least one block a multiprocessor: see short_attention.cu.
#define KERNEL_OF(type, size, name, depth_rows) \
  extern "C" __global__ void __launch_bounds__(2 * size, 1) sliced_product_##type##_##size##_##name(const SlicedProductParams p) { \
    if constexpr (size == 64 || HAS_MMA<type>) product<type, size, depth_rows>(p); \
  }
using f32 = float;
KERNEL_OF(f32, 64, columns, true) KERNEL_OF(f32, 64, depth, false)
KERNEL_OF(f16, 64, columns, true) KERNEL_OF(f16, 64, depth, false) KERNEL_OF(f16, 128, columns, true) KERNEL_OF(f16, 128, depth, false)
KERNEL_OF(bf16, 64, columns, true) KERNEL_OF(bf16, 64, depth, false) KERNEL_OF(bf16, 128, columns, true) KERNEL_OF(bf16, 128, depth, false)

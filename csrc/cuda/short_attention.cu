// Attention over short sequences, read from the fused qkv buffer; a thread block takes ROWS queries of one head and sequence.
// Keys in steps of 16, so that little of a short sequence is padding; their softmax, rescaled tile by tile, stays in registers.
// grid (tiles of ROWS queries of the longest sequence, for each head of each sequence).
#include "device.h"
#include "params.h"

constexpr float LOG2E = 1.44269504f;
constexpr float LAG = 8;  // powers of two that a row's weights may grow to before sums are rescaled, which costs as much as their products

template <typename T, int WIDTH>  // WIDTH: D rounded up
__device__ void attend(const ShortAttentionParams &p) {
  constexpr bool MMA = HAS_MMA<T>;
  constexpr int BYTES = WIDTH * sizeof(T);  // the wider a row, the fewer at a time: 48 KB of shared memory everywhere
  constexpr int WARPS = BYTES > 256 ? 2 : 4, ROWS = 16 * WARPS, KEYS = BYTES > 128 ? 16 : 32, STAGES = ARCH >= 800 && BYTES <= 256 ? 2 : 1;
  constexpr int UNIT = 16 / sizeof(T), UNITS = WIDTH / UNIT, PITCH = WIDTH + UNIT;
  SHARED(T[STAGES][2][KEYS * PITCH], keys);  // and values
  SHARED(T[ROWS * PITCH], queries);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4 * 2;
  const int parts = (p.N + ROWS - 1) / ROWS, part = blockIdx.x % parts, head = blockIdx.x / parts % p.H;
  const long long b = blockIdx.x / parts / p.H;
  const int C = p.H * p.D;
  T *out = (T *)p.out + head * p.D;

  long long base = b * p.N;
  int n = p.N;
  if (p.cu_seqlens) {  // whatever they hold, no row outside of the buffer is touched
    base = p.cu_seqlens[b];
    const long long end = p.cu_seqlens[b + 1] < p.T ? p.cu_seqlens[b + 1] : p.T;
    n = base < 0 || end <= base ? 0 : end - base < p.N ? (int)(end - base) : p.N;
    long long tail = p.cu_seqlens[p.B];  // rows past the last sequence are zero, and shared out over all blocks of a head
    if (tail < 0) tail = 0;
    const long long rows = (long long)p.B * parts * WARPS;
    for (long long row = tail + (b * parts + part) * WARPS + warp; row < p.T; row += rows)
      for (int c = lane * 2; c < p.D; c += 64) store_pair(out + row * C + c, 0, 0);
  }
  const int first = part * ROWS, own = first + warp * 16;
  if (first >= n) return;

  const T *qkv = (const T *)p.qkv + base * p.qkv_row + head * p.D;
  auto fetch_keys = [&](int start, int stage) {
    const T *key = qkv + start * p.qkv_row + C;
    if (start < n)
      copy_tile<KEYS, UNITS, PITCH, 32 * WARPS>(keys[stage][0], key, p.qkv_row, n - start, p.D),
          copy_tile<KEYS, UNITS, PITCH, 32 * WARPS>(keys[stage][1], key + C, p.qkv_row, n - start, p.D);
    copies_commit();
  };

  copy_tile<ROWS, UNITS, PITCH, 32 * WARPS>(queries, qkv + first * p.qkv_row, p.qkv_row, n - first, p.D);
  fetch_keys(0, 0);
  const float scale = p.scale * LOG2E;
  const T *mine = queries + warp * 16 * PITCH;
  unsigned q[MMA ? WIDTH / 16 : 1][4];
  float o[WIDTH / 8][4] = {}, peak[2] = {-infinity(), -infinity()}, sum[2] = {};
  for (int start = 0, stage = 0; start < n; start += KEYS) {
    if constexpr (STAGES == 2) fetch_keys(start + KEYS, stage ^ 1);
    copies_wait<STAGES - 1>();
    __syncthreads();
    if (own < n) {
      if constexpr (MMA)
        if (start == 0) UNROLL for (int k = 0; k < WIDTH / 16; k++) load_matrices<false>(q[k], mine + lane % 16 * PITCH + lane / 16 * 8 + k * 16);
      const T *k_tile = keys[stage][0], *v_tile = keys[stage][1];
      float s[KEYS / 16][2][4] = {};
      UNROLL for (int j = 0; j < KEYS / 16; j++) {
        if (start + j * 16 >= n) continue;
        if constexpr (MMA) {
          const T *right = k_tile + (j * 16 + lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
          UNROLL for (int k = 0; k < WIDTH / 16; k++) {
            unsigned kf[4];
            load_matrices<false>(kf, right + k * 16);
            mma(s[j][0], q[k], kf[0], kf[1], T{});
            mma(s[j][1], q[k], kf[2], kf[3], T{});
          }
        } else {
          warp_product<false>(s[j], mine, PITCH, k_tile + j * 16 * PITCH, PITCH, WIDTH);
        }
      }

      float highest[2] = {peak[0], peak[1]};
      UNROLL for (int j = 0; j < KEYS / 16; j++) {
        if (start + j * 16 + 16 > n) UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++)
          if (start + j * 16 + i * 8 + t + e % 2 >= n) s[j][i][e] = -infinity();
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) highest[e / 2] = fmaxf(highest[e / 2], s[j][i][e]);
      }
      UNROLL for (int r = 0; r < 2; r++) {  // the four threads of a row agree
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
      }
      if (__ballot_sync(0xffffffffu, (highest[0] - peak[0]) * scale > LAG || (highest[1] - peak[1]) * scale > LAG))
        UNROLL for (int r = 0; r < 2; r++) {
          const float factor = highest[r] == -infinity() ? 0 : exp2_approximate((peak[r] - highest[r]) * scale);
          peak[r] = highest[r], sum[r] *= factor;
          UNROLL for (int i = 0; i < WIDTH / 8; i++) o[i][2 * r] *= factor, o[i][2 * r + 1] *= factor;
        }
      const float shift[2] = {peak[0] == -infinity() ? 0 : peak[0] * scale, peak[1] == -infinity() ? 0 : peak[1] * scale};
      UNROLL for (int j = 0; j < KEYS / 16; j++) UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
        s[j][i][e] = exp2_approximate(s[j][i][e] * scale - shift[e / 2]);  // in one operation
        sum[e / 2] += s[j][i][e];
      }
      UNROLL for (int j = 0; j < KEYS / 16; j++)
        if (start + j * 16 < n) add_weighted(o, s[j], v_tile + j * 16 * PITCH, PITCH);
    }
    __syncthreads();
    if constexpr (STAGES == 2)
      stage ^= 1;
    else
      fetch_keys(start + KEYS, 0);
  }

  UNROLL for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    const int row = own + g + 8 * r;
    if (row >= n) continue;
    const float inverse = 1 / sum[r];
    UNROLL for (int i = 0; i < WIDTH / 8; i++)
      if (i * 8 < p.D) store_pair(out + (base + row) * C + i * 8 + t, o[i][2 * r] * inverse, o[i][2 * r + 1] * inverse);
  }
}

// At least one block a multiprocessor, said because some ptxas otherwise spill a register or two for more blocks.
#define KERNEL_OF(type, width) \
  extern "C" __global__ void __launch_bounds__(128, 1) short_attention_##type##_##width(const ShortAttentionParams p) { attend<type, width>(p); }
using f32 = float;
KERNEL_OF(f32, 32) KERNEL_OF(f32, 64) KERNEL_OF(f32, 128)
KERNEL_OF(f16, 32) KERNEL_OF(f16, 64) KERNEL_OF(f16, 128)
KERNEL_OF(bf16, 32) KERNEL_OF(bf16, 64) KERNEL_OF(bf16, 128)

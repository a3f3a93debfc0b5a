// Attention under a key policy: no scores in memory, their softmax, rescaled tile by tile, stays in registers.
// grid (tiles of ROWS queries, for each head of each image).
#include "policy_attention.h"

constexpr float LIFT = 10, LOWER = 1 / 1024.0f;  // weights are 2^LIFT as large on the way: no subnormals in f16 where they count beside eps

// o [2][4], of which [i][0] and [i][1] count, += the sums of 16 columns over 16 rows of v; a sum over g is missing without tensor cores.
template <typename T>
__device__ void add_rows(float (&o)[2][4], const T *v, int pitch) {
  if constexpr (HAS_MMA<T>) {
    const float ones[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
    add_weighted(o, ones, v, pitch);
  } else {
    const int lane = threadIdx.x % 32;
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int r = 0; r < 2; r++) {
      float x[2];
      load_values(x, v + (lane / 4 + 8 * r) * pitch + i * 8 + lane % 4 * 2);
      o[i][0] += x[0], o[i][1] += x[1];
    }
  }
}

// sum[0] and sum[2] += the sums of w's rows g and g + 8 as add_weighted rounds them: what the output is best divided by.
template <typename T>
__device__ void add_rounded(float (&sum)[4], const float (&w)[2][4]) {
  if constexpr (HAS_MMA<T>) {
    const unsigned a[4] = {pack<T>(w[0][0], w[0][1]), pack<T>(w[0][2], w[0][3]), pack<T>(w[1][0], w[1][1]), pack<T>(w[1][2], w[1][3])};
    const unsigned ones = pack<T>(1, 1);
    mma(sum, a, ones, ones, T{});
  }
}

template <typename T, int WIDTH>
__device__ void forward(const PolicyAttentionParams &p) {
  using S = Tiles<T, WIDTH, 1>;
  constexpr int STEP = S::STEP, PITCH = S::PITCH, SHARES = (WIDTH / 16 + S::WARPS - 1) / S::WARPS;
  SHARED(S, tiles);
  SHARED(float[2][STEP], kept);
  SHARED(float[WIDTH], mean);  // mean: the values', times eps
  const Place at = place(p, S::ROWS);
  const int tid = threadIdx.x, warp = tid / 32, own = at.own, g = at.g, t = at.t;
  const Rows<T> q = rows_of<T>(p.q, p.q_strides, at), k = rows_of<T>(p.k, p.k_strides, at), v = rows_of<T>(p.v, p.v_strides, at);
  const float *policy = p.policy + at.b * p.N;
  auto fetch_keys = [&](int start, int stage) {
    if (start < p.N) fetch<S>(tiles.passing[stage][0], k, start, STEP, p), fetch<S>(tiles.passing[stage][1], v, start, STEP, p);
    copies_commit();
  };
  auto kept_of = [&](int key) { return tid < STEP && key < p.N ? policy[key] : 0; };

  fetch<S>(tiles.own[0], q, at.first, S::ROWS, p);
  fetch_keys(0, 0);
  if (tid < STEP) kept[0][tid] = kept_of(tid);
  const float scale = p.scale * LOG2E;
  const bool active = own < p.N;
  Left<S, WIDTH, T> queries;
  queries.rows = tiles.own[0] + warp * 16 * PITCH;
  float o[WIDTH / 8][4] = {}, values[SHARES][2][4] = {}, peak[2] = {-infinity(), -infinity()}, sum[2] = {}, mixed[4] = {};
  for (int start = 0, turn = 0; start < p.N; start += STEP, turn ^= 1) {
    const int stage = S::STAGES == 2 ? turn : 0;
    if constexpr (S::STAGES == 2) fetch_keys(start + STEP, stage ^ 1);
    const float next = kept_of(start + STEP + tid);
    copies_wait<S::STAGES - 1>();
    const T *k_tile = tiles.passing[stage][0], *v_tile = tiles.passing[stage][1];
    if (p.eps == 0) clean<S>(tiles.passing[stage][1], policy, start, p);
    __syncthreads();
    if (start == 0) hold(queries);
    if (p.eps > 0)
      UNROLL for (int c = 0; c < SHARES; c++) UNROLL for (int j = 0; j < STEP / 16; j++)
        if ((c * S::WARPS + warp) * 16 < WIDTH) add_rows(values[c], v_tile + j * 16 * PITCH + (c * S::WARPS + warp) * 16, PITCH);
    if (active) {
      float s[STEP / 16][2][4] = {}, w[STEP / 16][2][4], highest[2] = {peak[0], peak[1]};
      UNROLL for (int j = 0; j < STEP / 16; j++) {
        const int key = start + j * 16;
        if (key < p.N) add_scores(s[j], queries, k_tile + j * 16 * PITCH);
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
          const int column = i * 8 + t + e % 2;
          const bool itself = key == own && i == e / 2 && t + e % 2 == g;
          w[j][i][e] = itself ? 1 : kept[turn][j * 16 + column];
          const bool seen = key + column < p.N && (p.eps > 0 || w[j][i][e] > 0);
          s[j][i][e] = seen ? s[j][i][e] * scale : -infinity();
          highest[e / 2] = fmaxf(highest[e / 2], s[j][i][e]);
        }
      }
      UNROLL for (int r = 0; r < 2; r++) {  // the four threads of a row agree
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
        const float shift = highest[r] == -infinity() ? 0 : highest[r], factor = exp2_approximate(peak[r] - shift);
        peak[r] = highest[r], highest[r] = shift - LIFT;
        sum[r] *= factor, mixed[2 * r] *= factor;
        UNROLL for (int i = 0; i < WIDTH / 8; i++) o[i][2 * r] *= factor, o[i][2 * r + 1] *= factor;
      }
      UNROLL for (int j = 0; j < STEP / 16; j++) {
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
          w[j][i][e] *= exp2_approximate(s[j][i][e] - highest[e / 2]);
          sum[e / 2] += w[j][i][e];
        }
        if (start + j * 16 >= p.N) continue;
        add_weighted(o, w[j], v_tile + j * 16 * PITCH, PITCH);
        add_rounded<T>(mixed, w[j]);
      }
    }
    if (tid < STEP) kept[turn ^ 1][tid] = next;
    __syncthreads();
    if constexpr (S::STAGES == 1) fetch_keys(start + STEP, 0);
  }

  if (p.eps > 0) {
    UNROLL for (int c = 0; c < SHARES; c++) UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 2; e++) {
      float x = values[c][i][e];
      if constexpr (!HAS_MMA<T>) for (int lane = 4; lane < 32; lane *= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
      const int column = (c * S::WARPS + warp) * 16 + i * 8 + t + e;
      if (g == 0 && column < WIDTH) mean[column] = x * (p.eps / p.N);
    }
    __syncthreads();
  }
  if (!active) return;
  T *out = (T *)p.out + at.b * p.out_strides[0] + at.h * p.out_strides[1];
  UNROLL for (int r = 0; r < 2; r++) {
    const float z = row_sum(sum[r]) * LOWER, inverse = 1 / ((HAS_MMA<T> ? mixed[2 * r] * LOWER : z) + p.eps);
    const int row = own + g + 8 * r;
    if (row >= p.N) continue;
    const bool dropped = p.eps == 0 && !(policy[row] > 0);
    UNROLL for (int i = 0; i < WIDTH / 8; i++) {
      if (i * 8 >= p.D) continue;
      float y[2];
      UNROLL for (int e = 0; e < 2; e++) {
        y[e] = o[i][2 * r + e] * LOWER;
        if (p.eps > 0) y[e] += mean[i * 8 + t + e];
        y[e] *= inverse;
        if (dropped) {  // its own value as it is: what is not finite was left out, and no weight makes it so
          const float x = to_float(v.data[row * v.stride + i * 8 + t + e]);
          if (!finite(x)) y[e] += x;
        }
      }
      store_pair(out + row * p.out_strides[2] + i * 8 + t, y[0], y[1]);
    }
    if (t == 0) p.m[at.head + row] = peak[r], p.z[at.head + row] = z;
  }
}

#define KERNEL_OF(pass, type, width, blocks) \
  extern "C" __global__ void __launch_bounds__(128, blocks) policy_attention_##pass##_##type##_##width(const PolicyAttentionParams p) { \
    pass<type, width>(p); \
  }
#define KERNELS_OF(type, width) KERNEL_OF(forward, type, width, width == 128 ? 2 : 3)
using f32 = float;
KERNELS_OF(f32, 32) KERNELS_OF(f32, 64) KERNELS_OF(f32, 128)
KERNELS_OF(f16, 32) KERNELS_OF(f16, 64) KERNELS_OF(f16, 128)
KERNELS_OF(bf16, 32) KERNELS_OF(bf16, 64) KERNELS_OF(bf16, 128)

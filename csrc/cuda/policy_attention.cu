// Attention under a key policy: no scores in memory, their softmax, rescaled tile by tile, stays in registers.
// grid (tiles of ROWS queries, for each head of each image).
#include "policy_attention.h"

constexpr float LIFT = 10, LOWER = 1 / 1024.0f;  // weights are 2^LIFT as large on the way: no subnormals in f16 where they count beside eps

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
  constexpr int STEP = S::STEP, PITCH = S::PITCH;
  SHARED(S, tiles);
  SHARED(float[2][STEP], kept);
  const Place at = place(p, S::ROWS);
  const int tid = threadIdx.x, warp = tid / 32, own = at.own, g = at.g, t = at.t;
  const Rows<T> q = rows_of<T>(p.q, p.q_strides, at), k = rows_of<T>(p.k, p.k_strides, at), v = rows_of<T>(p.v, p.v_strides, at);
  const float *policy = p.policy + at.b * p.N;
  auto fetch_keys = [&](int start, int stage) {
    if (start < p.N) fetch<S, STEP>(tiles.passing[stage][0], k, start, p), fetch<S, STEP>(tiles.passing[stage][1], v, start, p);
    copies_commit();
  };
  auto kept_of = [&](int key) { return tid < STEP && key < p.N ? policy[key] : 0; };

  fetch<S, S::ROWS>(tiles.own[0], q, at.first, p);
  fetch_keys(0, 0);
  if (tid < STEP) kept[0][tid] = kept_of(tid);
  const float scale = p.scale * LOG2E;
  const bool active = own < p.N;
  Left<S, WIDTH, T> queries;
  queries.rows = tiles.own[0] + warp * 16 * PITCH;
  float o[WIDTH / 8][4] = {}, peak[2] = {-infinity(), -infinity()}, sum[2] = {}, rounded_sum[4] = {};
  for (int start = 0, turn = 0; start < p.N; start += STEP, turn ^= 1) {
    const int stage = S::STAGES == 2 ? turn : 0;
    if constexpr (S::STAGES == 2) fetch_keys(start + STEP, stage ^ 1);
    const float next = kept_of(start + STEP + tid);
    copies_wait<S::STAGES - 1>();
    const T *k_tile = tiles.passing[stage][0], *v_tile = tiles.passing[stage][1];
    if (p.eps == 0) clean<S>(tiles.passing[stage][1], policy, start, p);
    __syncthreads();
    if (start == 0) hold(queries);
    if (active) {
      float s[STEP / 16][2][4] = {}, w[STEP / 16][2][4], highest[2] = {peak[0], peak[1]};
      UNROLL for (int j = 0; j < STEP / 16; j++) {
        const int key = start + j * 16;
        if (key < p.N) add_scores(s[j], queries, k_tile + j * 16 * PITCH);
        const bool itself[2] = {key == own && t == g, key == own && t + 1 == g};
        UNROLL for (int i = 0; i < 2; i++) {
          float share[2];
          load_values(share, kept[turn] + j * 16 + i * 8 + t);
          UNROLL for (int e = 0; e < 4; e++) s[j][i][e] *= scale, w[j][i][e] = i == e / 2 && itself[e % 2] ? 1 : share[e % 2];
        }
        if (key + 16 > p.N || p.eps == 0) UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
          const bool seen = key + i * 8 + t + e % 2 < p.N && (p.eps > 0 || w[j][i][e] > 0);
          s[j][i][e] = seen ? s[j][i][e] : -infinity();
        }
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) highest[e / 2] = fmaxf(highest[e / 2], s[j][i][e]);
      }
      UNROLL for (int r = 0; r < 2; r++) {  // the four threads of a row agree
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
        const float shift = highest[r] == -infinity() ? 0 : highest[r], factor = exp2_approximate(peak[r] - shift);
        peak[r] = highest[r], highest[r] = shift - LIFT;
        sum[r] *= factor, rounded_sum[2 * r] *= factor;
        UNROLL for (int i = 0; i < WIDTH / 8; i++) o[i][2 * r] *= factor, o[i][2 * r + 1] *= factor;
      }
      UNROLL for (int j = 0; j < STEP / 16; j++) {
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
          w[j][i][e] *= exp2_approximate(s[j][i][e] - highest[e / 2]);
          sum[e / 2] += w[j][i][e];
        }
        if (start + j * 16 >= p.N) continue;
        add_weighted(o, w[j], v_tile + j * 16 * PITCH, PITCH);
        add_rounded<T>(rounded_sum, w[j]);
      }
    }
    if (tid < STEP) kept[turn ^ 1][tid] = next;
    __syncthreads();
    if constexpr (S::STAGES == 1) fetch_keys(start + STEP, 0);
  }

  float z[2];
  UNROLL for (int r = 0; r < 2; r++) z[r] = row_sum(sum[r]) * LOWER;
  // eps gives every value a share, which shows only where eps is much of a row's sum: where dropped keys alone are near its maximum.
  auto shows = [&](int r) { return own + g + 8 * r < p.N && p.eps > FELT<T> * (z[r] + p.eps); };
  if (__syncthreads_or(shows(0) || shows(1))) {
    float *mean = (float *)tiles.own[0];
    for (int c = tid; c < p.D; c += 32 * S::WARPS) {
      float sum = 0;
      for (int row = 0; row < p.N; row++) sum += to_float(v.data[row * v.stride + c]);
      mean[c] = sum * (p.eps / p.N) / LOWER;
    }
    __syncthreads();
    UNROLL for (int i = 0; i < WIDTH / 8; i++) UNROLL for (int e = 0; e < 4; e++)
      if (i * 8 < p.D) o[i][e] += mean[i * 8 + t + e % 2];
  }
  if (!active) return;
  T *out = (T *)p.out + at.b * p.out_strides[0] + at.h * p.out_strides[1];
  UNROLL for (int r = 0; r < 2; r++) {
    const float inverse = 1 / ((HAS_MMA<T> ? rounded_sum[2 * r] * LOWER : z[r]) + p.eps);
    const int row = own + g + 8 * r;
    if (row >= p.N) continue;
    const bool dropped = p.eps == 0 && !(policy[row] > 0);
    UNROLL for (int i = 0; i < WIDTH / 8; i++) {
      if (i * 8 >= p.D) continue;
      float y[2];
      UNROLL for (int e = 0; e < 2; e++) {
        y[e] = o[i][2 * r + e] * LOWER * inverse;
        if (dropped) {  // its own value as it is: what is not finite was left out, and no weight makes it so
          const float x = to_float(v.data[row * v.stride + i * 8 + t + e]);
          if (!finite(x)) y[e] += x;
        }
      }
      store_pair(out + row * p.out_strides[2] + i * 8 + t, y[0], y[1]);
    }
    if (t == 0) p.m[at.head + row] = peak[r], p.z[at.head + row] = z[r];
  }
}

#define KERNEL_OF(pass, type, width, blocks) \
  extern "C" __global__ void __launch_bounds__(128, blocks) policy_attention_##pass##_##type##_##width(const PolicyAttentionParams p) { \
    pass<type, width>(p); \
  }
#define KERNELS_OF(type, width) KERNEL_OF(forward, type, width, width == 128 ? 2 : sizeof(type) == 2 ? CROWD : 3)
using f32 = float;
KERNELS_OF(f32, 32) KERNELS_OF(f32, 64) KERNELS_OF(f32, 128)
KERNELS_OF(f16, 32) KERNELS_OF(f16, 64) KERNELS_OF(f16, 128)
KERNELS_OF(bf16, 32) KERNELS_OF(bf16, 64) KERNELS_OF(bf16, 128)

// The gradient of policy_attention to q, k, v and policy, from the maximum and sum that the forward pass kept of each row: no atomics.
// query_gradient owns queries and writes delta, dm and top, which key_gradient, launched after it, reads; that one owns keys.
// grid (tiles of ROWS rows, for each head of each image).
#include "policy_attention.h"

constexpr float HIGHEST = 80 * LOG2E;  // the most a dropped key's score counts above its row's level, for the gradient of its policy
template <typename T>
constexpr bool EXACT = sizeof(T) == 4;  // a row's level is its maximum; where digits are few, with the logarithm of its sum

template <typename T, int WIDTH>
__device__ void query_gradient(const PolicyAttentionParams &p) {
  using S = Tiles<T, WIDTH, 2>;
  constexpr int STEP = S::STEP, PITCH = S::PITCH;
  SHARED(S, tiles);
  SHARED(float[2][STEP], kept);
  const Place at = place(p, S::ROWS);
  const int tid = threadIdx.x, warp = tid / 32, own = at.own, g = at.g, t = at.t;
  const Rows<T> q = rows_of<T>(p.q, p.q_strides, at), k = rows_of<T>(p.k, p.k_strides, at), v = rows_of<T>(p.v, p.v_strides, at);
  const Rows<T> dout = rows_of<T>(p.dout, p.dout_strides, at), out = rows_of<T>(p.out, p.out_strides, at);
  const float *policy = p.policy + at.b * p.N;
  auto fetch_keys = [&](int start, int stage) {
    if (start < p.N) fetch<S, STEP>(tiles.passing[stage][0], k, start, p), fetch<S, STEP>(tiles.passing[stage][1], v, start, p);
    copies_commit();
  };
  auto kept_of = [&](int key) { return tid < STEP && key < p.N ? policy[key] : 0; };

  fetch<S, S::ROWS>(tiles.own[0], q, at.first, p);
  fetch<S, S::ROWS>(tiles.own[1], dout, at.first, p);
  fetch_keys(0, 0);
  if (tid < STEP) kept[0][tid] = kept_of(tid);
  const float scale = p.scale * LOG2E;
  const bool active = own < p.N;
  float peak[2] = {}, inverse[2] = {}, delta[2] = {};
  UNROLL for (int r = 0; r < 2; r++) {
    const int row = own + g + 8 * r;
    if (row < p.N) {
      UNROLL for (int i = 0; i < WIDTH / 8; i++) {
        if (i * 8 >= p.D) continue;
        float x[2], y[2];
        load_values(x, out.data + row * out.stride + i * 8 + t);
        load_values(y, dout.data + row * dout.stride + i * 8 + t);
        delta[r] += x[0] * y[0] + x[1] * y[1];
      }
      peak[r] = p.m[at.head + row], inverse[r] = 1 / (p.z[at.head + row] + p.eps);
    }
    delta[r] = row_sum(delta[r]);
    if (row < p.N && t == 0) p.delta[at.head + row] = delta[r];
  }
  Left<S, WIDTH, T> queries, ups;
  queries.rows = tiles.own[0] + warp * 16 * PITCH, ups.rows = tiles.own[1] + warp * 16 * PITCH;

  // Where dropped keys alone are near a row's maximum, eps is much of its sum and the maximum has a gradient, all at one key's score.
  float dm[2] = {};
  int top[2] = {-1, -1};
  auto felt = [&](int r) { return own + g + 8 * r < p.N && p.eps * inverse[r] > FELT<T>; };
  if (__syncthreads_or(felt(0) || felt(1))) {
    float best[2] = {-infinity(), -infinity()}, mean[2];  // mean: of a row's weights
    UNROLL for (int r = 0; r < 2; r++) mean[r] = (1 / inverse[r] - p.eps) / p.N;
    for (int start = 0; start < p.N; start += STEP) {
      if (start > 0) fetch_keys(start, 0);
      if (start > 0 && tid < STEP) kept[0][tid] = kept_of(start + tid);
      copies_wait<0>();
      __syncthreads();
      if (start == 0) hold(queries), hold(ups);
      for (int j = 0; active && j < STEP && start + j < p.N; j += 16) {
        float s[2][4] = {}, da[2][4] = {};
        add_scores(s, queries, tiles.passing[0][0] + j * PITCH);
        add_scores(da, ups, tiles.passing[0][1] + j * PITCH);
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
          const int column = j + i * 8 + t + e % 2, key = start + column, r = e / 2;
          const float x = key < p.N ? s[i][e] * scale : -infinity(), share = key == own + g + 8 * r ? 1 : kept[0][column];
          if (x > best[r]) best[r] = x, top[r] = key;
          dm[r] += da[i][e] * (mean[r] - exp2_approximate(x - peak[r]) * share);
        }
      }
      __syncthreads();
    }
    fetch_keys(0, 0);
    if (tid < STEP) kept[0][tid] = kept_of(tid);
    UNROLL for (int r = 0; r < 2; r++) {
      UNROLL for (int lane = 1; lane < 4; lane *= 2) {
        const float x = __shfl_xor_sync(0xffffffffu, best[r], lane);
        const int key = __shfl_xor_sync(0xffffffffu, top[r], lane);
        if (x > best[r] || (x == best[r] && key < top[r])) best[r] = x, top[r] = key;
      }
      dm[r] = row_sum(dm[r]) * p.eps * inverse[r] * inverse[r];
      if (!felt(r)) top[r] = -1;
    }
  }
  float acc[WIDTH / 8][4] = {};
  UNROLL for (int r = 0; r < 2; r++) {
    const int row = own + g + 8 * r;
    if (row < p.N && t == 0) p.dm[at.head + row] = dm[r], p.top[at.head + row] = top[r];
    if (top[r] < 0) continue;
    UNROLL for (int i = 0; i < WIDTH / 8; i++) {
      if (i * 8 >= p.D) continue;
      float x[2];
      load_values(x, k.data + top[r] * k.stride + i * 8 + t);
      acc[i][2 * r] = dm[r] * x[0], acc[i][2 * r + 1] = dm[r] * x[1];
    }
  }

  float level[2];
  UNROLL for (int r = 0; r < 2; r++) level[r] = peak[r] - (EXACT<T> ? 0 : log2f(inverse[r]));
  for (int start = 0, turn = 0; start < p.N; start += STEP, turn ^= 1) {
    const int stage = S::STAGES == 2 ? turn : 0;
    if constexpr (S::STAGES == 2) fetch_keys(start + STEP, stage ^ 1);
    const float next = kept_of(start + STEP + tid);
    copies_wait<S::STAGES - 1>();
    const T *k_tile = tiles.passing[stage][0], *v_tile = tiles.passing[stage][1];
    if (p.eps == 0) clean<S>(tiles.passing[stage][0], policy, start, p), clean<S>(tiles.passing[stage][1], policy, start, p);
    __syncthreads();
    if (start == 0) hold(queries), hold(ups);
    for (int j = 0; active && j < STEP && start + j < p.N; j += 16) {
      float s[2][4] = {}, ds[2][4] = {};
      add_scores(s, queries, k_tile + j * PITCH);
      add_scores(ds, ups, v_tile + j * PITCH);
      const bool itself[2] = {start + j == own && t == g, start + j == own && t + 1 == g};
      UNROLL for (int i = 0; i < 2; i++) {
        float share[2];
        load_values(share, kept[turn] + j + i * 8 + t);
        UNROLL for (int e = 0; e < 4; e++) {
          const float e_or_a = exp2_approximate(fminf(s[i][e] * scale - level[e / 2], HIGHEST)), a = EXACT<T> ? e_or_a * inverse[e / 2] : e_or_a;
          ds[i][e] = (ds[i][e] - delta[e / 2]) * a * (i == e / 2 && itself[e % 2] ? 1 : share[e % 2]);
        }
      }
      add_weighted(acc, ds, k_tile + j * PITCH, PITCH);
    }
    if (tid < STEP) kept[turn ^ 1][tid] = next;
    __syncthreads();
    if constexpr (S::STAGES == 1) fetch_keys(start + STEP, 0);
  }

  UNROLL for (int r = 0; r < 2; r++) {
    const int row = own + g + 8 * r;
    if (row >= p.N) continue;
    T *dq = gradient_of<T>(p, at, row, 0) + t;
    UNROLL for (int i = 0; i < WIDTH / 8; i++)
      if (i * 8 < p.D) store_pair(dq + i * 8, acc[i][2 * r] * p.scale, acc[i][2 * r + 1] * p.scale);
  }
}

template <typename T, int WIDTH>
__device__ void key_gradient(const PolicyAttentionParams &p) {
  using S = Tiles<T, WIDTH, 2>;
  constexpr int STEP = S::STEP, PITCH = S::PITCH;
  SHARED(S, tiles);
  SHARED(float[2][STEP], level);  // of the queries that pass, as in query_gradient
  SHARED(float[2][STEP], inverse);
  SHARED(float[2][STEP], delta);
  SHARED(float[2][STEP], dm);
  SHARED(int[2][STEP], top);
  const Place at = place(p, S::ROWS);
  const int tid = threadIdx.x, warp = tid / 32, own = at.own, g = at.g, t = at.t;
  const Rows<T> q = rows_of<T>(p.q, p.q_strides, at), k = rows_of<T>(p.k, p.k_strides, at), v = rows_of<T>(p.v, p.v_strides, at);
  const Rows<T> dout = rows_of<T>(p.dout, p.dout_strides, at);
  auto fetch_queries = [&](int start, int stage) {
    if (start < p.N) fetch<S, STEP>(tiles.passing[stage][0], q, start, p), fetch<S, STEP>(tiles.passing[stage][1], dout, start, p);
    copies_commit();
  };
  const float scale = p.scale * LOG2E, floor = p.eps / p.N;
  float next[4];
  int next_top;
  auto look = [&](int query) {
    const bool valid = tid < STEP && query < p.N;
    const float sum = valid ? p.z[at.head + query] + p.eps : 1;
    next[0] = valid ? p.m[at.head + query] + (EXACT<T> ? 0 : log2f(sum)) : infinity(), next[1] = valid ? 1 / sum : 0;
    next[2] = valid ? p.delta[at.head + query] : 0, next[3] = valid ? p.dm[at.head + query] : 0;
    next_top = valid ? p.top[at.head + query] : -1;
  };
  auto keep = [&](int turn) {
    if (tid >= STEP) return;
    level[turn][tid] = next[0], inverse[turn][tid] = next[1], delta[turn][tid] = next[2], dm[turn][tid] = next[3], top[turn][tid] = next_top;
  };

  fetch<S, S::ROWS>(tiles.own[0], k, at.first, p);
  fetch<S, S::ROWS>(tiles.own[1], v, at.first, p);
  fetch_queries(0, 0);
  look(tid);
  keep(0);
  const bool active = own < p.N;
  float dk[WIDTH / 8][4] = {}, dv[WIDTH / 8][4] = {}, kept[2], dpolicy[2] = {};
  UNROLL for (int r = 0; r < 2; r++) kept[r] = own + g + 8 * r < p.N ? p.policy[at.b * p.N + own + g + 8 * r] : 0;
  Left<S, WIDTH, T> keys, values;
  keys.rows = tiles.own[0] + warp * 16 * PITCH, values.rows = tiles.own[1] + warp * 16 * PITCH;
  for (int start = 0, turn = 0; start < p.N; start += STEP, turn ^= 1) {
    const int stage = S::STAGES == 2 ? turn : 0;
    if constexpr (S::STAGES == 2) fetch_queries(start + STEP, stage ^ 1);
    look(start + STEP + tid);
    copies_wait<S::STAGES - 1>();
    const T *q_tile = tiles.passing[stage][0], *up_tile = tiles.passing[stage][1];
    __syncthreads();
    if (start == 0) hold(keys), hold(values);
    for (int j = 0; active && j < STEP && start + j < p.N; j += 16) {
      float s[2][4] = {}, ds[2][4] = {};
      add_scores(s, keys, q_tile + j * PITCH);
      add_scores(ds, values, up_tile + j * PITCH);
      const bool itself[2] = {start + j == own && t == g, start + j == own && t + 1 == g};
      UNROLL for (int i = 0; i < 2; i++) {
        UNROLL for (int e = 0; e < 4; e++) {
          const int column = j + i * 8 + t + e % 2;
          const bool own_score = i == e / 2 && itself[e % 2];
          const float e_or_a = exp2_approximate(fminf(s[i][e] * scale - level[turn][column], HIGHEST));
          const float a = EXACT<T> ? e_or_a * inverse[turn][column] : e_or_a;
          const float de = (ds[i][e] - delta[turn][column]) * a, share = own_score ? 1 : kept[e / 2];
          if (!own_score) dpolicy[e / 2] += de;
          ds[i][e] = de * share;
          s[i][e] = a * share + floor * inverse[turn][column];
        }
      }
      const int its_top = top[turn][j + tid % 16];
      if (__ballot_sync(0xffffffffu, its_top >= own && its_top < own + 16))
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++)
          if (const int column = j + i * 8 + t + e % 2; top[turn][column] == own + g + 8 * (e / 2)) ds[i][e] += dm[turn][column];
      add_weighted(dv, s, up_tile + j * PITCH, PITCH);
      add_weighted(dk, ds, q_tile + j * PITCH, PITCH);
    }
    keep(turn ^ 1);
    __syncthreads();
    if constexpr (S::STAGES == 1) fetch_queries(start + STEP, 0);
  }

  UNROLL for (int r = 0; r < 2; r++) {
    const int row = own + g + 8 * r;
    dpolicy[r] = row_sum(dpolicy[r]);
    if (row >= p.N) continue;
    T *to_k = gradient_of<T>(p, at, row, 1) + t, *to_v = gradient_of<T>(p, at, row, 2) + t;
    UNROLL for (int i = 0; i < WIDTH / 8; i++) {
      if (i * 8 >= p.D) continue;
      store_pair(to_k + i * 8, dk[i][2 * r] * p.scale, dk[i][2 * r + 1] * p.scale);
      store_pair(to_v + i * 8, dv[i][2 * r], dv[i][2 * r + 1]);
    }
    if (t == 0) p.dpolicy[at.head + row] = dpolicy[r];
  }
}

#define KERNEL_OF(pass, type, width, blocks) \
  extern "C" __global__ void __launch_bounds__(128, blocks) policy_attention_##pass##_##type##_##width(const PolicyAttentionParams p) { \
    pass<type, width>(p); \
  }
#define KERNELS_OF(type, width) \
  KERNEL_OF(query_gradient, type, width, width == 128 ? 2 : sizeof(type) == 2 ? CROWD : 3) \
  KERNEL_OF(key_gradient, type, width, width == 128 || ARCH < 800 || sizeof(type) == 4 ? 2 : 3)
using f32 = float;
KERNELS_OF(f32, 32) KERNELS_OF(f32, 64) KERNELS_OF(f32, 128)
KERNELS_OF(f16, 32) KERNELS_OF(f16, 64) KERNELS_OF(f16, 128)
KERNELS_OF(bf16, 32) KERNELS_OF(bf16, 64) KERNELS_OF(bf16, 128)

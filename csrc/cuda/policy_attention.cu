// Attention under a key policy and its gradient to q, k, v and policy: no scores in memory, no atomics. A warp owns 16 rows of one
// head, queries or keys, while tiles of the other side pass by in steps of 16, so that little of a short sequence is padding.
// query_gradient writes delta, which key_gradient reads. grid (tiles of ROWS rows, for each head of each image).
#include "device.h"
#include "params.h"

constexpr float LOG2E = 1.44269504f;
constexpr float HIGHEST = 80 * LOG2E;  // above its row's maximum: a dropped key's score, for the gradient of its policy
constexpr float LIFT = 10, LOWER = 1 / 1024.0f;  // weights are 2^LIFT as large on the way: no subnormals in f16 where they count beside eps

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
__device__ Place place(const PolicyAttentionParams &p, int rows) {
  const int lane = threadIdx.x % 32, parts = (p.N + rows - 1) / rows, first = blockIdx.x % parts * rows;
  const long long bh = blockIdx.x / parts;
  return {first, first + (int)threadIdx.x / 32 * 16, lane / 4, lane % 4 * 2, bh / p.H, bh % p.H, bh * p.N};
}
template <typename T>
__device__ Rows<T> rows_of(const void *x, const long long (&strides)[4], const Place &at) {
  return {(const T *)x + at.b * strides[0] + at.h * strides[1], strides[2]};
}

template <typename S, typename T>
__device__ void fetch(T *to, const Rows<T> &from, int first, int rows, const PolicyAttentionParams &p) {
  for (int i = threadIdx.x; i < rows * S::UNITS; i += 32 * S::WARPS) {
    const int row = i / S::UNITS, c = i % S::UNITS * S::UNIT;
    const bool valid = first + row < p.N && c < p.D;
    copy16(to + row * S::PITCH + c, valid ? from.data + (first + row) * from.stride + c : from.data, valid);
  }
}

__device__ bool finite(float x) { return x - x == 0; }

// Sets what is not finite in dropped rows of a tile to zero; each thread in what it has copied itself, before the barrier.
template <typename S, typename T>
__device__ void clean(T *tile, const float *policy, int first, const PolicyAttentionParams &p) {
  for (int i = threadIdx.x; i < S::STEP * S::UNITS; i += 32 * S::WARPS) {
    const int row = i / S::UNITS;
    if (first + row >= p.N || policy[first + row] > 0) continue;
    T *unit = tile + row * S::PITCH + i % S::UNITS * S::UNIT;
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
__device__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

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
  __shared__ S tiles;
  __shared__ float kept[2][STEP], mean[WIDTH];  // mean: the values', times eps
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

template <typename T, int WIDTH>
__device__ void query_gradient(const PolicyAttentionParams &p) {
  using S = Tiles<T, WIDTH, 2>;
  constexpr int STEP = S::STEP, PITCH = S::PITCH;
  __shared__ S tiles;
  __shared__ float kept[2][STEP];
  const Place at = place(p, S::ROWS);
  const int tid = threadIdx.x, warp = tid / 32, own = at.own, g = at.g, t = at.t;
  const Rows<T> q = rows_of<T>(p.q, p.q_strides, at), k = rows_of<T>(p.k, p.k_strides, at), v = rows_of<T>(p.v, p.v_strides, at);
  const Rows<T> dout = rows_of<T>(p.dout, p.dout_strides, at), out = rows_of<T>(p.out, p.out_strides, at);
  const float *policy = p.policy + at.b * p.N;
  auto fetch_keys = [&](int start, int stage) {
    if (start < p.N) fetch<S>(tiles.passing[stage][0], k, start, STEP, p), fetch<S>(tiles.passing[stage][1], v, start, STEP, p);
    copies_commit();
  };
  auto kept_of = [&](int key) { return tid < STEP && key < p.N ? policy[key] : 0; };

  fetch<S>(tiles.own[0], q, at.first, S::ROWS, p);
  fetch<S>(tiles.own[1], dout, at.first, S::ROWS, p);
  fetch_keys(0, 0);
  if (tid < STEP) kept[0][tid] = kept_of(tid);
  const float scale = p.scale * LOG2E;
  const bool active = own < p.N;
  float acc[WIDTH / 8][4] = {}, peak[2] = {}, inverse[2] = {}, delta[2] = {};
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
      UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
        const bool itself = start + j == own && i == e / 2 && t + e % 2 == g;
        const float weight = exp2_approximate(fminf(s[i][e] * scale - peak[e / 2], HIGHEST));
        ds[i][e] = (ds[i][e] - delta[e / 2]) * inverse[e / 2] * weight * (itself ? 1 : kept[turn][j + i * 8 + t + e % 2]);
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
    T *dq = (T *)p.dq + (at.head + row) * p.D + t;
    UNROLL for (int i = 0; i < WIDTH / 8; i++)
      if (i * 8 < p.D) store_pair(dq + i * 8, acc[i][2 * r] * p.scale, acc[i][2 * r + 1] * p.scale);
  }
}

template <typename T, int WIDTH>
__device__ void key_gradient(const PolicyAttentionParams &p) {
  using S = Tiles<T, WIDTH, 2>;
  constexpr int STEP = S::STEP, PITCH = S::PITCH;
  __shared__ S tiles;
  __shared__ float peak[2][STEP], inverse[2][STEP], delta[2][STEP];  // of the queries that pass
  const Place at = place(p, S::ROWS);
  const int tid = threadIdx.x, warp = tid / 32, own = at.own, g = at.g, t = at.t;
  const Rows<T> q = rows_of<T>(p.q, p.q_strides, at), k = rows_of<T>(p.k, p.k_strides, at), v = rows_of<T>(p.v, p.v_strides, at);
  const Rows<T> dout = rows_of<T>(p.dout, p.dout_strides, at);
  auto fetch_queries = [&](int start, int stage) {
    if (start < p.N) fetch<S>(tiles.passing[stage][0], q, start, STEP, p), fetch<S>(tiles.passing[stage][1], dout, start, STEP, p);
    copies_commit();
  };
  float next[3];
  auto look = [&](int query) {
    const bool valid = tid < STEP && query < p.N;
    next[0] = valid ? p.m[at.head + query] : 0, next[1] = valid ? 1 / (p.z[at.head + query] + p.eps) : 0;
    next[2] = valid ? p.delta[at.head + query] : 0;
  };
  auto keep = [&](int turn) {
    if (tid < STEP) peak[turn][tid] = next[0], inverse[turn][tid] = next[1], delta[turn][tid] = next[2];
  };

  fetch<S>(tiles.own[0], k, at.first, S::ROWS, p);
  fetch<S>(tiles.own[1], v, at.first, S::ROWS, p);
  fetch_queries(0, 0);
  look(tid);
  keep(0);
  const float scale = p.scale * LOG2E, floor = p.eps / p.N;
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
      UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
        const int column = j + i * 8 + t + e % 2;
        const bool itself = start + j == own && i == e / 2 && t + e % 2 == g;
        const float weight = exp2_approximate(fminf(s[i][e] * scale - peak[turn][column], HIGHEST)), share = itself ? 1 : kept[e / 2];
        const float de = (ds[i][e] - delta[turn][column]) * inverse[turn][column] * weight;
        if (!itself) dpolicy[e / 2] += de;
        ds[i][e] = de * share;
        s[i][e] = (weight * share + floor) * inverse[turn][column];
      }
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
    const long long to = (at.head + row) * p.D + t;
    UNROLL for (int i = 0; i < WIDTH / 8; i++) {
      if (i * 8 >= p.D) continue;
      store_pair((T *)p.dk + to + i * 8, dk[i][2 * r] * p.scale, dk[i][2 * r + 1] * p.scale);
      store_pair((T *)p.dv + to + i * 8, dv[i][2 * r], dv[i][2 * r + 1]);
    }
    if (t == 0) p.dpolicy[at.head + row] = dpolicy[r];
  }
}

#define KERNEL_OF(pass, type, width, blocks) \
  extern "C" __global__ void __launch_bounds__(128, blocks) policy_attention_##pass##_##type##_##width(const PolicyAttentionParams p) { \
    pass<type, width>(p); \
  }
#define KERNELS_OF(type, width) \
  KERNEL_OF(forward, type, width, width == 128 ? 2 : 3) \
  KERNEL_OF(query_gradient, type, width, width == 128 ? 2 : 3) \
  KERNEL_OF(key_gradient, type, width, 2)
using f32 = float;
KERNELS_OF(f32, 32) KERNELS_OF(f32, 64) KERNELS_OF(f32, 128)
KERNELS_OF(f16, 32) KERNELS_OF(f16, 64) KERNELS_OF(f16, 128)
KERNELS_OF(bf16, 32) KERNELS_OF(bf16, 64) KERNELS_OF(bf16, 128)

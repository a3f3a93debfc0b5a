// Residual add and LayerNorm of rows that lie in the registers of `lanes` threads each; the gradient without atomics.
#include "device.h"
#include "params.h"

constexpr int HELD = 8;           // channels of a row in a thread
constexpr int MAX_THREADS = 512;  // a row of 4096 channels
constexpr int SHARED_BY = 512;    // channels of a row at most where a block has several

struct Row {
  int lane, lanes, units;  // this thread among those of the row; units of channels in the row, none past the last row
};

// A thread's channels of a row: every lanes-th unit of UNIT channels; zeros past the row's end.
template <int UNIT, typename T>
__device__ inline void load_row(float (&x)[HELD], const T *from, const Row &row) {
  UNROLL for (int i = 0; i < HELD / UNIT; i++) {
    float part[UNIT] = {};
    const int unit = row.lane + i * row.lanes;
    if (unit < row.units) load_values(part, from + unit * UNIT);
    UNROLL for (int j = 0; j < UNIT; j++) x[i * UNIT + j] = part[j];
  }
}
template <int UNIT, typename T>
__device__ inline void load_vector(float (&x)[HELD], const void *from, int wide, const Row &row) {
  if (SAME<T, float> || wide) load_row<UNIT>(x, (const float *)from, row);
  else load_row<UNIT>(x, (const T *)from, row);
}
template <int UNIT, typename T>
__device__ inline void store_row(T *to, const float (&x)[HELD], const Row &row) {
  UNROLL for (int i = 0; i < HELD / UNIT; i++) {
    const int unit = row.lane + i * row.lanes;
    float part[UNIT];
    UNROLL for (int j = 0; j < UNIT; j++) part[j] = x[i * UNIT + j];
    if (unit < row.units) store_values(to + unit * UNIT, part);
  }
}

// Each x[i] summed over the threads of the row, which are part of a warp or several warps.
template <int n>
__device__ inline void row_sums(float (&x)[n], const Row &row) {
  for (int lane = (row.lanes < 32 ? row.lanes : 32) / 2; lane > 0; lane /= 2)
    UNROLL for (int i = 0; i < n; i++) x[i] += __shfl_xor_sync(0xffffffffu, x[i], lane);
  if (row.lanes <= 32) return;
  SHARED(float[MAX_THREADS / 32][n], sums);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) UNROLL for (int i = 0; i < n; i++) sums[threadIdx.x / 32][i] = x[i];
  __syncthreads();
  UNROLL for (int i = 0; i < n; i++) x[i] = 0;
  const int first = threadIdx.x / row.lanes * (row.lanes / 32);
  for (int warp = first; warp < first + row.lanes / 32; warp++) UNROLL for (int i = 0; i < n; i++) x[i] += sums[warp][i];
}

// x becomes x - mean, 0 past the row's end; what rounding made of the mean, which a row of nearly equal values shows a thousand times as
// large, is taken out with the next sums.
template <int UNIT>
__device__ inline void centre(float (&x)[HELD], int C, const Row &row) {
  float sum[1] = {};
  UNROLL for (int i = 0; i < HELD; i++) sum[0] += x[i];
  row_sums(sum, row);
  const float mean = sum[0] / C;
  UNROLL for (int i = 0; i < HELD; i++) x[i] = row.lane + i / UNIT * row.lanes < row.units ? x[i] - mean : 0;
}

// grid (groups of blockDim / lanes rows)
template <typename S, typename R, int UNIT>  // S: of x, s and y; R: of the residual; UNIT: channels in one access
__device__ void forward(const AddNormParams &p) {
  const long long row = (long long)blockIdx.x * (blockDim.x / p.lanes) + threadIdx.x / p.lanes, b = row / p.N, n = row % p.N;
  const Row mine = {(int)threadIdx.x % p.lanes, p.lanes, row < p.R ? p.C / UNIT : 0};
  float total[HELD], other[HELD];
  load_row<UNIT>(total, (const S *)p.x + b * p.x_batch + n * p.x_row, mine);
  load_row<UNIT>(other, (const R *)p.residual + b * p.residual_batch + n * p.residual_row, mine);
  if (p.gamma) {
    float gamma[HELD];
    load_vector<UNIT, S>(gamma, p.gamma, p.wide_vectors, mine);
    UNROLL for (int i = 0; i < HELD; i++) other[i] *= gamma[i];
  }
  // The norm is that of the sum returned: the gradient sees the same one.
  UNROLL for (int i = 0; i < HELD; i++) total[i] = to_float(rounded<S>(total[i] + other[i]));
  store_row<UNIT>((S *)p.s + row * p.C, total, mine);
  centre<UNIT>(total, p.C, mine);
  float of[2] = {};  // total^2, total
  UNROLL for (int i = 0; i < HELD; i++) {
    of[0] += total[i] * total[i];
    of[1] += total[i];
  }
  row_sums(of, mine);
  const float off = of[1] / p.C, rstd = rsqrtf(fmaxf(of[0] / p.C - off * off, 0) + p.eps);
  load_vector<UNIT, S>(other, p.weight, p.wide_vectors, mine);
  UNROLL for (int i = 0; i < HELD; i++) total[i] = (total[i] - off) * rstd * other[i];
  if (p.bias) {
    load_vector<UNIT, S>(other, p.bias, p.wide_vectors, mine);
    UNROLL for (int i = 0; i < HELD; i++) total[i] += other[i];
  }
  store_row<UNIT>((S *)p.y + row * p.C, total, mine);
}

// grid (P): every P-th group of blockDim / lanes rows; partial takes its sums for weight, bias and, where there is one, gamma.
template <typename S, typename R, int UNIT>
__device__ void backward(const AddNormParams &p) {
  SHARED(float[3][SHARED_BY], sums);
  const int groups = blockDim.x / p.lanes;
  Row mine = {(int)threadIdx.x % p.lanes, p.lanes, 0};
  float gathered[3][HELD] = {};
  for (long long first = (long long)blockIdx.x * groups; first < p.R; first += (long long)p.P * groups) {
    const long long row = first + threadIdx.x / p.lanes, b = row / p.N, n = row % p.N;
    mine.units = row < p.R ? p.C / UNIT : 0;
    float normal[HELD], up[HELD], grad[HELD], weight[HELD];
    load_row<UNIT>(normal, (const S *)p.s + b * p.s_batch + n * p.s_row, mine);
    load_row<UNIT>(up, (const S *)p.dy + b * p.dy_batch + n * p.dy_row, mine);
    load_row<UNIT>(grad, (const S *)p.ds + b * p.ds_batch + n * p.ds_row, mine);
    load_vector<UNIT, S>(weight, p.weight, p.wide_vectors, mine);
    centre<UNIT>(normal, p.C, mine);
    float of[4] = {};  // normal^2, dn, dn * normal, normal, where dn = up * weight
    UNROLL for (int i = 0; i < HELD; i++) {
      of[0] += normal[i] * normal[i];
      of[1] += up[i] * weight[i];
      of[2] += up[i] * weight[i] * normal[i];
      of[3] += normal[i];
    }
    row_sums(of, mine);
    const float off = of[3] / p.C, rstd = mine.units ? rsqrtf(fmaxf(of[0] / p.C - off * off, 0) + p.eps) : 0;
    const float mean = of[1] / p.C, slope = (of[2] / p.C - off * mean) * rstd;
    UNROLL for (int i = 0; i < HELD; i++) {
      normal[i] = (normal[i] - off) * rstd;
      grad[i] += (up[i] * weight[i] - mean - normal[i] * slope) * rstd;
      gathered[0][i] += up[i] * normal[i];
      gathered[1][i] += up[i];
    }
    store_row<UNIT>((S *)p.dx + row * p.C, grad, mine);
    if (p.gamma) {
      load_row<UNIT>(up, (const R *)p.residual + b * p.residual_batch + n * p.residual_row, mine);
      load_vector<UNIT, S>(weight, p.gamma, p.wide_vectors, mine);
      UNROLL for (int i = 0; i < HELD; i++) {
        gathered[2][i] += up[i] * grad[i];
        grad[i] *= weight[i];
      }
    }
    if (p.dresidual) store_row<UNIT>((R *)p.dresidual + row * p.C, grad, mine);
  }

  // First the rows of a warp, then row after row: always in the same order.
  mine.units = p.C / UNIT;
  for (int lane = p.lanes; lane < 32; lane *= 2)
    UNROLL for (int k = 0; k < 3; k++) UNROLL for (int i = 0; i < HELD; i++)
      gathered[k][i] += __shfl_xor_sync(0xffffffffu, gathered[k][i], lane);
  const int width = p.lanes < 32 ? 32 : p.lanes, count = blockDim.x / width;
  for (int i = 0; i < count; i++) {
    if (i == (int)threadIdx.x / width && (int)threadIdx.x % width < p.lanes) UNROLL for (int k = 0; k < 3; k++) {
      if (k == 2 && !p.gamma) continue;
      float before[HELD] = {};
      if (i) load_row<UNIT>(before, (const float *)sums[k], mine);
      UNROLL for (int j = 0; j < HELD; j++) gathered[k][j] += before[j];
      store_row<UNIT>(i + 1 < count ? sums[k] : p.partial + ((long long)k * p.P + blockIdx.x) * p.C, gathered[k], mine);
    }
    __syncthreads();
  }
}

// grid (tiles of 32 channels, 2 or 3): the sums over the blocks, always in the same order.
template <typename T>
__device__ void sum_partials(const AddNormParams &p) {
  SHARED(float[8][32], sums);
  const int lane = threadIdx.x % 32, channel = blockIdx.x * 32 + lane;
  float total = 0;
  if (channel < p.C)
    for (int block = threadIdx.x / 32; block < p.P; block += 8) total += p.partial[((long long)blockIdx.y * p.P + block) * p.C + channel];
  sums[threadIdx.x / 32][lane] = total;
  __syncthreads();
  if (threadIdx.x >= 32 || channel >= p.C) return;
  for (int warp = 1; warp < 8; warp++) total += sums[warp][lane];
  from_float(total, ((T *)(blockIdx.y == 0 ? p.dweight : blockIdx.y == 1 ? p.dbias : p.dgamma))[channel]);
}

// At 16 bytes an access of the narrower type, or a channel where rows do not lie so.
using f32 = float;
#define KERNELS_OF(S, R, access, UNIT) \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS) add_norm_##S##_##R##_##access(const AddNormParams p) { \
    forward<S, R, UNIT>(p); \
  } \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS) add_norm_backward_##S##_##R##_##access(const AddNormParams p) { \
    backward<S, R, UNIT>(p); \
  }
#define KERNELS(S, R) KERNELS_OF(S, R, wide, 16 / sizeof(R)) KERNELS_OF(S, R, single, 1)
KERNELS(f32, f32) KERNELS(f32, f16) KERNELS(f32, bf16) KERNELS(f16, f16) KERNELS(bf16, bf16)

#define SUM_OF(T) \
  extern "C" __global__ void __launch_bounds__(256) add_norm_sum_##T(const AddNormParams p) { sum_partials<T>(p); }
SUM_OF(f32) SUM_OF(f16) SUM_OF(bf16)

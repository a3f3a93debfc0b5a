// Top-k of the scores and the gather of the kept rows in one launch.
// grid (images, tiles of SelectTokensParams::rows <= MAX_ROWS output rows); every block of an image repeats the cheap selection
// (one pass over N scores for each bit of a score) rather than wait for another block.
#include "device.h"
#include "score_key.h"

constexpr int MAX_THREADS = 1024;
constexpr int MAX_ROWS = 256;  // ids a block holds in shared memory

template <typename Unit>
__device__ void copy_row(const char *from, char *to, long long units, long long stride, int lane, int lanes) {
  for (long long u = lane; u < units; u += lanes) ((Unit *)to)[u] = *(const Unit *)(from + u * stride);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) select_tokens(const SelectTokensParams p) {
  SHARED(unsigned long long[MAX_THREADS], scan);  // above << 32 | equal
  SHARED(long long[MAX_ROWS], kept);
  const int tid = threadIdx.x, threads = blockDim.x;
  const long long b = blockIdx.x;
  const char *scores = (const char *)p.scores + b * p.score_batch;
  auto key = [&](long long i) { return score_key(scores + i * p.score_token, p.score_type); };

  // The k-th highest key, bit by bit from the top: the largest t that at least K keys reach.
  unsigned long long threshold = 0;
  const unsigned long long own = tid < p.N ? key(tid) : 0;
  for (int bit = score_bits(p.score_type) - 1; bit >= 0; bit--) {
    const unsigned long long t = threshold | 1ull << bit;
    int reached = __syncthreads_count(tid < p.N && own >= t);
    for (long long base = threads; base < p.N; base += threads)
      reached += __syncthreads_count(base + tid < p.N && key(base + tid) >= t);
    if (reached >= p.K) threshold = t;
  }

  // Each thread owns a run of patches; how many before it lie above the threshold, how many on it?
  const long long run = ((long long)p.N + threads - 1) / threads;
  const long long first = run * tid < p.N ? run * tid : p.N, last = first + run < p.N ? first + run : p.N;
  unsigned long long mine = 0;
  for (long long i = first; i < last; i++) {
    const unsigned long long s = key(i);
    mine += s > threshold ? 1ull << 32 : s == threshold ? 1 : 0;
  }
  scan[tid] = mine;
  __syncthreads();
  for (int step = 1; step < threads; step *= 2) {
    const unsigned long long left = tid >= step ? scan[tid - step] : 0;
    __syncthreads();
    scan[tid] += left;
    __syncthreads();
  }
  const int quota = p.K - (int)(scan[threads - 1] >> 32);  // of the patches on the threshold, the first so many are kept
  int above = (int)((scan[tid] - mine) >> 32), equal = (int)(scan[tid] - mine);

  const int row0 = blockIdx.y * p.rows, row1 = row0 + p.rows < p.P + p.K ? row0 + p.rows : p.P + p.K;
  for (long long i = first; i < last; i++) {
    const unsigned long long s = key(i);
    if (s > threshold || (s == threshold && equal < quota)) {
      const int place = above + (equal < quota ? equal : quota), row = p.P + place;
      if (row >= row0 && row < row1) {
        kept[row - row0] = p.P + i;
        p.ids[b * p.K + place] = i;
      }
    }
    above += s > threshold;
    equal += s == threshold;
  }
  for (int row = row0 + tid; row < row1 && row < p.P; row += threads) kept[row - row0] = row;  // prefix tokens
  __syncthreads();

  const int lanes = 32, lane = tid % lanes, warps = threads / lanes;
  for (int row = row0 + tid / lanes; row < row1; row += warps) {
    const char *from = (const char *)p.x + b * p.x_batch + kept[row - row0] * p.x_token;
    char *to = (char *)p.tokens + (b * (p.P + p.K) + row) * p.units * p.unit_bytes;
    switch (p.unit_bytes) {
      case 1: copy_row<unsigned char>(from, to, p.units, p.x_unit, lane, lanes); break;
      case 2: copy_row<unsigned short>(from, to, p.units, p.x_unit, lane, lanes); break;
      case 4: copy_row<unsigned int>(from, to, p.units, p.x_unit, lane, lanes); break;
      case 8: copy_row<unsigned long long>(from, to, p.units, p.x_unit, lane, lanes); break;
      default: copy_row<uint4>(from, to, p.units, p.x_unit, lane, lanes); break;
    }
  }
}

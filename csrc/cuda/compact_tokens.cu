// Kept tokens to packed rows and back, one launch each; nobody waits for another block, each counts the mask before its own tokens.
#include "device.h"
#include "params.h"

constexpr int THREADS = 256, WARPS = THREADS / 32;

// How many of keep[first .. last) are set; all threads of the block get the answer.
__device__ inline long long count(const unsigned char *keep, long long first, long long last) {
  SHARED(long long[WARPS], sums);
  long long sum = 0;
  if ((unsigned long long)(keep + first) % 16 == 0) {  // 16 a load
    for (long long i = first + 16 * threadIdx.x; i + 16 <= last; i += 16 * THREADS) {
      const uint4 flags = *(const uint4 *)(keep + i);
      sum += __popc(flags.x) + __popc(flags.y) + __popc(flags.z) + __popc(flags.w);
    }
    first += (last - first) / 16 * 16;
  }
  for (long long i = first + threadIdx.x; i < last; i += THREADS) sum += keep[i];
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < WARPS; warp++) sum += sums[warp];
  return sum;
}

// How many threads before this one bring a 1; total: of all.
__device__ inline int scan(int kept, int &total) {
  SHARED(int[WARPS], sums);
  const unsigned ballot = __ballot_sync(0xffffffffu, kept);
  const int warp = threadIdx.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << threadIdx.x % 32) - 1));
  total = 0;
  for (int i = 0; i < WARPS; i++) {
    before += i < warp ? sums[i] : 0;
    total += sums[i];
  }
  return before;
}

// A warp writes a row: a copy, or where `from` is null the same bits over and over.
template <typename Unit>
__device__ void write_units(const char *from, char *to, long long units, long long stride, unsigned long long fill) {
  Unit same;
  if constexpr (sizeof(Unit) == 16)
    same = make_uint4((unsigned)fill, (unsigned)(fill >> 32), (unsigned)fill, (unsigned)(fill >> 32));
  else
    same = (Unit)fill;
  for (long long u = threadIdx.x % 32; u < units; u += 32) ((Unit *)to)[u] = from ? *(const Unit *)(from + u * stride) : same;
}
__device__ inline void write_row(const CompactTokensParams &p, const char *from, long long row, unsigned long long fill) {
  char *to = (char *)p.to + row * p.units * p.unit_bytes;
  switch (p.unit_bytes) {
    case 1: write_units<unsigned char>(from, to, p.units, p.from_unit, fill); break;
    case 2: write_units<unsigned short>(from, to, p.units, p.from_unit, fill); break;
    case 4: write_units<unsigned int>(from, to, p.units, p.from_unit, fill); break;
    case 8: write_units<unsigned long long>(from, to, p.units, p.from_unit, fill); break;
    default: write_units<uint4>(from, to, p.units, p.from_unit, fill); break;
  }
}

// grid (chunks of tokens, as many as rows if there are more of these). A kept token goes to row `kept before it`, a dropped one is a row of
// zeros counted from the end: every row up to B * N is written once, though nobody knows how many are kept.
extern "C" __global__ void __launch_bounds__(THREADS, 2) compact_tokens(const CompactTokensParams p) {
  SHARED(long long[THREADS], row_of);
  const long long T = (long long)p.B * p.N, first = (long long)blockIdx.x * p.chunk;
  long long before = count(p.keep, 0, first < T ? first : T);
  if (first == 0 && threadIdx.x == 0) p.cu_seqlens[0] = 0;
  for (long long start = first; start < first + p.chunk; start += THREADS) {
    const long long token = start + threadIdx.x;
    const bool mine = token < first + p.chunk;
    const int kept = mine && token < T ? p.keep[token] : 0;
    int total;
    const long long place = before + scan(kept, total);
    if (mine && token < T && (token + 1) % p.N == 0) p.cu_seqlens[(token + 1) / p.N * p.cu_stride] = (int)(place + kept);
    row_of[threadIdx.x] = token >= T ? token : kept ? place : T - 1 - (token - place);
    __syncthreads();
    for (int i = threadIdx.x / 32; i < THREADS && start + i < first + p.chunk; i += WARPS) {
      const long long from = start + i, row = row_of[i];
      const bool copied = from < T && p.keep[from];
      if (row < p.R) write_row(p, copied ? (const char *)p.from + from / p.N * p.from_batch + from % p.N * p.from_row : nullptr, row, 0);
    }
    before += total;
  }
}

// grid (chunks of tokens of an image, for each image); rows that are not there read as zero.
extern "C" __global__ void __launch_bounds__(THREADS, 2) expand_rows(const CompactTokensParams p) {
  SHARED(long long[THREADS], row_of);
  const int parts = (p.N + p.chunk - 1) / p.chunk, first = blockIdx.x % parts * p.chunk;
  const long long b = blockIdx.x / parts;
  const int last = first + p.chunk < p.N ? first + p.chunk : p.N;
  const unsigned char *keep = p.keep + b * p.N;
  long long before = p.cu_seqlens[b * p.cu_stride] + count(keep, 0, first);
  for (int start = first; start < last; start += THREADS) {
    const int token = start + threadIdx.x, kept = token < last ? keep[token] : 0;
    int total;
    row_of[threadIdx.x] = before + scan(kept, total);
    __syncthreads();
    for (int i = threadIdx.x / 32; i < THREADS && start + i < last; i += WARPS) {
      const long long row = row_of[i];
      const bool dropped = !keep[start + i], there = !dropped && row >= 0 && row < p.R;
      write_row(p, there ? (const char *)p.from + row * p.from_row : nullptr, b * p.N + start + i, dropped ? p.fill : 0);
    }
    before += total;
  }
}

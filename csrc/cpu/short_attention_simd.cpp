// One head of one sequence at a time: its scores a block of rows at a time, in a core's cache.
#include "short_attention.h"
#include "simd.h"
#include "thread_number.h"

namespace WIDTH_NAMESPACE {
namespace {

constexpr int ROWS = 48;  // of scores at a time: 40 KiB at 208 keys

using Params = ShortAttentionParams;

// Scores [keys] become weights before the division; returns one over their sum.
float weigh(float *scores, int keys, int padded, float scale) {
  for (int j = 0; j < padded; j += LANES) store(scores + j, load(scores + j) * scale);
  for (int j = keys; j < padded; j++) scores[j] = -INFINITE;
  Vec top = splat(-INFINITE);
  for (int j = 0; j < padded; j += LANES) top = pick(load(scores + j) > top, load(scores + j), top);
  const float m = peak(top);
  Vec total = {};
  for (int j = 0; j < padded; j += LANES) {
    const Vec e = exponential(load(scores + j) - m);
    store(scores + j, e);
    total += e;
  }
  return 1 / sum(total);
}

void attend(const Params &p, float *scratch, long long first, int count, int head) {
  const int n = up(count), d = up(p.D);
  float *const k = scratch, *const v = k + (long long)n * d, *const kt = v + (long long)n * d;
  float *const q = kt + (long long)n * d, *const scores = q + ROWS * d, *const acc = scores + (long long)ROWS * n;
  const long long third = (long long)p.H * p.D, element = p.bfloat16 ? 2 : 4;
  auto rows_of = [&](const void *x, long long row, long long at) {
    return Rows{static_cast<char *>(const_cast<void *>(x)) + (first * row + at) * element, p.bfloat16 != 0, row, 1, p.D};
  };
  const Rows queries = rows_of(p.qkv, p.qkv_row, head * p.D), keys = rows_of(p.qkv, p.qkv_row, third + head * p.D);
  const Rows values = rows_of(p.qkv, p.qkv_row, 2 * third + head * p.D), out = rows_of(p.out, third, head * p.D);
  read(keys, 0, count, d, k);
  read(values, 0, count, d, v);
  transpose(k, count, d, kt, n);
  for (int from = 0; from < count; from += ROWS) {
    const int rows = count - from < ROWS ? count - from : ROWS;
    read(queries, from, rows, d, q);
    product(rows, n, p.D, q, d, 1, kt, n, scores, n, false);
    float inverse[ROWS];
    for (int i = 0; i < rows; i++) inverse[i] = weigh(scores + i * n, count, n, p.scale);
    product(rows, d, count, scores, n, 1, v, d, acc, d, false);
    for (int i = 0; i < rows; i++) write(out, from + i, acc + i * d, inverse[i]);
  }
}

}  // namespace

long long short_attention_scratch(const Params &p) {
  const long long n = up(p.N), d = up(p.D);
  return 3 * n * d + 2 * ROWS * d + ROWS * n;
}

void short_attention(const Params &p, int threads, float *scratch) {
  const long long size = short_attention_scratch(p);
#pragma omp parallel num_threads(threads)
  {
    float *const mine = scratch + thread_number() * size;
#pragma omp for schedule(dynamic)
    for (int i = 0; i < p.B * p.H; i++) {
      const int b = i / p.H;
      const long long first = p.cu_seqlens ? p.cu_seqlens[b] : (long long)b * p.N;
      const int count = p.cu_seqlens ? p.cu_seqlens[b + 1] - p.cu_seqlens[b] : p.N;
      if (count > 0) attend(p, mine, first, count, i % p.H);
    }
  }
}

}  // namespace WIDTH_NAMESPACE

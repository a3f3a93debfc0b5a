#include "select_tokens.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "score_key.h"
#include "thread_number.h"

namespace {

using Key = unsigned long long;

// The ids of image b: a threshold by partial selection, then one pass in order, so that ties go to the lower index.
void select(const SelectTokensParams &p, long long b, Key *keys, Key *order) {
  const char *scores = static_cast<const char *>(p.scores) + b * p.score_batch;
  for (int i = 0; i < p.N; i++) keys[i] = score_key(scores + i * p.score_token, p.score_type);
  std::copy(keys, keys + p.N, order);
  std::nth_element(order, order + (p.K - 1), order + p.N, std::greater<Key>());
  const Key threshold = order[p.K - 1];
  const int above = std::count_if(order, order + (p.K - 1), [=](Key s) { return s > threshold; });
  int quota = p.K - above;  // of the patches on the threshold, the first so many are kept
  long long *ids = p.ids + b * p.K;
  for (int i = 0; i < p.N; i++)
    if (keys[i] > threshold || (keys[i] == threshold && quota-- > 0)) *ids++ = i;
}

void copy_row(const SelectTokensParams &p, long long b, int row) {
  const long long token = row < p.P ? row : p.P + p.ids[b * p.K + row - p.P];
  const char *from = static_cast<const char *>(p.x) + b * p.x_batch + token * p.x_token;
  char *to = static_cast<char *>(p.tokens) + (b * (p.P + p.K) + row) * p.units * p.unit_bytes;
  if (p.x_unit == p.unit_bytes) {
    std::memcpy(to, from, p.units * p.unit_bytes);
    return;
  }
  for (long long u = 0; u < p.units; u++) std::memcpy(to + u * p.unit_bytes, from + u * p.x_unit, p.unit_bytes);
}

}  // namespace

void select_tokens_cpu(const SelectTokensParams &p, int threads) {
  const long long rows = p.units ? static_cast<long long>(p.B) * (p.P + p.K) : 0;  // that hold anything
  // A thread is worth waking for about 64 KiB.
  const long long work = rows * p.units * p.unit_bytes / (64 << 10);
  threads = static_cast<int>(std::max(1ll, std::min<long long>(threads, work)));
  if (p.K > 0) {
    const int workers = std::min(threads, p.B);
    std::vector<Key> keys(2ull * workers * p.N);  // here: an exception must not leave the parallel region
#pragma omp parallel num_threads(workers)
    {
      Key *own = keys.data() + 2ull * thread_number() * p.N;
#pragma omp for schedule(static)
      for (int b = 0; b < p.B; b++) select(p, b, own, own + p.N);
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long long i = 0; i < rows; i++) copy_row(p, i / (p.P + p.K), static_cast<int>(i % (p.P + p.K)));
}

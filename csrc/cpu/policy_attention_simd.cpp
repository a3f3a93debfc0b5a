// One head at a time: its keys and values as float32 in a thread's cache, its scores a block of rows at a time.
#include "policy_attention.h"
#include "simd.h"
#include "thread_number.h"

namespace WIDTH_NAMESPACE {
namespace {

constexpr int ROWS = 48;  // of scores at a time: 40 KiB at 208 keys
constexpr float FELT = 0x1p-24f;  // a smaller share of eps in a row's sum is not felt in its gradient

using Params = PolicyAttentionParams;

// A head of a tensor: rows [N, D].
Rows rows_of(const Params &p, const void *x, const long long *strides, int b, int h) {
  const long long at = b * strides[0] + h * strides[1];
  char *data = static_cast<char *>(const_cast<void *>(x)) + at * (p.bfloat16 ? 2 : 4);
  return {data, p.bfloat16 != 0, strides[2], strides[3], p.D};
}

inline bool finite(float x) { return x - x == 0; }

// Sets what is not finite in dropped tokens of x [N, padded] to zero (eps = 0).
void clean(const Params &p, const float *policy, int padded, float *x) {
  for (int i = 0; i < p.N; i++)
    if (!(policy[i] > 0))
      for (int d = 0; d < p.D; d++)
        if (!finite(x[i * padded + d])) x[i * padded + d] = 0;
}

struct Head {  // sizes and scratch of one thread
  int n, d;    // N and D in whole vectors
  float *k, *v, *kt, *vt, *q, *up, *scores, *grad, *acc, *dk, *dv, *policy, *dpolicy, *sums;

  // Lays its arrays out from `at`; returns their floats.
  long long place(const Params &p, float *at) {
    n = up_to(p.N), d = up_to(p.D);
    float *const start = at;
    const bool backward = p.dout != nullptr;
    const long long all = (long long)n * d, block = ROWS * d, wide = (long long)ROWS * n;
    auto take = [&](long long size) { float *here = at; at += size; return here; };
    k = take(all), kt = take(all), v = take(all), q = take(block), acc = take(block), scores = take(wide);
    policy = take(n), sums = take(d);
    if (backward) vt = take(all), up = take(block), grad = take(wide), dk = take(all), dv = take(all), dpolicy = take(n);
    return at - start;
  }
  static int up_to(int x) { return WIDTH_NAMESPACE::up(x); }
};

// A dropped token's score of itself, taken from its key as it is (eps = 0).
void get_own_scores(const Head &h, const int *tokens, int rows, const Rows &k) {
  for (int i = 0; i < rows; i++) {
    if (h.policy[tokens[i]] > 0) continue;
    read(k, tokens[i], 1, h.d, h.acc);
    h.scores[i * h.n + tokens[i]] = dot(h.q + i * h.d, h.acc, h.d);
  }
}

// The scores of the queries of `rows` tokens; those past N are -inf.
void get_scores(const Params &p, const Head &h, const int *tokens, int rows, const Rows &k) {
  product(rows, h.n, p.D, h.q, h.d, 1, h.kt, h.n, h.scores, h.n, false);
  if (p.eps == 0) get_own_scores(h, tokens, rows, k);
  for (int i = 0; i < rows; i++) {
    float *const row = h.scores + i * h.n;
    for (int j = 0; j < h.n; j += LANES) store(row + j, load(row + j) * p.scale);
    for (int j = p.N; j < h.n; j++) row[j] = -INFINITE;
  }
}

// Scores [N] become weights before the division; returns their sum, and their maximum in *m. policy is 1 at the token itself.
float weigh(const Params &p, const Head &h, float *scores, float *m) {
  Vec top = splat(-INFINITE);
  if (p.eps > 0) {
    for (int j = 0; j < h.n; j += LANES) top = pick(load(scores + j) > top, load(scores + j), top);
  } else {
    for (int j = 0; j < h.n; j += LANES) {
      const Vec s = pick(load(h.policy + j) > 0, load(scores + j), splat(-INFINITE));
      store(scores + j, s);
      top = pick(s > top, s, top);
    }
  }
  *m = peak(top);
  Vec total = {};
  for (int j = 0; j < h.n; j += LANES) {
    const Vec w = exponential(load(scores + j) - *m) * load(h.policy + j);
    store(scores + j, w);
    total += w;
  }
  return sum(total);
}

void forward(const Params &p, const Head &h, int b, int head) {
  const Rows q = rows_of(p, p.q, p.q_strides, b, head), k = rows_of(p, p.k, p.k_strides, b, head);
  const Rows v = rows_of(p, p.v, p.v_strides, b, head), out = rows_of(p, p.out, p.out_strides, b, head);
  const long long bhn = ((long long)b * p.H + head) * p.N;
  for (int j = 0; j < h.n; j++) h.policy[j] = j < p.N ? p.policy[(long long)b * p.N + j] : 0;
  read(k, 0, p.N, h.d, h.k);
  read(v, 0, p.N, h.d, h.v);
  if (p.eps == 0) clean(p, h.policy, h.d, h.k), clean(p, h.policy, h.d, h.v);
  transpose(h.k, p.N, h.d, h.kt, h.n);
  for (int d = 0; d < h.d; d++) h.sums[d] = 0;
  if (p.eps > 0)
    for (int j = 0; j < p.N; j++)
      for (int d = 0; d < h.d; d++) h.sums[d] += p.eps / p.N * h.v[j * h.d + d];
  for (int first = 0; first < p.N; first += ROWS) {
    const int rows = p.N - first < ROWS ? p.N - first : ROWS;
    int tokens[ROWS];
    for (int i = 0; i < rows; i++) tokens[i] = first + i;
    read(q, first, rows, h.d, h.q);
    get_scores(p, h, tokens, rows, k);
    for (int i = 0; i < rows; i++) {
      const float kept = h.policy[first + i];
      h.policy[first + i] = 1;
      p.z[bhn + first + i] = weigh(p, h, h.scores + i * h.n, p.m + bhn + first + i);
      h.policy[first + i] = kept;
    }
    product(rows, h.d, p.N, h.scores, h.n, 1, h.v, h.d, h.acc, h.d, false);
    for (int i = 0; i < rows; i++) {
      const int token = first + i;
      float *const row = h.acc + i * h.d;
      for (int d = 0; d < h.d; d++) row[d] += h.sums[d];
      if (p.eps == 0 && !(h.policy[token] > 0)) {  // its own value, as it is
        read(v, token, 1, h.d, h.q);
        for (int d = 0; d < p.D; d++)
          if (!finite(h.q[d])) row[d] += h.scores[i * h.n + token] * h.q[d];
      }
      write(out, token, row, 1 / (p.z[bhn + token] + p.eps));
    }
  }
}

int highest(const float *x, int n) {  // not std's, of which the linker would keep one width for all
  int top = 0;
  for (int i = 1; i < n; i++)
    if (x[i] > x[top]) top = i;
  return top;
}

// A row of scores becomes the weights a, and da the gradient of the scores; h.dpolicy gathers. policy is 1 at the token itself.
// delta, the sum of a * da, is that of dout * out too: where out was rounded the sum of the weights is more exact, and out has what `v`
// is cleaned of (eps = 0, a dropped token's own value). The row's maximum has a gradient too, of order one where dropped keys alone are
// near it, all of which goes to the highest score.
void differentiate(const Params &p, const Head &h, float *scores, float *da, float m, float z, const float *dout_out) {
  const float inverse = 1 / (z + p.eps), floor = p.eps / p.N;
  int top = -1;
  if (p.eps * inverse > FELT) top = highest(scores, p.N);
  Vec seen = {}, plain = {};
  for (int j = 0; j < h.n; j += LANES) {
    const Vec policy = load(h.policy + j);
    Vec x = load(scores + j) - m;
    if (p.eps == 0) x = pick(x > 80.0f, splat(80), x);  // a dropped key above every kept one: its policy's gradient stays finite
    Vec e = exponential(x);
    if (p.eps == 0) e = pick((policy > 0) | (e == e), e, splat(0));
    seen += e * policy * load(da + j);
    plain += load(da + j);
    store(scores + j, e);
  }
  const float weighted = sum(seen), mean = sum(plain) / p.N;
  const float delta = dout_out ? *dout_out : (weighted + p.eps * mean) * inverse;
  for (int j = 0; j < h.n; j += LANES) {
    const Vec e = load(scores + j), w = e * load(h.policy + j), de = (load(da + j) - delta) * inverse;
    store(scores + j, (w + floor) * inverse);
    store(da + j, de * w);
    store(h.dpolicy + j, load(h.dpolicy + j) + de * e);
  }
  for (int j = p.N; j < h.n; j++) scores[j] = 0;
  if (top >= 0) da[top] += p.eps * inverse * inverse * (z * mean - weighted);
}

bool is_zero(const float *x, int size) {
  for (int i = 0; i < size; i++)
    if (x[i] != 0) return false;
  return true;
}

void backward(const Params &p, const Head &h, int b, int head) {
  const Rows q = rows_of(p, p.q, p.q_strides, b, head), k = rows_of(p, p.k, p.k_strides, b, head);
  const Rows v = rows_of(p, p.v, p.v_strides, b, head), out = rows_of(p, p.out, p.out_strides, b, head);
  const long long C = (long long)p.H * p.D, grad_strides[4] = {p.N * 3 * C, p.D, 3 * C, 1};
  const Rows dout = rows_of(p, p.dout, p.dout_strides, b, head), dq = rows_of(p, p.dqkv, grad_strides, b, head);
  const Rows dk = rows_of(p, p.dqkv, grad_strides, b, head + p.H), dv = rows_of(p, p.dqkv, grad_strides, b, head + 2 * p.H);
  const long long bhn = ((long long)b * p.H + head) * p.N;
  for (int j = 0; j < h.n; j++) h.policy[j] = j < p.N ? p.policy[(long long)b * p.N + j] : 0, h.dpolicy[j] = 0;
  read(k, 0, p.N, h.d, h.k);
  read(v, 0, p.N, h.d, h.v);
  if (p.eps == 0) clean(p, h.policy, h.d, h.k), clean(p, h.policy, h.d, h.v);
  transpose(h.k, p.N, h.d, h.kt, h.n);
  transpose(h.v, p.N, h.d, h.vt, h.n);
  for (long long i = 0; i < (long long)p.N * h.d; i++) h.dk[i] = h.dv[i] = 0;
  for (int next = 0; next < p.N;) {
    int tokens[ROWS], rows = 0;
    for (; next < p.N && rows < ROWS; next++) {  // a query whose output has no gradient gives none
      float *const up = h.up + rows * h.d;
      read(dout, next, 1, h.d, up);
      if (is_zero(up, h.d))
        write(dq, next, up, 1);
      else
        tokens[rows++] = next;
    }
    for (int i = 0; i < rows; i++) read(q, tokens[i], 1, h.d, h.q + i * h.d);
    get_scores(p, h, tokens, rows, k);
    product(rows, h.n, p.D, h.up, h.d, 1, h.vt, h.n, h.grad, h.n, false);
    for (int i = 0; i < rows; i++) {
      const int token = tokens[i];
      const float kept = h.policy[token], gathered = h.dpolicy[token];
      h.policy[token] = 1;
      float dout_out = 0;
      if (p.eps == 0 && !(kept > 0)) read(out, token, 1, h.d, h.acc), dout_out = dot(h.up + i * h.d, h.acc, h.d);
      differentiate(p, h, h.scores + i * h.n, h.grad + i * h.n, p.m[bhn + token], p.z[bhn + token], finite(dout_out) ? nullptr : &dout_out);
      h.policy[token] = kept, h.dpolicy[token] = gathered;  // a token counts itself whatever its policy
    }
    product(p.N, h.d, rows, h.scores, 1, h.n, h.up, h.d, h.dv, h.d, true);
    product(p.N, h.d, rows, h.grad, 1, h.n, h.q, h.d, h.dk, h.d, true);
    product(rows, h.d, p.N, h.grad, h.n, 1, h.k, h.d, h.acc, h.d, false);
    for (int i = 0; i < rows; i++) write(dq, tokens[i], h.acc + i * h.d, p.scale);
  }
  for (int i = 0; i < p.N; i++) {
    write(dk, i, h.dk + (long long)i * h.d, p.scale);
    write(dv, i, h.dv + (long long)i * h.d, 1);
    p.dpolicy[bhn + i] = h.dpolicy[i];
  }
}

}  // namespace

long long policy_attention_scratch(const Params &p) {
  return Head().place(p, nullptr);
}

void policy_attention(const Params &p, int threads, float *scratch) {
  const long long size = policy_attention_scratch(p);
#pragma omp parallel num_threads(threads)
  {
    Head h;
    h.place(p, scratch + thread_number() * size);
#pragma omp for schedule(static)
    for (int i = 0; i < p.B * p.H; i++) (p.dout ? backward : forward)(p, h, i / p.H, i % p.H);
  }
}

}  // namespace WIDTH_NAMESPACE

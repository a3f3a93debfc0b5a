// Runs the CPU kernels at every vector width of this processor on odd sizes and compares them with plain loops in double.
// Built by tests/test_native.py under AddressSanitizer and UndefinedBehaviorSanitizer; buffers are exactly as large as needed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/call_widest.h"
#include "cpu/policy_attention.h"
#include "cpu/select_tokens.h"
#include "cpu/short_attention.h"

namespace {

using Row = std::vector<double>;
int failures = 0;

struct Width {
  const char *name;
  bool here;
  AtWidth<PolicyAttentionParams> policy;
  AtWidth<ShortAttentionParams> short_;

  void run(const PolicyAttentionParams &p) const {
    policy.run ? call_widest(policy, p, 3, (long long)p.B * p.H) : policy_attention_cpu(p, 3);
  }
  void run(const ShortAttentionParams &p) const {
    short_.run ? call_widest(short_, p, 3, (long long)p.B * p.H) : short_attention_cpu(p, 3);
  }
};

const Width WIDTHS[] = {
#ifdef __x86_64__
    {"avx512", has_avx512(), {avx512::policy_attention_scratch, avx512::policy_attention}, {avx512::short_attention_scratch, avx512::short_attention}},
    {"avx2", has_avx2(), {avx2::policy_attention_scratch, avx2::policy_attention}, {avx2::short_attention_scratch, avx2::short_attention}},
#endif
    {"base", true, {base::policy_attention_scratch, base::policy_attention}, {base::short_attention_scratch, base::short_attention}},
    {"widest", true, {}, {}},  // as the operators call them
};

struct Kind {  // of a case of policy_attention
  float eps;
  bool bfloat16, fused;  // fused: q, k and v read from one buffer [B, N, 3, H, D], the output written as [B, N, H, D]; else [B, H, N, D]
  int reach;             // more than 1: whole numbers whose scores lie that far apart, so that nothing rounds
};

unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float bfloat16(float x) {  // without what it cannot hold
  const unsigned bits = bits_of(x) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

std::unique_ptr<float[]> random_floats(long long n, bool narrow = false, int whole = 0) {
  std::unique_ptr<float[]> x(new float[n]);
  for (long long i = 0; i < n; i++) {
    x[i] = 4.0f * std::rand() / RAND_MAX - 2;
    if (whole) x[i] = whole * std::round(x[i]);
    if (narrow) x[i] = bfloat16(x[i]);
  }
  return x;
}

struct Heads {  // [B, H, N, D] of float32 or bfloat16 somewhere in memory
  long long strides[4];
  bool narrow;
  std::shared_ptr<char> memory;
  char *data;

  char *at(int b, int h, int i, int d) const { return data + (b * strides[0] + h * strides[1] + i * strides[2] + d * strides[3]) * (narrow ? 2 : 4); }
  float get(int b, int h, int i, int d) const {
    unsigned bits = 0;
    std::memcpy(narrow ? (char *)&bits + 2 : (char *)&bits, at(b, h, i, d), narrow ? 2 : 4);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void set(int b, int h, int i, int d, float x) const {
    const unsigned bits = bits_of(x);
    std::memcpy(at(b, h, i, d), narrow ? (char *)&bits + 2 : (char *)&bits, narrow ? 2 : 4);
  }
};

// `parts` tensors, side by side in one buffer as a product writes them, or each for itself; exactly as much memory as they need.
std::vector<Heads> heads(int parts, int B, int H, int N, int D, const Kind &kind) {
  std::vector<Heads> all;
  const long long size = (long long)B * H * N * D * (kind.bfloat16 ? 2 : 4), C = (long long)H * D;
  std::shared_ptr<char> memory;
  for (int part = 0; part < parts; part++) {
    if (!kind.fused || part == 0) memory.reset(new char[kind.fused ? parts * size : size], std::default_delete<char[]>());
    Heads x{{H * N * (long long)D, N * (long long)D, D, 1}, kind.bfloat16, memory, memory.get()};
    if (kind.fused) {
      const long long strides[4] = {parts * N * C, D, parts * C, 1};
      std::copy(strides, strides + 4, x.strides);
      x.data += part * C * (kind.bfloat16 ? 2 : 4);
    }
    all.push_back(x);
  }
  return all;
}

Heads holding(Heads to, const float *from, int B, int H, int N, int D) {
  for (int b = 0; b < B; b++)
    for (int h = 0; h < H; h++)
      for (int i = 0; i < N; i++)
        for (int d = 0; d < D; d++) to.set(b, h, i, d, from[((b * (long long)H + h) * N + i) * D + d]);
  return to;
}

void expect(const char *what, const Width &width, double got, double truth, double scale = 1, double round = 1) {
  if (std::fabs(got - truth) <= 2e-5 * round * (scale + std::fabs(truth))) return;
  if (failures++ < 10) std::printf("%s at %s: %g instead of %g\n", what, width.name, got, truth);
}

// The weights of query i over n keys, before the division, and their sum; top_key: of the highest score.
Row weights(const float *q, const float *k, long long step, int i, int n, int D, double scale, const float *policy, double *sum,
            int *top_key = nullptr) {
  Row e(n);
  for (int j = 0; j < n; j++)
    for (int d = 0; d < D; d++) e[j] += scale * q[i * step + d] * k[j * step + d];
  const auto highest = std::max_element(e.begin(), e.end());
  const double top = *highest;
  if (top_key) *top_key = highest - e.begin();
  *sum = 0;
  for (int j = 0; j < n; j++) *sum += e[j] = std::exp(e[j] - top) * (policy && j != i ? policy[j] : 1);
  return e;
}

void policy(const Width &width, int B, int H, int N, int D, const Kind &kind) {
  const long long all = (long long)B * H * N * D, rows = (long long)B * H * N;
  const bool narrow = kind.bfloat16, far = kind.reach > 1;
  auto q = random_floats(all, narrow, far ? kind.reach : 0), k = random_floats(all, narrow, far), v = random_floats(all, narrow);
  auto up = random_floats(all, narrow), p = random_floats(B * N);
  for (int i = 0; i < B * N; i++) p[i] = p[i] > 0 ? 1 : i % 3 ? 0 : 0.5f;
  std::unique_ptr<float[]> m(new float[rows]), z(new float[rows]), dp(new float[rows]);
  const auto qkv = heads(3, B, H, N, D, kind);
  const Heads in[] = {holding(qkv[0], q.get(), B, H, N, D), holding(qkv[1], k.get(), B, H, N, D), holding(qkv[2], v.get(), B, H, N, D)};
  const Heads out = heads(1, B, H, N, D, kind)[0], dout = holding(heads(1, B, H, N, D, kind)[0], up.get(), B, H, N, D);
  const auto grads = heads(3, B, H, N, D, {0, narrow, true, 1});
  PolicyAttentionParams a{};
  a.q = in[0].data, a.k = in[1].data, a.v = in[2].data, a.policy = p.get(), a.out = out.data, a.m = m.get(), a.z = z.get();
  a.B = B, a.H = H, a.N = N, a.D = D, a.scale = far ? 0.25f : 0.3f, a.eps = kind.eps, a.bfloat16 = narrow;
  for (int s = 0; s < 4; s++) {
    a.q_strides[s] = in[0].strides[s], a.k_strides[s] = in[1].strides[s], a.v_strides[s] = in[2].strides[s];
    a.out_strides[s] = out.strides[s], a.dout_strides[s] = dout.strides[s];
  }
  width.run(a);
  a.dout = dout.data, a.dqkv = grads[0].data, a.dpolicy = dp.get();
  width.run(a);
  const double round = narrow ? 200 : 1;  // of bfloat16
  for (int b = 0; b < B; b++) {
    for (int h = 0; h < H; h++) {
      const long long at = ((long long)b * H + h) * N * D;
      Row dq_(N * D), dk_(N * D), dv_(N * D), dp_(N);
      for (int i = 0; i < N; i++) {
        double sum, delta = 0, of_top = 0;
        int top;
        const Row e = weights(q.get() + at, k.get() + at, D, i, N, D, a.scale, p.get() + b * N, &sum, &top);
        Row o(D), da(N), ds(N);
        for (int j = 0; j < N; j++) {
          const double w = (e[j] + a.eps / N) / (sum + a.eps);
          for (int d = 0; d < D; d++) {
            o[d] += w * v[at + j * D + d];
            da[j] += up[at + i * D + d] * v[at + j * D + d];
            dv_[j * D + d] += w * up[at + i * D + d];
          }
        }
        for (int d = 0; d < D; d++) {
          expect("policy_attention", width, out.get(b, h, i, d), o[d], 1, round);
          delta += o[d] * up[at + i * D + d];
        }
        for (int j = 0; j < N; j++) {
          const double de = (da[j] - delta) / (sum + a.eps), weight = j == i ? 1 : p[b * N + j];
          ds[j] = de * e[j] * a.scale, of_top -= ds[j];  // it is subtracted from every score
          if (j != i && weight > 0) dp_[j] += de * e[j] / weight;
        }
        ds[top] += of_top;
        for (int j = 0; j < N; j++)
          for (int d = 0; d < D; d++) dq_[i * D + d] += ds[j] * k[at + j * D + d], dk_[j * D + d] += ds[j] * q[at + i * D + d];
      }
      for (int i = 0; i < N * D; i++) {
        expect("gradient of q", width, grads[0].get(b, h, i / D, i % D), dq_[i], 1, round);
        expect("gradient of k", width, grads[1].get(b, h, i / D, i % D), dk_[i], kind.reach, round);  // sums of numbers as large as queries are
        expect("gradient of v", width, grads[2].get(b, h, i / D, i % D), dv_[i], 1, round);
      }
      for (int j = 0; j < N; j++)
        if (p[b * N + j] > 0) expect("gradient of the policy", width, dp[at / D + j], dp_[j], 10);
    }
  }
}

void packed(const Width &width, const std::vector<int> &lengths, int H, int D, bool narrow) {
  std::vector<int> ends{1};  // a row of no sequence before the first and two after the last
  int longest = 0;
  for (int n : lengths) ends.push_back(ends.back() + n), longest = std::max(longest, n);
  const int T = ends.back() + 2, third = H * D;
  const Kind kind{0, narrow, true, 1};
  auto qkv = random_floats((long long)T * 3 * third, narrow);
  const Heads in = holding(heads(1, 1, 1, T, 3 * third, kind)[0], qkv.get(), 1, 1, T, 3 * third), out = heads(1, 1, 1, T, third, kind)[0];
  ShortAttentionParams a{};
  a.qkv = in.data, a.out = out.data, a.bfloat16 = narrow, a.cu_seqlens = ends.data(), a.qkv_row = 3 * third, a.T = T, a.scale = -0.4f;
  a.B = lengths.size(), a.H = H, a.N = longest, a.D = D;
  width.run(a);
  if (!width.short_.run)
    for (int i = ends.back() * third; i < T * third; i++) expect("a row of no sequence", width, out.get(0, 0, i / third, i % third), 0);
  for (int b = 0; b < a.B; b++) {
    for (int h = 0; h < H; h++) {
      const float *q = qkv.get() + (long long)ends[b] * 3 * third + h * D;
      for (int i = 0; i < lengths[b]; i++) {
        double sum;
        const Row e = weights(q, q + third, 3 * third, i, lengths[b], D, a.scale, nullptr, &sum);
        for (int d = 0; d < D; d++) {
          double o = 0;
          for (int j = 0; j < lengths[b]; j++) o += e[j] / sum * q[j * 3 * third + 2 * third + d];
          expect("short_attention", width, out.get(0, 0, ends[b] + i, h * D + d), o, 1, narrow ? 200 : 1);
        }
      }
    }
  }
}

// No sequence has a row, so all are filled; of bfloat16.
void unused(int T, int C) {
  const std::vector<int> ends(3);
  std::unique_ptr<unsigned short[]> qkv(new unsigned short[T * 3 * C]()), out(new unsigned short[T * C]);
  std::fill(out.get(), out.get() + T * C, 1);
  ShortAttentionParams a{};
  a.qkv = qkv.get(), a.out = out.get(), a.cu_seqlens = ends.data(), a.qkv_row = 3 * C, a.T = T, a.bfloat16 = 1;
  a.B = 2, a.H = 1, a.D = C;
  short_attention_cpu(a, 3);
  if (std::count(out.get(), out.get() + T * C, 0) != T * C) failures++, std::printf("short_attention: a row of no sequence is not zero\n");
}

// Scores with ties, infinities and NaN, strides that leave gaps, rows of an odd number of units.
void selected(int B, int P, int N, int K, int units) {
  const long long token = units + 3, score = 2;
  auto x = random_floats(B * (P + N) * token), scores = random_floats(B * N * score);
  for (int i = 0; i < B * N; i++) {
    float &s = scores[i * score];
    s = i % 11 == 7 ? NAN : i % 13 == 5 ? -INFINITY : i % 17 == 3 ? INFINITY : std::floor(4 * s);
  }
  std::unique_ptr<float[]> tokens(new float[B * (P + K) * units]);
  std::unique_ptr<long long[]> ids(new long long[B * K]);
  SelectTokensParams a{};
  a.x = x.get(), a.scores = scores.get(), a.tokens = tokens.get(), a.ids = ids.get();
  a.B = B, a.P = P, a.N = N, a.K = K, a.units = units, a.unit_bytes = 4, a.score_type = SCORE_F32;
  a.x_batch = (P + N) * token * 4, a.x_token = token * 4, a.x_unit = 4, a.score_batch = N * score * 4, a.score_token = score * 4;
  select_tokens_cpu(a, 3);
  for (int b = 0; b < B; b++) {
    std::vector<int> best(N);
    for (int i = 0; i < N; i++) best[i] = i;
    const float *s = scores.get() + b * N * score;
    std::stable_sort(best.begin(), best.end(), [&](int i, int j) { return std::isnan(s[j * score]) ? !std::isnan(s[i * score]) : s[i * score] > s[j * score]; });
    best.resize(K);
    std::sort(best.begin(), best.end());
    for (int row = 0; row < P + K; row++) {
      const int from = row < P ? row : P + best[row - P];
      if (row >= P && ids[b * K + row - P] != best[row - P]) failures++, std::printf("select_tokens: another id\n");
      if (!std::equal(tokens.get() + (b * (P + K) + row) * units, tokens.get() + (b * (P + K) + row + 1) * units, x.get() + (b * (P + N) + from) * token))
        failures++, std::printf("select_tokens: another row\n");
    }
  }
}

}  // namespace

int main() {
  selected(2, 1, 5, 3, 0);
  for (int N : {1, 2, 50, 196})
    for (int K : {0, 1, N / 2, N}) selected(3, N % 3, N, K, 65), selected(1, 1, N, K, 4096);
  unused(5, 7);
  for (const Width &width : WIDTHS) {
    if (!width.here) continue;
    for (int N : {1, 2, 15, 16, 17, 47, 48, 49, 97, 130})
      for (int D : {1, 7, 16, 64, 80}) {
        for (const Kind &kind : {Kind{1e-6f, false, false, 1}, {0, false, true, 1}, {1e-6f, true, true, 1}, {0, true, false, 1}, {1e-6f, false, true, 64}})
          policy(width, 1 + N % 2, 2, N, D, kind);
        for (bool narrow : {false, true}) packed(width, {N, 0, 1, N / 2 + 1}, 2, D, narrow);
      }
    std::printf("%s\n", width.name);
  }
  return failures != 0;
}

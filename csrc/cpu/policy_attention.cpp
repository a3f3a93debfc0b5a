#include "policy_attention.h"

#include <algorithm>
#include <cstdint>
#include <vector>

void policy_attention_cpu(const PolicyAttentionParams &p, int threads) {
  auto scratch = base::policy_attention_scratch;
  auto run = base::policy_attention;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    scratch = avx512::policy_attention_scratch, run = avx512::policy_attention;
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    scratch = avx2::policy_attention_scratch, run = avx2::policy_attention;
#endif
  threads = std::max(1, std::min(threads, p.B * p.H));
  std::vector<float> memory(scratch(p) * threads + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  run(p, threads, memory.data() + (64 - address % 64) % 64 / sizeof(float));
}

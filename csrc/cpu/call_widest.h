// Calls what widths.h declares at the widest vectors that this processor has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

template <typename Params>
struct AtWidth {
  long long (*scratch)(const Params &);
  void (*run)(const Params &, int, float *);
};

#ifdef __x86_64__
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#define WIDEST(name, Params)                                                              \
  (has_avx512()  ? AtWidth<Params>{avx512::name##_scratch, avx512::name}                  \
   : has_avx2() ? AtWidth<Params>{avx2::name##_scratch, avx2::name}                       \
                : AtWidth<Params>{base::name##_scratch, base::name})
#else
#define WIDEST(name, Params) (AtWidth<Params>{base::name##_scratch, base::name})
#endif

template <typename Params>
void call_widest(const AtWidth<Params> &op, const Params &p, int threads, long long tasks) {
  threads = static_cast<int>(std::max(1ll, std::min<long long>(threads, tasks)));
  std::vector<float> memory(op.scratch(p) * threads + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  op.run(p, threads, memory.data() + (64 - address % 64) % 64 / sizeof(float));
}

#pragma once
#include "params.h"

// Fills p.out, p.m and p.z; with p.dout, p.dq, p.dk, p.dv and p.dpolicy instead. The caller owns the memory; at most `threads` threads.
void policy_attention_cpu(const PolicyAttentionParams &p, int threads);

// The same at one vector width: floats of scratch memory for each thread, and the work.
#define POLICY_ATTENTION_AT(width)                                                            \
  namespace width {                                                                           \
  long long policy_attention_scratch(const PolicyAttentionParams &p);                         \
  void policy_attention(const PolicyAttentionParams &p, int threads, float *scratch);         \
  }
POLICY_ATTENTION_AT(base)
#ifdef __x86_64__
POLICY_ATTENTION_AT(avx2)
POLICY_ATTENTION_AT(avx512)
#endif

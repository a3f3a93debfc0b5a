#include "short_attention.h"

#include "call_widest.h"

void short_attention_cpu(const ShortAttentionParams &p, int threads) {
  call_widest(WIDEST(short_attention, ShortAttentionParams), p, threads, (long long)p.B * p.H);
  if (p.cu_seqlens == nullptr) return;
  const long long row = (long long)p.H * p.D * (p.bfloat16 ? 2 : 4), end = p.cu_seqlens[p.B];
  char *const out = static_cast<char *>(p.out);
  std::fill(out + end * row, out + p.T * row, 0);  // rows of no sequence
}

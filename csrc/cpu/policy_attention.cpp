#include "policy_attention.h"

#include "call_widest.h"

void policy_attention_cpu(const PolicyAttentionParams &p, int threads) {
  call_widest(WIDEST(policy_attention, PolicyAttentionParams), p, threads, (long long)p.B * p.H);
}

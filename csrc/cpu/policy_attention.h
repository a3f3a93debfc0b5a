#pragma once
#include "params.h"
#include "widths.h"

// Fills p.out, p.m and p.z; with p.dout, p.dqkv and p.dpolicy instead. The caller owns the memory; at most `threads` threads.
void policy_attention_cpu(const PolicyAttentionParams &p, int threads);

DECLARE_WIDTHS(policy_attention, PolicyAttentionParams)

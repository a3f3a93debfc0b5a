#pragma once
#include "params.h"
#include "widths.h"

// Fills p.out, whose memory the caller owns, with at most `threads` threads. p.cu_seqlens must ascend within 0..p.T.
void short_attention_cpu(const ShortAttentionParams &p, int threads);

DECLARE_WIDTHS(short_attention, ShortAttentionParams)

#pragma once
#include "params.h"

// Fills p.tokens and p.ids, whose memory the caller owns, with at most `threads` threads.
void select_tokens_cpu(const SelectTokensParams &p, int threads);

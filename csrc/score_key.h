// Scores as unsigned integers in the same order: NaN (0) < -inf < ... < -0.0 = +0.0 < ... < +inf. Device and host.
#pragma once
#include "params.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// width: bits of the format; infinity: the bit pattern of +inf.
HOST_DEVICE inline unsigned long long order_key(unsigned long long bits, int width, unsigned long long infinity) {
  const unsigned long long sign = 1ull << (width - 1);
  const unsigned long long magnitude = bits & (sign - 1);
  if (magnitude > infinity) return 0;       // NaN
  if (bits & sign) return sign - magnitude;  // -0.0 meets +0.0 at `sign`; -inf stays above 0
  return sign + magnitude;
}

HOST_DEVICE inline int score_bits(int type) { return type == SCORE_F64 ? 64 : type == SCORE_F32 ? 32 : 16; }

HOST_DEVICE inline unsigned long long score_key(const char *p, int type) {
  switch (type) {
    case SCORE_F16: return order_key(*(const unsigned short *)p, 16, 0x7c00);
    case SCORE_BF16: return order_key(*(const unsigned short *)p, 16, 0x7f80);
    case SCORE_F32: return order_key(*(const unsigned int *)p, 32, 0x7f800000);
    default: return order_key(*(const unsigned long long *)p, 64, 0x7ff0000000000000ull);
  }
}

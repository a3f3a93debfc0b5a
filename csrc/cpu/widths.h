// A *_simd.cpp is compiled once for each vector width, into a namespace of its own. No standard header: see simd.h.
#pragma once

// Declares at every width NAME, the work on at most `threads` threads, and NAME_scratch, the floats of memory that each of them needs.
#define DECLARE_WIDTH(width, name, Params)                   \
  namespace width {                                          \
  long long name##_scratch(const Params &p);                 \
  void name(const Params &p, int threads, float *scratch);   \
  }
#ifdef __x86_64__
#define DECLARE_WIDTHS(name, Params) \
  DECLARE_WIDTH(base, name, Params) DECLARE_WIDTH(avx2, name, Params) DECLARE_WIDTH(avx512, name, Params)
#else
#define DECLARE_WIDTHS(name, Params) DECLARE_WIDTH(base, name, Params)
#endif

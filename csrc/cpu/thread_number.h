// Also for sources that are compiled once for each vector width: static, so that each has its own.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

// Of this thread among those of a parallel region; 0 without OpenMP.
static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

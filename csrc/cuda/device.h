// What kernels share: half types, vectors, asynchronous copies, a warp's matrix products. No standard header: NVRTC has none.
// Below compute capability 7.5 (8.0 for bf16), and for float, products run without tensor cores on the same fragments.
#pragma once

#ifdef __CUDA_ARCH__
constexpr int ARCH = __CUDA_ARCH__;
#else
constexpr int ARCH = 0;
#endif

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define SHARED(type, name) __shared__ __align__(32) Type<type> name
#endif

// An object in shared memory: SHARED(float[8][32], sums). tests/emulator.cpp watches over those that are declared so.
template <typename T>
using Type = T;

template <typename T, typename U>
constexpr bool SAME = false;
template <typename T>
constexpr bool SAME<T, T> = true;

template <typename T>
constexpr bool HAS_MMA = false;
template <>
constexpr bool HAS_MMA<f16> = ARCH >= 750;
template <>
constexpr bool HAS_MMA<bf16> = ARCH >= 800;

// Instructions; tests/emulator.cpp has them for a CPU.
__device__ inline float bits_to_float(unsigned bits);
__device__ inline unsigned float_to_bits(float x);
__device__ inline float to_float(f16 x);
__device__ inline void from_float(float x, f16 &y);
__device__ inline float exp2_approximate(float x);

// 16 bytes, both ends aligned to 16; zeros where `valid` is not. Complete after copies_wait and a barrier.
__device__ inline void copy16(void *shared, const void *global, bool valid);
__device__ inline void copies_commit();
// Waits until at most `pending` of the groups committed last are under way.
template <int pending>
__device__ inline void copies_wait();

// The tile [ROWS, UNITS * 16 bytes], rows PITCH apart, of the `rows` x `columns` values at `from`, zeros past their end: by all of THREADS
// threads, each of which copies as much.
template <int ROWS, int UNITS, int PITCH, int THREADS, typename T>
__device__ inline void copy_tile(T *to, const T *from, long long stride, int rows, int columns) {
  constexpr int LINES = THREADS / UNITS, UNIT = 16 / sizeof(T);
  static_assert(THREADS % UNITS == 0 && ROWS % LINES == 0, "whole rows, and no thread without work");
  const int row = threadIdx.x / UNITS, column = threadIdx.x % UNITS * UNIT;
  from += row * stride + column;
  auto copy = [&](int i) { copy16(to + (row + i) * PITCH + column, from + i * stride, row + i < rows && column < columns); };
  if constexpr (ROWS / LINES <= 8) UNROLL for (int i = 0; i < ROWS; i += LINES) copy(i);
  else ROLLED for (int i = 0; i < ROWS; i += LINES) copy(i);  // unrolled, a warp's addresses for many rows spill
}

// Four 8 x 8 matrices of 16-bit values; lane 8i + r gives the address of row r of matrix i (16 bytes, aligned). Thread (g, t) =
// (lane / 4, lane % 4) receives elements (g, 2t) and (g, 2t + 1) of each, of its transpose where `transposed`.
template <bool transposed>
__device__ inline void load_matrices(unsigned (&r)[4], const void *row);

// c [16, 8] += a [16, 16] b [16, 8], fragments as PTX lays out m16n8k16.
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16);
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16);

__device__ inline float infinity() { return bits_to_float(0x7f800000u); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return bits_to_float((unsigned)x.bits << 16); }
__device__ inline void from_float(float x, float &y) { y = x; }
__device__ inline void from_float(float x, bf16 &y) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const unsigned bits = float_to_bits(x);
  y.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
#endif
}
template <typename T>
__device__ inline T rounded(float x) {
  T y;
  from_float(x, y);
  return y;
}
// Two values side by side, the first in the low half.
template <typename T>
__device__ inline unsigned pack(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  unsigned both;
  if constexpr (SAME<T, f16>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return (unsigned)rounded<T>(low).bits | (unsigned)rounded<T>(high).bits << 16;
#endif
}

// n values side by side, aligned to all of them, in one load.
template <int n, typename T>
__device__ inline void load_values(float (&to)[n], const T *from) {
  struct __align__(n * sizeof(T)) Values {
    T value[n];
  };
  const Values values = *(const Values *)from;
  UNROLL for (int i = 0; i < n; i++) to[i] = to_float(values.value[i]);
}
// The same the other way.
template <int n, typename T>
__device__ inline void store_values(T *to, const float (&from)[n]) {
  struct __align__(n * sizeof(T)) Values {
    T value[n];
  } values;
  UNROLL for (int i = 0; i < n; i++) from_float(from[i], values.value[i]);
  *(Values *)to = values;
}
// Two values side by side, aligned to both.
template <typename T>
__device__ inline void store_pair(T *to, float first, float second) {
  if constexpr (SAME<T, float>)
    *(float2 *)to = make_float2(first, second);
  else
    *(unsigned *)to = pack<T>(first, second);
}

// A warp's product: c [16 * HIGH, 8 * WIDE] += a [16 * HIGH, depth] b, everything but c in shared memory; depth a multiple of 16, of 4
// without tensor cores. Thread (g, t) = (lane / 4, lane % 4) holds of each c[h][i] elements (g, 2t), (g, 2t + 1), (g + 8, 2t) and
// (g + 8, 2t + 1). Rows of a, and of b as it lies in memory, are a_row and b_row elements apart, aligned to 16 bytes; no banks collide
// where these are 16 bytes more than a multiple of 32. DEPTH_ROWS: b's rows are its depth [depth, 8 * WIDE]; else its columns.
template <bool DEPTH_ROWS, int HIGH, int WIDE, typename T>
__device__ inline void warp_product(float (&c)[HIGH][WIDE][4], const T *a, int a_row, const T *b, int b_row, int depth) {
  static_assert(WIDE % 2 == 0, "columns in steps of 16");
  const int lane = threadIdx.x % 32;
  if constexpr (HAS_MMA<T>) {
    const T *left = a + lane % 16 * a_row + lane / 16 * 8;
    const T *right = DEPTH_ROWS ? b + lane % 16 * b_row + lane / 16 * 8 : b + (lane % 8 + lane / 16 * 8) * b_row + lane / 8 % 2 * 8;
    for (int k = 0; k < depth; k += 16) {
      unsigned af[HIGH][4], bf[4];
      UNROLL for (int h = 0; h < HIGH; h++) load_matrices<false>(af[h], left + h * 16 * a_row + k);
      UNROLL for (int i = 0; i < WIDE; i += 2) {
        load_matrices<DEPTH_ROWS>(bf, right + (DEPTH_ROWS ? k * b_row + i * 8 : i * 8 * b_row + k));
        UNROLL for (int h = 0; h < HIGH; h++) {
          mma(c[h][i], af[h], bf[0], bf[1], T{});
          mma(c[h][i + 1], af[h], bf[2], bf[3], T{});
        }
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4 * 2;
    constexpr int STEP = DEPTH_ROWS ? 2 : 4;
    for (int k = 0; k < depth; k += STEP) {
      float left[HIGH][2][STEP];
      UNROLL for (int h = 0; h < HIGH; h++) UNROLL for (int r = 0; r < 2; r++)
        load_values(left[h][r], a + (h * 16 + r * 8 + g) * a_row + k);
      UNROLL for (int i = 0; i < WIDE; i++) {
        float b0[STEP], b1[STEP];  // two rows of b as it lies in memory
        load_values(b0, DEPTH_ROWS ? b + k * b_row + i * 8 + t : b + (i * 8 + t) * b_row + k);
        load_values(b1, DEPTH_ROWS ? b + (k + 1) * b_row + i * 8 + t : b + (i * 8 + t + 1) * b_row + k);
        UNROLL for (int h = 0; h < HIGH; h++) UNROLL for (int r = 0; r < 2; r++) UNROLL for (int j = 0; j < STEP; j++) {
          c[h][i][2 * r] += left[h][r][j] * (DEPTH_ROWS ? (j ? b1[0] : b0[0]) : b0[j]);
          c[h][i][2 * r + 1] += left[h][r][j] * (DEPTH_ROWS ? (j ? b1[1] : b0[1]) : b1[j]);
        }
      }
    }
  }
}
template <bool DEPTH_ROWS, int WIDE, typename T>
__device__ inline void warp_product(float (&c)[WIDE][4], const T *a, int a_row, const T *b, int b_row, int depth) {
  warp_product<DEPTH_ROWS>((float (&)[1][WIDE][4])c, a, a_row, b, b_row, depth);
}

// o [16, 8 * TILES] += w v for 16 rows of v [16, 8 * TILES] in shared memory, where thread (g, t) holds w as it would c of 16 columns.
template <int TILES, typename T>
__device__ inline void add_weighted(float (&o)[TILES][4], const float (&w)[2][4], const T *v, int v_row) {
  const int lane = threadIdx.x % 32;
  if constexpr (HAS_MMA<T>) {  // w lies as the left side of the next product wants it
    const unsigned a[4] = {pack<T>(w[0][0], w[0][1]), pack<T>(w[0][2], w[0][3]), pack<T>(w[1][0], w[1][1]), pack<T>(w[1][2], w[1][3])};
    UNROLL for (int i = 0; i < TILES; i += 2) {
      unsigned b[4];
      load_matrices<true>(b, v + lane % 16 * v_row + lane / 16 * 8 + i * 8);
      mma(o[i], a, b[0], b[1], T{});
      mma(o[i + 1], a, b[2], b[3], T{});
    }
  } else {
    UNROLL for (int j = 0; j < 2; j++) UNROLL for (int e = 0; e < 2; e++)
      for (int from = 0; from < 4; from++) {
        const float low = __shfl_sync(0xffffffffu, w[j][e], lane / 4 * 4 + from);
        const float high = __shfl_sync(0xffffffffu, w[j][e + 2], lane / 4 * 4 + from);
        const T *row = v + (j * 8 + from * 2 + e) * v_row + lane % 4 * 2;
        UNROLL for (int i = 0; i < TILES; i++) {
          float x[2];
          load_values(x, row + i * 8);
          o[i][0] += low * x[0], o[i][1] += low * x[1], o[i][2] += high * x[0], o[i][3] += high * x[1];
        }
      }
  }
}

#ifdef __CUDACC__
__device__ inline float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
__device__ inline unsigned float_to_bits(float x) { return __float_as_uint(x); }

__device__ inline float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline void from_float(float x, f16 &y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void copy16(void *shared, const void *global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *(uint4 *)shared = valid ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}
__device__ inline void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int pending>
__device__ inline void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

template <bool transposed>
__device__ inline void load_matrices(unsigned (&r)[4], const void *row) {
#if __CUDA_ARCH__ >= 750
  const unsigned address = (unsigned)__cvta_generic_to_shared(row);
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, f16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750  // the same in two steps of eight
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bf16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
#endif

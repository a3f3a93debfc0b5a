// Vectors of float as wide as the instructions this file is compiled for, and the products and exponentials made of them.
// Compiled once for each width into a namespace of its own; no standard header whose inline functions another width could get.
#pragma once

#if defined(__AVX512F__)
#define WIDTH_NAMESPACE avx512
enum { LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4 };
#elif defined(__AVX2__)
#define WIDTH_NAMESPACE avx2
enum { LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2 };
#else
#define WIDTH_NAMESPACE base
enum { LANES = 4, TILE_ROWS = 4, TILE_VECTORS = 2 };
#endif

namespace WIDTH_NAMESPACE {

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int IntVec __attribute__((vector_size(LANES * 4)));
typedef unsigned UintVec __attribute__((vector_size(LANES * 4)));
typedef float LooseVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

constexpr float INFINITE = __builtin_inff();

static inline Vec load(const float *p) { return *reinterpret_cast<const LooseVec *>(p); }
static inline void store(float *p, Vec x) { *reinterpret_cast<LooseVec *>(p) = x; }
static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec pick(IntVec yes, Vec a, Vec b) { return yes ? a : b; }
static inline int up(int n) { return (n + LANES - 1) / LANES * LANES; }

// The lanes of x, one half combined with the other until one is left.
template <class Combine>
static inline float fold(Vec x, Combine combine) {
  float lanes[LANES];
  store(lanes, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

static inline float sum(Vec x) { return fold(x, [](float a, float b) { return a + b; }); }
static inline float peak(Vec x) { return fold(x, [](float a, float b) { return a > b ? a : b; }); }

// The dot product of n numbers, a whole number of vectors.
static inline float dot(const float *a, const float *b, int n) {
  Vec total = {};
  for (int i = 0; i < n; i += LANES) total += load(a + i) * load(b + i);
  return sum(total);
}

// exp, within 2 units in the last place; 0 below -87, NaN for NaN, meant for x <= 88.
static inline Vec exponential(Vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x * 1.44269504f + magic, whole = shifted - magic;
  const Vec f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // x - whole * log 2, in two parts
  Vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;  // minimax polynomial of Cephes' expf
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const UintVec power = ((UintVec)shifted << 23) + 0x3f800000u;  // unsigned: what is far below -87 wraps, and is not picked
  return pick(x < -87.0f, splat(0), p * (Vec)power);
}

template <int ROWS, int VECTORS>
static inline void tile(int K, const float *a, long a_row, long a_k, const float *b, long b_k, float *c, long c_row, bool add) {
  Vec sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) sums[r][n] = add ? load(c + r * c_row + n * LANES) : Vec{};
  for (int k = 0; k < K; k++) {
    Vec row[VECTORS];
    for (int n = 0; n < VECTORS; n++) row[n] = load(b + k * b_k + n * LANES);
    for (int r = 0; r < ROWS; r++) {
      const float x = a[r * a_row + k * a_k];
      for (int n = 0; n < VECTORS; n++) sums[r][n] += x * row[n];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < VECTORS; n++) store(c + r * c_row + n * LANES, sums[r][n]);
}

// The last rows, fewer than a tile has: one tile, as many rows as are left.
template <int VECTORS, int ROWS = TILE_ROWS - 1>
static inline void rest(int rows, int K, const float *a, long a_row, long a_k, const float *b, long b_k, float *c, long c_row, bool add) {
  if (rows == ROWS) tile<ROWS, VECTORS>(K, a, a_row, a_k, b, b_k, c, c_row, add);
  else if constexpr (ROWS > 1) rest<VECTORS, ROWS - 1>(rows, K, a, a_row, a_k, b, b_k, c, c_row, add);
}

template <int VECTORS>
static void panel(int M, int K, const float *a, long a_row, long a_k, const float *b, long b_k, float *c, long c_row, bool add) {
  int m = 0;
  for (; m + TILE_ROWS <= M; m += TILE_ROWS)
    tile<TILE_ROWS, VECTORS>(K, a + m * a_row, a_row, a_k, b, b_k, c + m * c_row, c_row, add);
  rest<VECTORS>(M - m, K, a + m * a_row, a_row, a_k, b, b_k, c + m * c_row, c_row, add);
}

// c [M, N] = a [M, K] b [K, N], added to c or stored over it; a in any strides, rows of b and c contiguous, N whole vectors.
static void product(int M, int N, int K, const float *a, long a_row, long a_k, const float *b, long b_k, float *c, long c_row,
                    bool add) {
  for (int left = N / LANES; left > 0;) {
    const int vectors = left >= TILE_VECTORS ? (left == TILE_VECTORS + 1 && left > 3 ? 3 : TILE_VECTORS) : left;
    if (vectors == 4) panel<4>(M, K, a, a_row, a_k, b, b_k, c, c_row, add);
    else if (vectors == 3) panel<3>(M, K, a, a_row, a_k, b, b_k, c, c_row, add);
    else if (vectors == 2) panel<2>(M, K, a, a_row, a_k, b, b_k, c, c_row, add);
    else panel<1>(M, K, a, a_row, a_k, b, b_k, c, c_row, add);
    left -= vectors, b += vectors * LANES, c += vectors * LANES;
  }
}

// Rows of a tensor of float32 or bfloat16; strides in elements.
struct Rows {
  void *data;
  bool bfloat16;
  long long row, channel;
  int channels;
};

static inline float widen(unsigned short x) {
  const unsigned bits = unsigned(x) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, 4);
  return wide;
}

static inline unsigned short narrow(float x) {  // to the nearest bfloat16, ties to even
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// to [count, padded] = rows from `first` on; what follows a row's channels is zero.
static void read(const Rows &x, long long first, int count, int padded, float *to) {
  for (int i = 0; i < count; i++, to += padded) {
    const float *wide = static_cast<const float *>(x.data) + (first + i) * x.row;
    const unsigned short *half = static_cast<const unsigned short *>(x.data) + (first + i) * x.row;
    if (x.bfloat16 && x.channel == 1) {
      for (int d = 0; d < x.channels; d++) to[d] = widen(half[d]);
    } else if (x.bfloat16) {
      for (int d = 0; d < x.channels; d++) to[d] = widen(half[d * x.channel]);
    } else if (x.channel == 1) {
      for (int d = 0; d < x.channels; d++) to[d] = wide[d];
    } else {
      for (int d = 0; d < x.channels; d++) to[d] = wide[d * x.channel];
    }
    for (int d = x.channels; d < padded; d++) to[d] = 0;
  }
}

// One row of x = scale * from.
static void write(const Rows &x, long long row, const float *from, float scale) {
  float *const wide = static_cast<float *>(x.data) + row * x.row;
  unsigned short *const half = static_cast<unsigned short *>(x.data) + row * x.row;
  if (x.channel == 1 && x.bfloat16) {
    for (int d = 0; d < x.channels; d++) half[d] = narrow(scale * from[d]);
  } else if (x.channel == 1) {
    for (int d = 0; d < x.channels; d++) wide[d] = scale * from[d];
  } else {
    for (int d = 0; d < x.channels; d++) {
      if (x.bfloat16) half[d * x.channel] = narrow(scale * from[d]);
      else wide[d * x.channel] = scale * from[d];
    }
  }
}

// to [columns, padded] = x [rows, columns] transposed, columns past `rows` zero.
static void transpose(const float *x, int rows, int columns, float *to, int padded) {
  for (int from = 0; from < padded; from += 16) {
    const int end = from + 16 < padded ? from + 16 : padded;
    for (int d = 0; d < columns; d++)
      for (int i = from; i < end; i++) to[d * padded + i] = i < rows ? x[i * columns + d] : 0;
  }
}

}  // namespace WIDTH_NAMESPACE

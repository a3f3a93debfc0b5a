// One plain struct per operator, shared by device and host: pointers (shape in a trailing comment), sizes, strides (in bytes, unless it
// says elements).
// No standard header: NVRTC has none.
#pragma once

enum ScoreType { SCORE_F16 = 0, SCORE_BF16 = 1, SCORE_F32 = 2, SCORE_F64 = 3 };

struct SelectTokensParams {
  const void *x;       // [B, P+N, C], any strides
  const void *scores;  // [B, N], any strides
  void *tokens;        // [B, P+K, C], contiguous
  long long *ids;      // [B, K], contiguous
  long long x_batch, x_token, x_unit;
  long long score_batch, score_token;
  long long units;  // a row of x is that many units of unit_bytes, x_unit apart
  int unit_bytes;   // 1, 2, 4, 8 or 16
  int score_type;   // ScoreType
  int B, P, N, K;
  int rows;  // output rows a thread block copies (CUDA)
};

struct PolicyAttentionParams {
  const void *q, *k, *v;  // [B, H, N, D], any strides
  const float *policy;    // [B, N], contiguous
  void *out;              // [B, H, N, D], any strides
  float *m, *z;           // [B, H, N], contiguous: each row's maximum (CUDA: in units of log 2) and sum
  const void *dout;       // as out; null in the forward pass, with all that follows
  void *dqkv;             // [B, N, 3, H, D], contiguous
  float *dpolicy;         // [B, H, N], contiguous: a share of each head
  // [B, H, N], contiguous, from the kernel for q's gradient to that for k's (CUDA): the row sums of dout * out; the gradient of each row's
  // maximum, and the key it belongs to (-1: left out as too small).
  float *delta, *dm;
  int *top;
  long long q_strides[4], k_strides[4], v_strides[4], out_strides[4], dout_strides[4];  // in elements
  float scale, eps;
  int bfloat16;  // 1: of q, k, v, out and their gradients; 0: float32 (CPU; a CUDA kernel has its dtype in its name)
  int B, H, N, D;
};

struct ShortAttentionParams {
  const void *qkv;       // [T, 3, H, D], channels side by side; T = B * N where there is no cu_seqlens
  void *out;             // [T, H, D], contiguous
  const int *cu_seqlens; // [B+1], contiguous: the first row of each sequence; null: all are N long
  long long qkv_row, T;  // elements from row to row; rows
  float scale;  // CUDA: above 0
  int bfloat16;  // 1: of qkv and out; 0: float32
  int B, H, N, D;  // N: of the longest sequence
};

// c = epilogue(a b + bias): numbered among the live units in what is compact, among all in what is full.
struct SlicedProductParams {
  const void *a;      // [M, K], depth side by side
  const void *b;      // [K, N], columns or depth side by side: that is the kernel's choice
  void *c;            // [M, N]
  const void *bias;   // as b's columns, or null
  void *other;        // [M, N], or null: added, or the GELU's input for its gradient, which its output replaces
  const int *live;    // [L], ids of blocks of `width` units
  long long a_row, b_row, c_row, c_column, other_row, other_column;  // in elements; b_row: from row to row as it lies in memory
  int M, N, K;
  int width, shift;   // of a block; its logarithm, or -1
  int live_rows, live_columns, full_columns, live_depth;  // full: c's rows, b's columns, c's columns, b's depth
  int epilogue;       // 0: other is added; 1: and then the GELU; 2: times the GELU's derivative at `other`
};

struct CompactTokensParams {
  const void *from;           // compact: x [B, N, C]; expand: rows [R, C]; any strides
  void *to;                   // compact: rows [R, C]; expand: [B, N, C]; contiguous
  const unsigned char *keep;  // [B, N], contiguous, 0 or 1
  int *cu_seqlens;            // [B+1], cu_stride apart; written by compact, read by expand
  long long from_batch, from_row, from_unit, cu_stride;
  long long units;            // a row of `from` is that many units of unit_bytes, from_unit apart
  long long R;                // rows
  unsigned long long fill;    // a dropped token's bits, repeated to 8 bytes
  int unit_bytes;             // 1, 2, 4, 8 or 16
  int B, N;
  int chunk;                  // tokens a thread block handles
};

struct AddNormParams {
  const void *x, *residual;             // [R / N, N, C], channels side by side
  const void *weight, *bias, *gamma;    // [C], contiguous; bias and gamma may be null
  void *s, *y;                          // [R, C], contiguous; s is read in the backward pass, with strides
  const void *ds, *dy;                  // as x; in the backward pass, as all that follows
  void *dx, *dresidual;                 // [R, C], contiguous; dresidual null where dx is the same
  float *partial;                       // [3, P, C], contiguous: sums for weight, bias and gamma; [2, P, C] without gamma
  void *dweight, *dbias, *dgamma;       // [C]; dgamma null without gamma, as is the residual there in the backward pass
  long long x_batch, x_row, residual_batch, residual_row, s_batch, s_row, ds_batch, ds_row, dy_batch, dy_row;  // in elements
  long long R, N;
  float eps;
  int C, P;
  int lanes;         // threads of a row: a power of two up to 32, or a multiple of 32
  int wide_vectors;  // 1: weight, bias and gamma are float32; 0: as s
};

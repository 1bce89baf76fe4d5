// The CPU's loops over fp32 and bf16: what they and their bindings share. No torch headers.
#pragma once

#include <cstdint>

namespace ijepa_fast {

// A bf16 number as it lies in memory. Below, T is float or Bf16; all arithmetic is fp32, and so are statistics and sums
// over rows.
struct Bf16 {
  uint16_t bits;
};

// Widths and head dims must be multiples of this many values.
constexpr int64_t kLoopWidth = 16;

// A packed tensor (tokens, heads, dim): a token's heads lie side by side, tokens `stride` values apart.
template <class T>
struct Packed {
  T* data;
  int64_t stride;
};

struct AttentionShape {
  int64_t heads, dim;
  int64_t tokens;  // of the queries: the length of a head's row of statistics
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  float scale;
};

// One head of one sequence.
struct Head {
  int64_t queries, keys, dim;
  float scale;
};

template <class T>
struct AttentionInput {
  Packed<const T> q, k, v;
};

template <class T>
struct AttentionGradient {
  Packed<T> q, k, v;
};

// Rows (rows, width). y = gelu(x + bias); dx and dbias from dy.
template <class T>
struct BiasGelu {
  const T *x, *bias, *dy;
  T *y, *dx;
  int64_t width;
};

// Rows (rows, width). s = x + residual, or x where that is null; y = LayerNorm(s), its statistics (rows,).
template <class T>
struct LayerNorm {
  const T *x, *residual, *weight, *bias;
  T *y, *s;
  float *mean, *rstd;
  int64_t width;
  float eps;
};

// dx of x, and of the residual; ds may be null.
template <class T>
struct LayerNormGradient {
  const T *dy, *ds, *s, *weight;
  const float *mean, *rstd;
  T* dx;
  int64_t width;
};

// dweight (outputs, inputs) = dy^T x; dy (tokens, outputs), x (tokens, inputs), inputs a multiple of kLoopWidth, and of
// bf16 outputs, too.
template <class T>
struct WeightGradient {
  const T *dy, *x;
  T* dweight;
  int64_t tokens, outputs, inputs;
};

// Rows [top, bottom) and columns [left, right) of a matrix.
struct Block {
  int64_t top, bottom, left, right;
};

// All on the calling thread.
template <class T>
struct Loops {
  // Pairs of a sequence and a head, number sequence * heads + head, [begin, end). statistics (2, heads, tokens): each
  // row's largest score before scaling, and 1 over its softmax denominator relative to that. `scratch` holds
  // attention_scratch() floats for the longest of the sequences.
  int64_t (*attention_scratch)(int64_t dim, int64_t queries, int64_t keys);
  void (*attention)(const AttentionShape&, const AttentionInput<T>&, Packed<T> out, float* statistics, int64_t begin,
                    int64_t end, float* scratch);
  void (*attention_backward)(const AttentionShape&, const AttentionInput<T>&, Packed<const T> dout,
                             const float* statistics, const AttentionGradient<T>&, int64_t begin, int64_t end,
                             float* scratch);
  // Rows [begin, end). Gradients of parameters are added to what is there.
  void (*bias_gelu)(const BiasGelu<T>&, int64_t begin, int64_t end);
  void (*bias_gelu_backward)(const BiasGelu<T>&, int64_t begin, int64_t end, float* dbias);
  void (*layer_norm)(const LayerNorm<T>&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormGradient<T>&, int64_t begin, int64_t end, float* dparameters);
  void (*column_sums)(const T* x, int64_t width, int64_t begin, int64_t end, float* sums);
  // A block of dweight; `scratch` holds weight_gradient_scratch floats. Null where PyTorch's are as fast.
  void (*weight_gradient)(const WeightGradient<T>&, Block, float* scratch);
  int64_t weight_gradient_scratch;
};

// Those for this machine, for float and for Bf16.
template <class T>
const Loops<T>& loops();

}  // namespace ijepa_fast

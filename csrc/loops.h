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

// dweight (outputs, inputs) = dy^T x; dy (tokens, outputs), x (tokens, inputs), inputs a multiple of kLoopWidth.
struct WeightGradient {
  const float *dy, *x;
  float* dweight;
  int64_t tokens, outputs, inputs;
};
// Rows of dweight that one call may compute, tokens it takes at a time, and the widest panel of x: in floats, 192 KB of
// dy, which the second cache holds, and 32 KB of x, which the first one does.
constexpr int64_t kGradientRows = 384, kGradientDepth = 128, kGradientWidth = 64;

// Loops over rows, on the calling thread: rows [begin, end). Gradients of parameters are added to what is there.
template <class T>
struct RowLoops {
  void (*bias_gelu)(const BiasGelu<T>&, int64_t begin, int64_t end);
  void (*bias_gelu_backward)(const BiasGelu<T>&, int64_t begin, int64_t end, float* dbias);
  void (*layer_norm)(const LayerNorm<T>&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormGradient<T>&, int64_t begin, int64_t end, float* dparameters);
  void (*column_sums)(const T* x, int64_t width, int64_t begin, int64_t end, float* sums);
};

// All on the calling thread.
struct Loops {
  // One sequence and one head. statistics (2, heads, tokens): each row's largest score before scaling, and 1 over
  // its softmax denominator relative to that. `scratch` holds attention_scratch() floats.
  void (*attention)(const AttentionShape&, const AttentionInput<float>&, Packed<float> out, float* statistics,
                    int64_t sequence, int64_t head, float* scratch);
  void (*attention_backward)(const AttentionShape&, const AttentionInput<float>&, Packed<const float> dout,
                             const float* statistics, const AttentionGradient<float>&, int64_t sequence, int64_t head,
                             float* scratch);
  // Rows [begin, end) of dweight; `scratch` holds weight_gradient_scratch() floats.
  void (*weight_gradient)(const WeightGradient&, int64_t begin, int64_t end, float* scratch);
  RowLoops<float> rows;
  RowLoops<Bf16> rows_bf16;
};

// Those for this machine's vectors.
const Loops& loops();

// Floats that a thread needs for sequences of up to `keys` keys.
int64_t attention_scratch(int64_t dim, int64_t keys);
int64_t weight_gradient_scratch();

}  // namespace ijepa_fast

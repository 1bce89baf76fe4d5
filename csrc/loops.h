// The CPU's fp32 loops: what they and their bindings share. No torch headers.
#pragma once

#include <cstdint>

namespace ijepa_fast {

// Widths and head dims must be multiples of this many floats.
constexpr int64_t kLoopWidth = 16;

// A packed tensor (tokens, heads, dim): a token's heads lie side by side, tokens `stride` floats apart.
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

struct AttentionInput {
  Packed<const float> q, k, v;
};

struct AttentionGradient {
  Packed<float> q, k, v;
};

// Rows (rows, width). y = gelu(x + bias); dx and dbias from dy.
struct BiasGelu {
  const float *x, *bias, *dy;
  float *y, *dx;
  int64_t width;
};

// Rows (rows, width). s = x + residual, or x where that is null; y = LayerNorm(s), its statistics (rows,).
struct LayerNorm {
  const float *x, *residual, *weight, *bias;
  float *y, *s, *mean, *rstd;
  int64_t width;
  float eps;
};

// dx of x, and of the residual; ds may be null.
struct LayerNormGradient {
  const float *dy, *ds, *s, *weight, *mean, *rstd;
  float* dx;
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

// All on the calling thread.
struct Loops {
  // One sequence and one head. statistics (2, heads, tokens): each row's largest score before scaling, and 1 over
  // its softmax denominator relative to that. `scratch` holds attention_scratch() floats.
  void (*attention)(const AttentionShape&, const AttentionInput&, Packed<float> out, float* statistics,
                    int64_t sequence, int64_t head, float* scratch);
  void (*attention_backward)(const AttentionShape&, const AttentionInput&, Packed<const float> dout,
                             const float* statistics, const AttentionGradient&, int64_t sequence, int64_t head,
                             float* scratch);
  // Rows [begin, end). Gradients of parameters are added to what is there.
  void (*bias_gelu)(const BiasGelu&, int64_t begin, int64_t end);
  void (*bias_gelu_backward)(const BiasGelu&, int64_t begin, int64_t end, float* dbias);
  void (*layer_norm)(const LayerNorm&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormGradient&, int64_t begin, int64_t end, float* dparameters);
  // Rows [begin, end) of dweight; `scratch` holds weight_gradient_scratch() floats.
  void (*weight_gradient)(const WeightGradient&, int64_t begin, int64_t end, float* scratch);
};

// Those for this machine's vectors.
const Loops& loops();

// Floats that a thread needs for sequences of up to `keys` keys.
int64_t attention_scratch(int64_t dim, int64_t keys);
int64_t weight_gradient_scratch();

}  // namespace ijepa_fast

// AdamW and EMA in one pass over each tensor: what the CPU loop, the CUDA kernel and their binding share. No torch headers.
#pragma once

#include <cstdint>

namespace ijepa_fast {

// The derived scalars of one step, in the order of step_scalars() in kernels/adamw_ema/reference.py.
struct AdamWScalars {
  float decay;         // 1 - lr * weight_decay
  float gain1;         // 1 - beta1
  float beta2;
  float gain2;         // 1 - beta2
  float step_size;     // lr / (1 - beta1^step)
  float correction2;   // sqrt(1 - beta2^step)
  float eps;
  float momentum;
  float gain_ema;      // 1 - momentum
};
constexpr int kScalars = 9;

// One tensor of `size` elements. ema, param_out and ema_out may be null.
struct AdamWSpan {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;
  void* param_out;
  void* ema_out;
  int64_t size;
};

// Which of the tensors of a call are bfloat16; the others are float.
struct AdamWBf16 {
  bool grad, param_out, ema_out;
};

// Elements [begin, end) of one span, on the calling thread.
void adamw_ema_cpu(const AdamWSpan& span, AdamWBf16 bf16, int64_t begin, int64_t end, const AdamWScalars& scalars);

// All spans, on `stream` (a cudaStream_t). Takes the scalars from `device_scalars` (kScalars doubles) unless that is null,
// so that a captured graph can be replayed with new ones. Returns the launch's cudaError_t.
int adamw_ema_cuda(const AdamWSpan* spans, int64_t count, AdamWBf16 bf16, const AdamWScalars& scalars,
                   const double* device_scalars, void* stream);

}  // namespace ijepa_fast

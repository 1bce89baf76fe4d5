// The CUDA kernel: all tensors of a list in a few launches, 38 bytes a parameter with bf16 gradients and both copies.
// The table of tensors travels as a kernel parameter, so nothing is copied to the device first. No torch headers.
#include "adamw_ema.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace ijepa_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;             // elements of one 16-byte access
constexpr int64_t kChunk = 8192;       // elements of one block
constexpr int kSpans = 256;            // tensors of one launch: the table must stay below 32 KB

struct Table {
  AdamWSpan spans[kSpans];
  int first_block[kSpans + 1];
  int count;
};

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Grad>
__device__ void update(Grad grad, float& param, float& m, float& v, float& ema, const AdamWScalars& s) {
  const float g = widen(grad);
  m += s.gain1 * (g - m);
  v = s.beta2 * v + s.gain2 * g * g;
  param = s.decay * param - s.step_size * m / (sqrtf(v) / s.correction2 + s.eps);
  ema = s.momentum * ema + s.gain_ema * param;
}

template <typename T>
struct alignas(sizeof(T) * kVector) Pack {
  T x[kVector];
};

template <typename T>
__device__ Pack<T> load(const void* from, int64_t i) {
  return *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(from) + i);
}

template <typename T>
__device__ void store(T* to, int64_t i, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to + i) = pack;
}

__device__ void store_copy(void* to, int64_t i, const Pack<float>& pack, bool bf16) {
  if (!bf16) return store(static_cast<float*>(to), i, pack);
  Pack<__nv_bfloat16> rounded;
#pragma unroll
  for (int j = 0; j < kVector; ++j) rounded.x[j] = __float2bfloat16_rn(pack.x[j]);
  store(static_cast<__nv_bfloat16*>(to), i, rounded);
}

__device__ void store_copy(void* to, int64_t i, float value, bool bf16) {
  if (bf16) {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(to)[i] = value;
  }
}

template <typename Grad>
__device__ void update_pack(const AdamWSpan& span, AdamWBf16 bf16, int64_t i, const AdamWScalars& s) {
  const auto grad = load<Grad>(span.grad, i);
  auto param = load<float>(span.param, i), m = load<float>(span.exp_avg, i), v = load<float>(span.exp_avg_sq, i);
  auto ema = span.ema ? load<float>(span.ema, i) : Pack<float>{};
#pragma unroll
  for (int j = 0; j < kVector; ++j) update(grad.x[j], param.x[j], m.x[j], v.x[j], ema.x[j], s);
  store(span.param, i, param);
  store(span.exp_avg, i, m);
  store(span.exp_avg_sq, i, v);
  if (span.param_out) store_copy(span.param_out, i, param, bf16.param_out);
  if (span.ema) store(span.ema, i, ema);
  if (span.ema && span.ema_out) store_copy(span.ema_out, i, ema, bf16.ema_out);
}

template <typename Grad>
__device__ void update_one(const AdamWSpan& span, AdamWBf16 bf16, int64_t i, const AdamWScalars& s) {
  float ema = span.ema ? span.ema[i] : 0.f;
  update(static_cast<const Grad*>(span.grad)[i], span.param[i], span.exp_avg[i], span.exp_avg_sq[i], ema, s);
  if (span.param_out) store_copy(span.param_out, i, span.param[i], bf16.param_out);
  if (span.ema) span.ema[i] = ema;
  if (span.ema && span.ema_out) store_copy(span.ema_out, i, ema, bf16.ema_out);
}

__device__ bool aligned(const AdamWSpan& span) {
  const void* all[] = {span.param, span.grad, span.exp_avg, span.exp_avg_sq, span.ema, span.param_out, span.ema_out};
  uintptr_t bits = 0;
#pragma unroll
  for (const void* pointer : all) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % (sizeof(float) * kVector) == 0;
}

template <typename Grad>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table table, AdamWBf16 bf16, AdamWScalars scalars,
                     const double* device_scalars) {
  if (device_scalars) {
    const auto at = [device_scalars](int i) { return static_cast<float>(device_scalars[i]); };
    scalars = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
  }
  int low = 0, high = table.count;  // the span whose blocks contain this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  const AdamWSpan& span = table.spans[low];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[low]) * kChunk;
  const int64_t end = begin + kChunk < span.size ? begin + kChunk : span.size;
  const int64_t vector_end = aligned(span) ? end - (end - begin) % kVector : begin;
#pragma unroll 2
  for (int64_t i = begin + threadIdx.x * kVector; i < vector_end; i += kThreads * kVector) {
    update_pack<Grad>(span, bf16, i, scalars);
  }
  for (int64_t i = vector_end + threadIdx.x; i < end; i += kThreads) update_one<Grad>(span, bf16, i, scalars);
}

}  // namespace

int adamw_ema_cuda(const AdamWSpan* spans, int64_t count, AdamWBf16 bf16, const AdamWScalars& scalars,
                   const double* device_scalars, void* stream) {
  for (int64_t at = 0; at < count;) {
    Table table{};
    int64_t blocks = 0;
    for (; at < count && table.count < kSpans; ++at) {
      const int64_t more = (spans[at].size + kChunk - 1) / kChunk;
      if (blocks + more > INT32_MAX) break;
      if (more == 0) continue;
      table.spans[table.count] = spans[at];
      table.first_block[table.count++] = static_cast<int>(blocks);
      blocks += more;
    }
    table.first_block[table.count] = static_cast<int>(blocks);
    if (blocks == 0) continue;
    const auto kernel = bf16.grad ? adamw_ema_kernel<__nv_bfloat16> : adamw_ema_kernel<float>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, bf16, scalars,
                                                                                             device_scalars);
    if (const auto error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace ijepa_fast

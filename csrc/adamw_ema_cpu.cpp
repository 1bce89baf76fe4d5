// The CPU loop. Blocks small enough for the first-level cache pass through separate short loops, which vectorise whole;
// the compiler makes one version for each generation of x86 (and NEON on Arm), and the machine picks its own when it loads.
#include "adamw_ema.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSION
#endif
#define INLINE inline __attribute__((always_inline))

namespace ijepa_fast {
namespace {

// One kilobyte of each tensor: with a page of each, tensors that start at the same place in their pages would evict each
// other from the first-level cache.
constexpr int64_t kBlock = 256;

INLINE float widen(uint16_t value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To bfloat16, to nearest even; NaN stays NaN.
INLINE void narrow(const float* __restrict from, uint16_t* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

INLINE void copy(const float* __restrict from, void* to, int64_t at, int64_t n, bool bf16) {
  if (bf16) {
    narrow(from, static_cast<uint16_t*>(to) + at, n);
  } else {
    std::memcpy(static_cast<float*>(to) + at, from, n * sizeof(float));
  }
}

INLINE void adamw(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                  float* __restrict exp_avg_sq, int64_t n, const AdamWScalars& s) {
  for (int64_t i = 0; i < n; ++i) {
    float m = exp_avg[i] + s.gain1 * (grad[i] - exp_avg[i]);
    float v = s.beta2 * exp_avg_sq[i] + s.gain2 * grad[i] * grad[i];
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = s.decay * param[i] - s.step_size * m / (std::sqrt(v) / s.correction2 + s.eps);
  }
}

INLINE void average(float* __restrict ema, const float* __restrict param, int64_t n, const AdamWScalars& s) {
  for (int64_t i = 0; i < n; ++i) ema[i] = s.momentum * ema[i] + s.gain_ema * param[i];
}

}  // namespace

MULTIVERSION
void adamw_ema_cpu(const AdamWSpan& span, AdamWBf16 bf16, int64_t begin, int64_t end, const AdamWScalars& scalars) {
  float widened[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    const float* grad = static_cast<const float*>(span.grad) + at;
    if (bf16.grad) {
      const uint16_t* half = static_cast<const uint16_t*>(span.grad) + at;
      for (int64_t i = 0; i < n; ++i) widened[i] = widen(half[i]);
      grad = widened;
    }
    adamw(span.param + at, grad, span.exp_avg + at, span.exp_avg_sq + at, n, scalars);
    if (span.param_out) copy(span.param + at, span.param_out, at, n, bf16.param_out);
    if (!span.ema) continue;
    average(span.ema + at, span.param + at, n, scalars);
    if (span.ema_out) copy(span.ema + at, span.ema_out, at, n, bf16.ema_out);
  }
}

}  // namespace ijepa_fast

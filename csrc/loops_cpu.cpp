// The loops for each generation of x86; the machine's own are picked once.
#include "loops.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // Clang has no such pragma
#define IJEPA_FAST_X86
#include <immintrin.h>
#endif

namespace ijepa_fast {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kQueries = 96;  // rows of the score matrix held at a time
#define ROW_LOOPS {bias_gelu, bias_gelu_backward, layer_norm, layer_norm_backward, column_sums}
#define LOOPS {attention, attention_backward, weight_gradient, ROW_LOOPS, ROW_LOOPS}

// Any machine: vectors of 4 floats, 16 registers.
namespace any {
constexpr int kWidth = 4, kRows = 4, kVectors = 2;
#include "vectors.h"
#include "product_loops.h"
#include "attention_loops.h"
#include "row_loops.h"
constexpr Loops kLoops = LOOPS;
}  // namespace any

#ifdef IJEPA_FAST_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
constexpr int kWidth = 8, kRows = 6, kVectors = 2;
#include "vectors.h"
#include "product_loops.h"
#include "attention_loops.h"
#include "row_loops.h"
constexpr Loops kLoops = LOOPS;
}  // namespace v3
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
constexpr int kWidth = 16, kRows = 6, kVectors = 4;
#include "vectors.h"
#include "product_loops.h"
#include "attention_loops.h"
#include "row_loops.h"
constexpr Loops kLoops = LOOPS;
}  // namespace v4
#pragma GCC pop_options
#endif

const Loops& pick() {
#ifdef IJEPA_FAST_X86
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");  // PyTorch's own variable, which lowers its choice likewise
  const bool plain = wanted && !std::strcmp(wanted, "default"), narrow = wanted && !std::strcmp(wanted, "avx2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd");
  if (!plain && !narrow && avx512) return v4::kLoops;
  if (!plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return v3::kLoops;
#endif
  return any::kLoops;
}

}  // namespace

const Loops& loops() {
  static const Loops& picked = pick();
  return picked;
}

int64_t attention_scratch(int64_t dim, int64_t keys) {
  const int64_t width = (keys + kLoopWidth - 1) / kLoopWidth * kLoopWidth;
  return 2 * (dim + kQueries) * width;
}

int64_t weight_gradient_scratch() { return (kGradientRows + kGradientWidth) * kGradientDepth; }

}  // namespace ijepa_fast

// The loops for each kind of processor; the machine's own are picked once.
#include "loops.h"
#include "processor.h"

#include <algorithm>
#include <utility>

#ifdef IJEPA_FAST_X86
#include <immintrin.h>
#endif

// What is between the two is compiled for a target of its own.
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define PUSH_TARGET(name) PRAGMA(clang attribute push(__attribute__((target(name))), apply_to = function))
#define POP_TARGET PRAGMA(clang attribute pop)
#define WIDEST
#else
#define PUSH_TARGET(name) PRAGMA(GCC push_options) PRAGMA(GCC target(name))
#define POP_TARGET PRAGMA(GCC pop_options)
#define WIDEST ",prefer-vector-width=512"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
#endif

namespace ijepa_fast {
namespace {

constexpr float kLog2E = 1.44269504f;
#define LOOPS(T, ...) \
  {attention_scratch<T>, attention<T>, attention_backward<T>, bias_gelu<T>, bias_gelu_backward<T>, layer_norm<T>, \
   layer_norm_backward<T>, column_sums<T>, __VA_ARGS__}

// Any machine: vectors of 4 floats, 16 registers.
namespace any {
constexpr int kWidth = 4, kRows = 4, kVectors = 2;
#include "vectors.h"
#include "bf16_integers.h"
#include "product_loops.h"
#include "attention_loops.h"
#include "attention_heads.h"
#include "row_loops.h"
constexpr Loops<float> kFp32 = LOOPS(float, weight_gradient, kGradientScratch);
constexpr Loops<Bf16> kBf16 = LOOPS(Bf16, nullptr, 0);
}  // namespace any

#ifdef IJEPA_FAST_X86
PUSH_TARGET("arch=x86-64-v3")
namespace v3 {
constexpr int kWidth = 8, kRows = 6, kVectors = 2;
#include "vectors.h"
#include "bf16_integers.h"
#include "product_loops.h"
#include "attention_loops.h"
#include "attention_heads.h"
#include "row_loops.h"
constexpr Loops<float> kFp32 = LOOPS(float, weight_gradient, kGradientScratch);
constexpr Loops<Bf16> kBf16 = LOOPS(Bf16, nullptr, 0);
}  // namespace v3
POP_TARGET

PUSH_TARGET("arch=x86-64-v4" WIDEST)
namespace v4 {
constexpr int kWidth = 16, kRows = 6, kVectors = 4;
#include "vectors.h"
#include "bf16_integers.h"
#include "product_loops.h"
#include "attention_loops.h"
#include "attention_heads.h"
#include "row_loops.h"
constexpr Loops<float> kFp32 = LOOPS(float, weight_gradient, kGradientScratch);
constexpr Loops<Bf16> kBf16 = LOOPS(Bf16, nullptr, 0);
}  // namespace v4
POP_TARGET
#endif

#ifdef IJEPA_FAST_AMX
PUSH_TARGET("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16" WIDEST)
namespace amx {
constexpr int kWidth = 16;
#include "vectors.h"
#include "bf16_avx512.h"
#include "amx_products.h"
#include "pair_loops.h"
#include "pair_attention.h"
#include "attention_heads.h"
#include "pair_gradient.h"
#include "row_loops.h"
constexpr Loops<Bf16> kBf16 = LOOPS(Bf16, weight_gradient, kGradientScratch);
}  // namespace amx
POP_TARGET
#endif

}  // namespace

template <>
const Loops<float>& loops() {
#ifdef IJEPA_FAST_X86
  if (processor().kind >= Kind::v4) return v4::kFp32;
  if (processor().kind == Kind::v3) return v3::kFp32;
#endif
  return any::kFp32;
}

template <>
const Loops<Bf16>& loops() {
#ifdef IJEPA_FAST_AMX
  if (processor().kind == Kind::amx) return amx::kBf16;
#endif
#ifdef IJEPA_FAST_X86
  if (processor().kind >= Kind::v4) return v4::kBf16;
  if (processor().kind == Kind::v3) return v3::kBf16;
#endif
  return any::kBf16;
}

}  // namespace ijepa_fast

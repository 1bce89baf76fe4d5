// Binding of the CPU's weight gradient to the schema that kernels/linear/native.py defines.
#include "loops.h"
#include "scratch.h"
#include "storage.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

namespace ijepa_fast {
namespace {

void weight_gradient_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& dweight) {
  // The checks of shapes are in ops.py; these guard memory when the op is called by its name.
  check_type("linear", x);
  for (const at::Tensor& tensor : {dy, x, dweight}) {
    TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.scalar_type() == x.scalar_type() && tensor.is_contiguous(),
                      "linear: expected contiguous ", name_of(x.scalar_type()), " matrices");
  }
  TORCH_CHECK_VALUE(x.size(1) % kLoopWidth == 0, "linear: expected inputs that are a multiple of ", kLoopWidth);
  TORCH_CHECK_VALUE(dy.size(0) == x.size(0) && dweight.size(0) == dy.size(1) && dweight.size(1) == x.size(1),
                    "linear: expected dy and x of equal length, and a gradient of (outputs, inputs)");
  if (x.size(0) == 0) {
    dweight.zero_();
    return;
  }
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Loops<T>& own = loops<T>();
    TORCH_CHECK_VALUE(own.weight_gradient, "linear: this machine has no loop for weight gradients in bfloat16");
    const bool pairs = sizeof(T) == 2;
    TORCH_CHECK_VALUE(!pairs || dy.size(1) % kLoopWidth == 0, "linear: expected outputs that are a multiple of ",
                      kLoopWidth);
    const WeightGradient<T> args{values<T>(dy), values<T>(x), written<T>(dweight), x.size(0), dy.size(1), x.size(1)};
    // Of fp32, 24 rows at least are a piece of work; of bf16, 32, and whole tiles.
    const int64_t unit = pairs ? 32 : 1;
    at::parallel_for(0, (args.outputs + unit - 1) / unit, pairs ? 1 : 24, [&](int64_t begin, int64_t end) {
      const Scratch memory = scratch(own.weight_gradient_scratch);
      own.weight_gradient(args, begin * unit, std::min(end * unit, args.outputs), memory.get());
    });
  });
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) { library.impl("linear_dweight_cpu_", ijepa_fast::weight_gradient_cpu); }

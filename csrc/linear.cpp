// Binding of the CPU's weight gradient to the schema that kernels/linear/native.py defines.
#include "loops.h"
#include "scratch.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

namespace ijepa_fast {
namespace {

void weight_gradient_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& dweight) {
  // The checks of shapes are in ops.py; these guard memory when the op is called by its name.
  for (const at::Tensor& tensor : {dy, x, dweight}) {
    TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.scalar_type() == at::kFloat && tensor.is_contiguous(),
                      "linear: expected contiguous float32 matrices");
  }
  TORCH_CHECK_VALUE(x.size(1) % kLoopWidth == 0, "linear: expected inputs that are a multiple of ", kLoopWidth);
  TORCH_CHECK_VALUE(dy.size(0) == x.size(0) && dweight.size(0) == dy.size(1) && dweight.size(1) == x.size(1),
                    "linear: expected dy and x of equal length, and a gradient of (outputs, inputs)");
  if (x.size(0) == 0) dweight.zero_();
  const WeightGradient args{dy.const_data_ptr<float>(), x.const_data_ptr<float>(), dweight.data_ptr<float>(),
                            x.size(0),                  dy.size(1),                x.size(1)};
  constexpr int64_t kGrain = 24;  // rows
  at::parallel_for(0, args.outputs, kGrain, [&](int64_t begin, int64_t end) {
    const Scratch memory = scratch(weight_gradient_scratch());
    for (int64_t row = begin; row < end; row += kGradientRows) {
      loops().weight_gradient(args, row, std::min(end, row + kGradientRows), memory.get());
    }
  });
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) { library.impl("linear_dweight_cpu_", ijepa_fast::weight_gradient_cpu); }

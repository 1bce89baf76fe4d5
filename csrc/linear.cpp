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

// The size of the blocks of a matrix that are a thread's pieces of work.
struct Cut {
  int64_t height, width;
};
int64_t pieces(int64_t length, int64_t each) { return (length + each - 1) / each; }
int64_t up(int64_t n, int64_t to) { return pieces(n, to) * to; }

Cut rows_alone(int64_t outputs, int64_t inputs, int64_t threads) {
  return {up(std::max<int64_t>(pieces(outputs, threads), 24), 24), inputs};
}

// Blocks of whole tiles, such that the slowest thread has least to do: products, and rows and columns brought into the
// layout of a product, of which one costs as much as `kLayout` products (measured: 50 to 100).
Cut blocks(int64_t outputs, int64_t inputs, int64_t threads) {
  constexpr int64_t kLayout = 64, kMost = 512;
  Cut best{outputs, inputs};
  int64_t least = INT64_MAX;
  for (int64_t down = 1; down <= pieces(outputs, 32); ++down) {
    for (int64_t across = 1; across <= pieces(inputs, 32); ++across) {
      const Cut cut{up(pieces(outputs, down), 32), up(pieces(inputs, across), 32)};
      if (down * across > 4 * threads && cut.height <= kMost && cut.width <= kMost) break;
      const int64_t rounds = pieces(pieces(outputs, cut.height) * pieces(inputs, cut.width), threads);
      const int64_t passes = pieces(cut.height, kMost) * cut.width + pieces(cut.width, kMost) * cut.height;
      const int64_t cost = rounds * (cut.height * cut.width + kLayout * passes);
      if (cost < least) least = cost, best = cut;
    }
  }
  return best;
}

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
    const int64_t threads = at::get_num_threads();
    const Cut cut = pairs ? blocks(args.outputs, args.inputs, threads) : rows_alone(args.outputs, args.inputs, threads);
    const int64_t across = pieces(args.inputs, cut.width);
    at::parallel_for(0, pieces(args.outputs, cut.height) * across, 1, [&](int64_t begin, int64_t end) {
      const Scratch memory = scratch(own.weight_gradient_scratch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t top = i / across * cut.height, left = i % across * cut.width;
        const int64_t bottom = std::min(top + cut.height, args.outputs), right = std::min(left + cut.width, args.inputs);
        own.weight_gradient(args, {top, bottom, left, right}, memory.get());
      }
    });
  });
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) { library.impl("linear_dweight_cpu_", ijepa_fast::weight_gradient_cpu); }

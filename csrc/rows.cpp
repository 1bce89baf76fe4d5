// Bindings of the CPU's row-wise loops to the schemas that kernels/{bias_gelu,layer_norm}/native.py define.
#include "loops.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <vector>

namespace ijepa_fast {
namespace {

constexpr int64_t kGrain = 16384;  // values of one piece of work at least

// The checks of shapes are in ops.py; these guard memory when an op is called by its name.
void check(const char* op, int64_t size, std::initializer_list<std::optional<at::Tensor>> tensors) {
  for (const auto& x : tensors) {
    TORCH_CHECK_VALUE(!x || (x->scalar_type() == at::kFloat && x->is_contiguous() && x->numel() == size), op,
                      ": expected contiguous float32 tensors of ", size, " values");
  }
}

int64_t width_of(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) % kLoopWidth == 0, op, ": expected rows of a multiple of ", kLoopWidth,
                    " values");
  return x.size(1);
}

const float* pointer(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<float>() : nullptr; }

// run(begin, end) over the rows, on PyTorch's threads.
template <class Run>
void each_row(const at::Tensor& x, const Run& run) {
  at::parallel_for(0, x.size(0), kGrain / std::max<int64_t>(x.size(1), 1) + 1, run);
}

// run(begin, end, sums), every thread with sums of its own; `total` receives theirs, added in the order of the rows.
template <class Run>
void each_row_summing(const at::Tensor& x, const at::Tensor& total, const Run& run) {
  std::vector<std::pair<int64_t, std::vector<float>>> parts;
  std::mutex mutex;
  each_row(x, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(total.numel(), 0.0f);
    run(begin, end, sums.data());
    const std::lock_guard<std::mutex> lock(mutex);
    parts.emplace_back(begin, std::move(sums));
  });
  std::sort(parts.begin(), parts.end());
  total.zero_();
  float* to = total.data_ptr<float>();
  for (const auto& [begin, sums] : parts) {
    for (size_t i = 0; i < sums.size(); ++i) to[i] += sums[i];
  }
}

void bias_gelu_cpu(const at::Tensor& x, const at::Tensor& bias, const at::Tensor& y) {
  const int64_t width = width_of("bias_gelu", x);
  check("bias_gelu", width, {bias});
  check("bias_gelu", x.numel(), {x, y});
  const BiasGelu args{pointer(x), pointer(bias), nullptr, y.data_ptr<float>(), nullptr, width};
  each_row(x, [&](int64_t begin, int64_t end) { loops().bias_gelu(args, begin, end); });
}

void bias_gelu_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bias, const at::Tensor& dx,
                            const at::Tensor& dbias) {
  const int64_t width = width_of("bias_gelu", x);
  check("bias_gelu", width, {bias, dbias});
  check("bias_gelu", x.numel(), {dy, x, dx});
  const BiasGelu args{pointer(x), pointer(bias), pointer(dy), nullptr, dx.data_ptr<float>(), width};
  each_row_summing(x, dbias, [&](int64_t begin, int64_t end, float* sums) {
    loops().bias_gelu_backward(args, begin, end, sums);
  });
}

void layer_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight,
                    const at::Tensor& bias, double eps, const at::Tensor& y, const std::optional<at::Tensor>& s,
                    const at::Tensor& mean, const at::Tensor& rstd) {
  const int64_t width = width_of("layer_norm", x);
  check("layer_norm", width, {weight, bias});
  check("layer_norm", x.size(0), {mean, rstd});
  check("layer_norm", x.numel(), {x, residual, y, s});
  TORCH_CHECK_VALUE(residual.has_value() == s.has_value(), "layer_norm: expected s with a residual, and only then");
  const LayerNorm args{pointer(x),          pointer(residual),         pointer(weight),
                       pointer(bias),       y.data_ptr<float>(),       s ? s->data_ptr<float>() : nullptr,
                       mean.data_ptr<float>(), rstd.data_ptr<float>(), width,
                       static_cast<float>(eps)};
  each_row(x, [&](int64_t begin, int64_t end) { loops().layer_norm(args, begin, end); });
}

void layer_norm_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                             const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& rstd,
                             const at::Tensor& dx, const at::Tensor& dparameters) {
  const int64_t width = width_of("layer_norm", s);
  check("layer_norm", width, {weight});
  check("layer_norm", 2 * width, {dparameters});
  check("layer_norm", s.size(0), {mean, rstd});
  check("layer_norm", s.numel(), {dy, ds, s, dx});
  const LayerNormGradient args{pointer(dy),   pointer(ds),   pointer(s), pointer(weight),
                               pointer(mean), pointer(rstd), dx.data_ptr<float>(), width};
  each_row_summing(s, dparameters, [&](int64_t begin, int64_t end, float* sums) {
    loops().layer_norm_backward(args, begin, end, sums);
  });
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  library.impl("bias_gelu_cpu_", ijepa_fast::bias_gelu_cpu);
  library.impl("bias_gelu_bwd_cpu_", ijepa_fast::bias_gelu_backward_cpu);
  library.impl("layer_norm_cpu_", ijepa_fast::layer_norm_cpu);
  library.impl("layer_norm_bwd_cpu_", ijepa_fast::layer_norm_backward_cpu);
}

// Bindings of the CPU's row-wise loops to the schemas that kernels/{bias_gelu,layer_norm,linear}/native.py define.
#include "loops.h"
#include "storage.h"

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
void check(const char* op, int64_t size, at::ScalarType type, std::initializer_list<std::optional<at::Tensor>> tensors) {
  for (const auto& x : tensors) {
    TORCH_CHECK_VALUE(!x || (x->scalar_type() == type && x->is_contiguous() && x->numel() == size), op,
                      ": expected contiguous ", name_of(type), " tensors of ", size, " values");
  }
}

int64_t width_of(const char* op, const at::Tensor& x) {
  check_type(op, x);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) % kLoopWidth == 0, op, ": expected rows of a multiple of ", kLoopWidth,
                    " values");
  return x.size(1);
}

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
  const at::Tensor sum = total.scalar_type() == at::kFloat ? total.zero_() : total.new_zeros(total.sizes(), at::kFloat);
  float* to = sum.data_ptr<float>();
  for (const auto& [begin, sums] : parts) {
    for (size_t i = 0; i < sums.size(); ++i) to[i] += sums[i];
  }
  if (total.scalar_type() != at::kFloat) total.copy_(sum);
}

void bias_gelu_cpu(const at::Tensor& x, const at::Tensor& bias, const at::Tensor& y) {
  const int64_t width = width_of("bias_gelu", x);
  check("bias_gelu", width, x.scalar_type(), {bias});
  check("bias_gelu", x.numel(), x.scalar_type(), {x, y});
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const BiasGelu<T> args{values<T>(x), values<T>(bias), nullptr, written<T>(y), nullptr, width};
    each_row(x, [&](int64_t begin, int64_t end) { loops<T>().bias_gelu(args, begin, end); });
  });
}

void bias_gelu_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bias, const at::Tensor& dx,
                            const at::Tensor& dbias) {
  const int64_t width = width_of("bias_gelu", x);
  check("bias_gelu", width, x.scalar_type(), {bias, dbias});
  check("bias_gelu", x.numel(), x.scalar_type(), {dy, x, dx});
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const BiasGelu<T> args{values<T>(x), values<T>(bias), values<T>(dy), nullptr, written<T>(dx), width};
    each_row_summing(x, dbias, [&](int64_t begin, int64_t end, float* sums) {
      loops<T>().bias_gelu_backward(args, begin, end, sums);
    });
  });
}

void layer_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight,
                    const at::Tensor& bias, double eps, const at::Tensor& y, const std::optional<at::Tensor>& s,
                    const at::Tensor& mean, const at::Tensor& rstd) {
  const int64_t width = width_of("layer_norm", x);
  check("layer_norm", width, x.scalar_type(), {weight, bias});
  check("layer_norm", x.size(0), at::kFloat, {mean, rstd});
  check("layer_norm", x.numel(), x.scalar_type(), {x, residual, y, s});
  TORCH_CHECK_VALUE(residual.has_value() == s.has_value(), "layer_norm: expected s with a residual, and only then");
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const LayerNorm<T> args{values<T>(x),    values<T>(residual), values<T>(weight),
                            values<T>(bias), written<T>(y),       s ? written<T>(*s) : nullptr,
                            written<float>(mean), written<float>(rstd), width, static_cast<float>(eps)};
    each_row(x, [&](int64_t begin, int64_t end) { loops<T>().layer_norm(args, begin, end); });
  });
}

void layer_norm_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& ds, const at::Tensor& s,
                             const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& rstd,
                             const at::Tensor& dx, const at::Tensor& dparameters) {
  const int64_t width = width_of("layer_norm", s);
  check("layer_norm", width, s.scalar_type(), {weight});
  check("layer_norm", 2 * width, s.scalar_type(), {dparameters});
  check("layer_norm", s.size(0), at::kFloat, {mean, rstd});
  check("layer_norm", s.numel(), s.scalar_type(), {dy, ds, s, dx});
  with_type(s, [&](auto type) {
    using T = decltype(type);
    const LayerNormGradient<T> args{values<T>(dy),       values<T>(ds),       values<T>(s),   values<T>(weight),
                                    values<float>(mean), values<float>(rstd), written<T>(dx), width};
    each_row_summing(s, dparameters, [&](int64_t begin, int64_t end, float* sums) {
      loops<T>().layer_norm_backward(args, begin, end, sums);
    });
  });
}

void column_sums_cpu(const at::Tensor& x, const at::Tensor& sums) {
  const int64_t width = width_of("column_sums", x);
  check("column_sums", width, x.scalar_type(), {sums});
  check("column_sums", x.numel(), x.scalar_type(), {x});
  with_type(x, [&](auto type) {
    using T = decltype(type);
    each_row_summing(x, sums, [&](int64_t begin, int64_t end, float* part) {
      loops<T>().column_sums(values<T>(x), width, begin, end, part);
    });
  });
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  library.impl("bias_gelu_cpu_", ijepa_fast::bias_gelu_cpu);
  library.impl("bias_gelu_bwd_cpu_", ijepa_fast::bias_gelu_backward_cpu);
  library.impl("layer_norm_cpu_", ijepa_fast::layer_norm_cpu);
  library.impl("layer_norm_bwd_cpu_", ijepa_fast::layer_norm_backward_cpu);
  library.impl("column_sums_cpu_", ijepa_fast::column_sums_cpu);
}

// Binding of the AdamW + EMA update to the schemas that kernels/adamw_ema/ops.py defines.
#include "adamw_ema.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace ijepa_fast {
namespace {

constexpr int64_t kChunk = 16384;  // elements of one piece of work: 0.5 MB of traffic

AdamWScalars read_scalars(const at::Tensor& scalars) {
  TORCH_CHECK_VALUE(scalars.scalar_type() == at::kDouble && scalars.numel() == kScalars && scalars.is_contiguous(),
                    "adamw_ema: scalars: expected the float64 tensor that step_scalars returns");
  const double* x = scalars.const_data_ptr<double>();
  const auto at = [x](int i) { return static_cast<float>(x[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
}

void* pointer(at::TensorList list, size_t i) { return list.empty() ? nullptr : list[i].data_ptr(); }

std::vector<AdamWSpan> make_spans(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                                  at::TensorList exp_avg_sqs, at::TensorList emas, at::TensorList param_outs,
                                  at::TensorList ema_outs) {
  std::vector<AdamWSpan> spans;
  spans.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    // The checks of dtypes, shapes and layout are in ops.py; these guard memory when the op is called by its name.
    const int64_t size = params[i].numel();
    for (const auto& list : {params, grads, exp_avgs, exp_avg_sqs, emas, param_outs, ema_outs}) {
      if (list.empty()) continue;
      TORCH_CHECK_VALUE(list.size() == params.size() && list[i].numel() == size && list[i].is_contiguous() &&
                            list[i].device() == params[i].device(),
                        "adamw_ema: tensor ", i, ": expected contiguous tensors of one size on one device");
    }
    for (const auto& list : {params, exp_avgs, exp_avg_sqs, emas}) {
      TORCH_CHECK_VALUE(list.empty() || list[i].scalar_type() == at::kFloat, "adamw_ema: expected float32 state");
    }
    spans.push_back({static_cast<float*>(params[i].data_ptr()), grads[i].data_ptr(),
                     static_cast<float*>(exp_avgs[i].data_ptr()), static_cast<float*>(exp_avg_sqs[i].data_ptr()),
                     static_cast<float*>(pointer(emas, i)), pointer(param_outs, i), pointer(ema_outs, i), size});
  }
  return spans;
}

bool are_bf16(at::TensorList tensors) {
  if (tensors.empty()) return false;
  const auto dtype = tensors[0].scalar_type();
  for (const auto& tensor : tensors) {
    TORCH_CHECK_VALUE((dtype == at::kFloat || dtype == at::kBFloat16) && tensor.scalar_type() == dtype,
                      "adamw_ema: expected gradients and copies of one dtype each, float32 or bfloat16");
  }
  return dtype == at::kBFloat16;
}

void run_cpu(const std::vector<AdamWSpan>& spans, AdamWBf16 bf16, const AdamWScalars& scalars) {
  // Chunk numbers at which each span starts, so that threads share the elements, whatever the tensors' sizes.
  std::vector<int64_t> first(spans.size() + 1, 0);
  for (size_t i = 0; i < spans.size(); ++i) first[i + 1] = first[i] + (spans[i].size + kChunk - 1) / kChunk;
  at::parallel_for(0, first.back(), 8, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      adamw_ema_cpu(spans[i], bf16, (begin - first[i]) * kChunk,
                    std::min(spans[i].size, (stop - first[i]) * kChunk), scalars);
      begin = stop;
    }
  });
}

void multi_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList emas, const at::Tensor& scalars, at::TensorList param_outs, at::TensorList ema_outs) {
  if (params.empty()) return;
  run_cpu(make_spans(params, grads, exp_avgs, exp_avg_sqs, emas, param_outs, ema_outs),
          {are_bf16(grads), are_bf16(param_outs), are_bf16(ema_outs)}, read_scalars(scalars));
}

at::TensorList as_list(const std::optional<at::Tensor>& tensor) {
  return tensor ? at::TensorList(*tensor) : at::TensorList();
}

void flat_cpu(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
              const std::optional<at::Tensor>& ema, const at::Tensor& scalars,
              const std::optional<at::Tensor>& param_out, const std::optional<at::Tensor>& ema_out) {
  multi_cpu(param, grad, exp_avg, exp_avg_sq, as_list(ema), scalars, as_list(param_out), as_list(ema_out));
}

#ifdef IJEPA_FAST_CUDA
void multi_cuda(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                at::TensorList emas, const at::Tensor& scalars, at::TensorList param_outs, at::TensorList ema_outs) {
  if (params.empty()) return;
  const auto device = params[0].device();
  const auto spans = make_spans(params, grads, exp_avgs, exp_avg_sqs, emas, param_outs, ema_outs);
  const c10::DeviceGuard guard(device);
  const bool on_host = scalars.is_cpu();
  const auto stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const int error = adamw_ema_cuda(spans.data(), spans.size(),
                                   {are_bf16(grads), are_bf16(param_outs), are_bf16(ema_outs)},
                                   on_host ? read_scalars(scalars) : AdamWScalars{},
                                   on_host ? nullptr : scalars.const_data_ptr<double>(), stream.native_handle());
  TORCH_CHECK(error == 0, "adamw_ema_multi_: the CUDA launch failed with error ", error);
}
#endif

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  library.impl("adamw_ema_", ijepa_fast::flat_cpu);
  library.impl("adamw_ema_multi_", ijepa_fast::multi_cpu);
}

#ifdef IJEPA_FAST_CUDA
TORCH_LIBRARY_IMPL(ijepa_fast, CUDA, library) { library.impl("adamw_ema_multi_", ijepa_fast::multi_cuda); }
#endif

// Binding of the CPU's attention to the schemas that kernels/varlen_attention/native.py defines.
#include "loops.h"
#include "scratch.h"
#include "storage.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <utility>

namespace ijepa_fast {
namespace {

template <class T>
Packed<T> packed(const at::Tensor& x, const at::Tensor& like, const char* name) {
  // The checks of layout are in ops.py; these guard memory when the op is called by its name.
  TORCH_CHECK_VALUE(x.dim() == 3 && x.scalar_type() == like.scalar_type() && x.size(1) == like.size(1) &&
                        x.size(2) == like.size(2) && (x.size(0) == 0 || (x.stride(2) == 1 && x.stride(1) == x.size(2))),
                    "varlen_attention: ", name, ": expected ", name_of(like.scalar_type()),
                    " (tokens, heads, dim), heads side by side");
  return {const_cast<T*>(values<std::remove_const_t<T>>(x)), x.stride(0)};
}

AttentionShape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cu_seqlens_q,
                        const at::Tensor& cu_seqlens_k, double scale) {
  check_type("varlen_attention", q);
  TORCH_CHECK_VALUE(q.dim() == 3, "varlen_attention: expected q (tokens, heads, dim)");
  for (const auto& [cu_seqlens, rows] : {std::pair(cu_seqlens_q, q.size(0)), std::pair(cu_seqlens_k, k.size(0))}) {
    TORCH_CHECK_VALUE(cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1 && cu_seqlens.is_contiguous() &&
                          cu_seqlens.numel() == cu_seqlens_q.numel() && cu_seqlens.numel() > 0,
                      "varlen_attention: expected int32 cu_seqlens of one length");
    const int32_t* at = cu_seqlens.const_data_ptr<int32_t>();
    const int64_t last = cu_seqlens.numel() - 1;
    TORCH_CHECK_VALUE(at[0] == 0 && at[last] == rows && std::is_sorted(at, at + last + 1),
                      "varlen_attention: expected cu_seqlens in order, from 0 to the number of rows");
  }
  TORCH_CHECK_VALUE(scale > 0, "varlen_attention: expected a positive scale");
  TORCH_CHECK_VALUE(q.scalar_type() == at::kBFloat16 || q.size(2) % kLoopWidth == 0,
                    "varlen_attention: expected a head dim that is a multiple of ", kLoopWidth);
  return {q.size(1), q.size(2), q.size(0), cu_seqlens_q.const_data_ptr<int32_t>(),
          cu_seqlens_k.const_data_ptr<int32_t>(), static_cast<float>(scale)};
}

bool fits(const at::Tensor& statistics, const at::Tensor& q) {
  return statistics.is_contiguous() && statistics.scalar_type() == at::kFloat &&
         statistics.numel() == 2 * q.size(0) * q.size(1);
}

// run(begin, end, scratch) for all pairs of a sequence and a head, on PyTorch's threads.
template <class T, class Run>
void each(const AttentionShape& shape, int64_t sequences, const Run& run) {
  int64_t queries = 0, keys = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    queries = std::max<int64_t>(queries, shape.cu_seqlens_q[s + 1] - shape.cu_seqlens_q[s]);
    keys = std::max<int64_t>(keys, shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s]);
  }
  at::parallel_for(0, sequences * shape.heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory = scratch(loops<T>().attention_scratch(shape.dim, queries, keys));
    run(begin, end, memory.get());
  });
}

void forward_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens_q,
                 const at::Tensor& cu_seqlens_k, double scale, const at::Tensor& out, const at::Tensor& statistics) {
  const AttentionShape shape = shape_of(q, k, cu_seqlens_q, cu_seqlens_k, scale);
  TORCH_CHECK_VALUE(v.size(0) == k.size(0) && out.size(0) == q.size(0) && fits(statistics, q),
                    "varlen_attention: expected v as long as k, out and statistics as long as q");
  with_type(q, [&](auto type) {
    using T = decltype(type);
    const AttentionInput<T> input{packed<const T>(q, q, "q"), packed<const T>(k, q, "k"), packed<const T>(v, q, "v")};
    const auto to = packed<T>(out, q, "out");
    float* rows = statistics.data_ptr<float>();
    each<T>(shape, cu_seqlens_q.numel() - 1, [&](int64_t begin, int64_t end, float* scratch) {
      loops<T>().attention(shape, input, to, rows, begin, end, scratch);
    });
  });
}

void backward_cpu(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& statistics, const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                  double scale, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  const AttentionShape shape = shape_of(q, k, cu_seqlens_q, cu_seqlens_k, scale);
  TORCH_CHECK_VALUE(v.size(0) == k.size(0) && dk.size(0) == k.size(0) && dv.size(0) == k.size(0) &&
                        dout.size(0) == q.size(0) && dq.size(0) == q.size(0) && fits(statistics, q),
                    "varlen_attention: expected gradients as long as what they are of");
  with_type(q, [&](auto type) {
    using T = decltype(type);
    const AttentionInput<T> input{packed<const T>(q, q, "q"), packed<const T>(k, q, "k"), packed<const T>(v, q, "v")};
    const AttentionGradient<T> gradient{packed<T>(dq, q, "dq"), packed<T>(dk, q, "dk"), packed<T>(dv, q, "dv")};
    const auto upstream = packed<const T>(dout, q, "dout");
    const float* rows = statistics.const_data_ptr<float>();
    each<T>(shape, cu_seqlens_q.numel() - 1, [&](int64_t begin, int64_t end, float* scratch) {
      loops<T>().attention_backward(shape, input, upstream, rows, gradient, begin, end, scratch);
    });
  });
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  library.impl("varlen_attention_cpu_", ijepa_fast::forward_cpu);
  library.impl("varlen_attention_bwd_cpu_", ijepa_fast::backward_cpu);
}

// The values of tensors, as the CPU's loops take them.
#pragma once

#include "loops.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace ijepa_fast {

// run(T()) for T the type of x's values; check_type has refused any but these two.
template <class Run>
void with_type(const at::Tensor& x, const Run& run) {
  x.scalar_type() == at::kBFloat16 ? run(Bf16()) : run(float());
}

inline void check_type(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
                    ": expected float32 or bfloat16, got ", x.scalar_type());
}

inline const char* name_of(at::ScalarType type) { return type == at::kBFloat16 ? "bfloat16" : "float32"; }

template <class T>
const T* values(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
const T* values(const std::optional<at::Tensor>& x) {
  return x ? values<T>(*x) : nullptr;
}
template <class T>
T* written(const at::Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace ijepa_fast

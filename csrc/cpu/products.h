// Tensors for code that calls PyTorch's own matrix products: what is made, how it is seen, and the products. These come
// from the C functions that torch's compiler links its programs to, which go round the dispatcher.
#pragma once

#include <initializer_list>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../bind.h"

namespace cllava::cpu {

using Sizes = std::initializer_list<int64_t>;

inline Tensor empty(Sizes sizes, Dtype dtype) {
  int64_t strides[4] = {}, stride = 1;
  for (int64_t i = sizes.size() - 1; i >= 0; --i) strides[i] = stride, stride *= sizes.begin()[i];
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides, static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
inline Maybe dense(const Maybe& tensor) { return tensor ? Maybe(dense(*tensor)) : tensor; }
inline Tensor copied(const Tensor& tensor) { return tensor.is_contiguous() ? torch::stable::clone(tensor) : dense(tensor); }

// The same numbers, `offset` of them behind where `of` begins.
inline Tensor seen(const Tensor& of, Sizes sizes, Sizes strides, int64_t offset = 0) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(of.get(), sizes.size(), sizes.begin(), strides.begin(), offset, &made));
  return Tensor(made);
}

inline Tensor flat(const Tensor& x) {  // [a, b, d] -> [a * b, d]
  const int64_t d = x.size(2);
  return seen(x, {x.size(0) * x.size(1), d}, {d, 1});
}

inline Tensor part(const Tensor& x, int64_t first, int64_t count) {  // [B, S, d] -> [count, S, d]
  if (count == x.size(0)) return x;
  return seen(x, {count, x.size(1), x.size(2)}, {x.stride(0), x.stride(1), x.stride(2)}, first * x.stride(0));
}

inline Tensor transposed(const Tensor& x) {  // the last two dimensions
  if (x.dim() == 2) return seen(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)});
  return seen(x, {x.size(0), x.size(2), x.size(1)}, {x.stride(0), x.stride(2), x.stride(1)});
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {  // as F.linear, to the last bit
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return dense(torch::stable::detail::to<Tensor>(stack[0]));
}

inline void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

inline void bmm(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(out.get(), a.get(), b.get()));
}

inline void add_mm(const Tensor& total, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(total.get(), total.get(), a.get(), b.get(), 1, 1));
}

inline void add_bmm(const Tensor& total, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(total.get(), total.get(), a.get(), b.get(), 1, 1));
}

}  // namespace cllava::cpu

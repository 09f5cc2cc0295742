// Between torch and the kernels: checks tensors and fills the structs of ops.h. The one thin file of each device gives
// its kernels as a class (see cpu/library.cpp).
//
// Outputs of kernels are allocated by the caller. Shapes and dtypes are checked here once more, because a wrong pointer is not an
// exception: it is somebody else's memory.
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ops.h"

namespace cllava {

using Tensor = torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Dtype = torch::headeronly::ScalarType;

constexpr int64_t any = -1;  // size

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string show(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "] with strides [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.stride(i);
  text << "] on device " << tensor.get_device_index();
  return text.str();
}

// `adjacent` is how many of the last dimensions lie without gaps: all of them by default.
inline void expect(
    const char* name, const Tensor& tensor, Dtype dtype, std::initializer_list<int64_t> sizes, const Tensor& with,
    int64_t adjacent = 8) {
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(sizes.size()) &&
              tensor.get_device_index() == with.get_device_index() && tensor.is_cuda() == with.is_cuda();
  if (fits) {
    int64_t axis = 0;
    for (const int64_t size : sizes) fits &= size == any || tensor.size(axis) == size, ++axis;
    int64_t stride = 1;
    if (tensor.numel() == 0) adjacent = 0;
    for (int64_t i = tensor.dim() - 1; i >= 0 && tensor.dim() - i <= adjacent; --i) {
      fits &= tensor.size(i) == 1 || tensor.stride(i) == stride;
      stride *= tensor.size(i);
    }
  }
  if (fits) return;
  std::ostringstream wanted;
  wanted << torch::headeronly::toString(dtype) << " [";
  const char* comma = "";
  for (const int64_t size : sizes) {
    wanted << comma;
    if (size == any)
      wanted << "any";
    else
      wanted << size;
    comma = ", ";
  }
  refuse(name, ": expected ", wanted.str(), "] without gaps on device ", with.get_device_index(), ", got ", show(tensor));
}

// On the CPU, where reading costs nothing: every entry of an integer tensor is in [0, limit). On a GPU the caller
// answers for it, as for every gather of torch.
inline void expect_within(const char* name, const Tensor& tensor, int64_t limit, const char* limit_name) {
  if (tensor.is_cuda()) return;
  const int64_t* entries = static_cast<const int64_t*>(tensor.data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i)
    if (entries[i] < 0 || entries[i] >= limit)
      refuse(name, ": expected entries in [0, ", limit_name, ") = [0, ", limit, "), got ", entries[i]);
}

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case Dtype::Float: return Type::float32;
    case Dtype::Half: return Type::float16;
    case Dtype::BFloat16: return Type::bfloat16;
    default: refuse(name, ": expected Float, Half or BFloat16, got ", show(tensor));
  }
}

template <typename T>
const T* in(const Tensor& tensor) { return static_cast<const T*>(tensor.data_ptr()); }
template <typename T>
T* out(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }
template <typename T>
T* out(const Maybe& tensor) { return tensor ? out<T>(*tensor) : nullptr; }

// Lives as long as the call; on a GPU the allocator keeps its memory until the stream is done with it.
struct Workspace {
  Workspace(const Tensor& like, int64_t bytes)
      : tensor(bytes ? Maybe(torch::stable::new_empty(like, {bytes}, Dtype::Byte)) : std::nullopt) {}
  void* pointer() const { return out<void>(tensor); }
  Maybe tensor;
};

// Kernels: static functions named like the ops, `select(const Select&, const Tensor& on)`, where `on` tells the
// device, and `workspace(const Select&)`, the bytes it needs.
template <typename Kernels>
struct Bound {
  // All of Select but its outputs.
  static Select selection(
      const Tensor& query, const Tensor& keys, const Maybe& allowed, int64_t groups, bool by_batch, int64_t M) {
    const int64_t B = query.size(0), D = query.size(1), N = keys.size(0);
    expect("query", query, Dtype::Float, {B, D}, query);
    expect("keys", keys, keys.scalar_type(), {N, D}, query, 1);
    if (allowed) expect("allowed", *allowed, Dtype::Byte, {by_batch ? 1 : B, N}, query, 0);
    if (groups < 1 || D % groups || M < 0 || M > N)
      refuse("select: groups = ", groups, ", D = ", D, ", M = ", M, ", N = ", N);
    Select call{};
    call.query = in<float>(query);
    call.keys = keys.data_ptr();
    call.type = type_of("keys", keys);
    call.B = B, call.N = N, call.D = D, call.M = M, call.groups = groups;
    call.key_stride = keys.stride(0);
    call.by_batch = by_batch;
    if (allowed) {
      call.allowed = in<uint8_t>(*allowed);
      call.allowed_stride_b = allowed->stride(0);
      call.allowed_stride_n = allowed->stride(1);
    }
    return call;
  }

  static void run(Select& call, const Tensor& on) {
    if (call.B == 0 || call.M == 0) return;
    const Workspace workspace(on, Kernels::workspace(call));
    call.workspace = workspace.pointer();
    Kernels::select(call, on);
  }

  static void select(
      const Tensor& query, const Tensor& keys, const Maybe& allowed, int64_t groups, bool by_batch,
      const Tensor& similarity, const Tensor& weight, const Tensor& index) {
    Select call = selection(query, keys, allowed, groups, by_batch, index.size(1));
    expect("similarity", similarity, Dtype::Float, {call.B, call.M}, query);
    expect("weight", weight, Dtype::Float, {call.B, call.M}, query);
    expect("index", index, Dtype::Long, {call.B, call.M}, query);
    call.similarity = out<float>(similarity);
    call.weight = out<float>(weight);
    call.index = out<int64_t>(index);
    run(call, query);
  }

  static void select_aggregate(
      const Tensor& query, const Tensor& keys, const Maybe& allowed, int64_t groups, bool by_batch,
      const Tensor& row_task, const Tensor& row_mean, const Tensor& context, const Tensor& coefficient,
      const Tensor& rows) {
    Select call = selection(query, keys, allowed, groups, by_batch, coefficient.size(1) - keys.size(0));
    if (call.M == 0) refuse("select_aggregate: coefficient has no column for a selected row: got ", show(coefficient));
    read_tasks(call, row_task, row_mean, context, query);
    write_pairs(call, coefficient, rows, query);
    run(call, query);
  }

  static void select_backward(
      const Tensor& grad, const Tensor& query, const Tensor& keys, const Tensor& index, int64_t groups, bool by_batch,
      const Tensor& result) {
    const int64_t B = query.size(0), D = query.size(1), N = keys.size(0), M = index.size(1);
    expect("query", query, Dtype::Float, {B, D}, query);
    expect("grad", grad, Dtype::Float, {B, M}, query);
    expect("keys", keys, keys.scalar_type(), {N, D}, query, 1);
    expect("index", index, Dtype::Long, {B, M}, query);
    expect_within("index", index, N, "N");
    expect("out", result, keys.scalar_type(), {N, D}, query);
    if (groups < 1 || D % groups) refuse("select_backward: groups = ", groups, ", D = ", D);
    if (B == 0 || M == 0 || N == 0) refuse("select_backward: an empty call has a gradient of zeros");
    SelectBackward call{};
    call.grad = in<float>(grad);
    call.query = in<float>(query);
    call.keys = keys.data_ptr();
    call.index = in<int64_t>(index);
    call.out = result.data_ptr();
    call.type = type_of("keys", keys);
    call.B = B, call.N = N, call.D = D, call.M = M, call.groups = groups;
    call.key_stride = keys.stride(0);
    call.by_batch = by_batch;
    Kernels::select_backward(call, query);
  }

  template <typename Call>
  static void read_tasks(
      Call& call, const Tensor& row_task, const Tensor& row_mean, const Tensor& context, const Tensor& on) {
    call.T = context.size(0);
    expect("row_task", row_task, Dtype::Long, {call.N}, on);
    expect_within("row_task", row_task, call.T, "T");
    expect("row_mean", row_mean, Dtype::Float, {call.N}, on);
    expect("context", context, Dtype::Float, {call.T, call.T}, on);
    call.row_task = in<int64_t>(row_task);
    call.row_mean = in<float>(row_mean);
    call.context = in<float>(context);
  }

  template <typename Call>
  static void write_pairs(Call& call, const Tensor& coefficient, const Tensor& rows, const Tensor& on) {
    expect("coefficient", coefficient, Dtype::Float, {call.B, call.M + call.N}, on);
    expect("rows", rows, Dtype::Long, {call.B, call.M + call.N}, on);
    call.coefficient = out<float>(coefficient);
    call.rows = out<int64_t>(rows);
  }

  template <typename Call>
  static Call pairs_of_tasks(
      const Tensor& index, const Tensor& weight, const Tensor& row_task, const Tensor& row_mean,
      const Tensor& context) {
    Call call{};
    call.B = index.size(0), call.M = index.size(1), call.N = row_task.size(0);
    expect("index", index, Dtype::Long, {call.B, call.M}, index);
    expect_within("index", index, call.N, "N");
    expect("weight", weight, Dtype::Float, {call.B, call.M}, index);
    read_tasks(call, row_task, row_mean, context, index);
    call.index = in<int64_t>(index);
    call.weight = in<float>(weight);
    return call;
  }

  static void aggregate(
      const Tensor& index, const Tensor& weight, const Tensor& row_task, const Tensor& row_mean, const Tensor& context,
      const Tensor& coefficient, const Tensor& rows) {
    auto call = pairs_of_tasks<Aggregate>(index, weight, row_task, row_mean, context);
    write_pairs(call, coefficient, rows, index);
    if (call.B == 0 || call.M + call.N == 0) return;
    Kernels::aggregate(call, index);
  }

  static void aggregate_backward(
      const Tensor& grad, const Tensor& index, const Tensor& weight, const Tensor& row_task, const Tensor& row_mean,
      const Tensor& context, const Maybe& grad_weight, const Maybe& grad_context) {
    auto call = pairs_of_tasks<AggregateBackward>(index, weight, row_task, row_mean, context);
    expect("grad", grad, Dtype::Float, {call.B, call.M + call.N}, index);
    if (grad_weight) expect("grad_weight", *grad_weight, Dtype::Float, {call.B, call.M}, index);
    if (grad_context) expect("grad_context", *grad_context, Dtype::Float, {call.T, call.T}, index);
    if (call.B == 0 || call.M == 0 || call.N == 0) refuse("aggregate_backward: an empty call has a gradient of zeros");
    call.grad = in<float>(grad);
    call.grad_weight = out<float>(grad_weight);
    call.grad_context = out<float>(grad_context);
    const Workspace workspace(index, Kernels::workspace(call));
    call.workspace = workspace.pointer();
    Kernels::aggregate_backward(call, index);
  }

  template <typename Call>
  static Call mixed(const Tensor& A, const Tensor& B, const Tensor& coefficient, const Tensor& index) {
    Call call{};
    call.samples = index.size(0), call.P = index.size(1), call.N = A.size(0);
    call.size_A = A.size(1) * A.size(2), call.size_B = B.size(1) * B.size(2);
    expect("A", A, A.scalar_type(), {call.N, A.size(1), A.size(2)}, index, 2);
    expect("B", B, A.scalar_type(), {call.N, A.size(1), any}, index, 2);
    expect("coefficient", coefficient, Dtype::Float, {call.samples, call.P}, index);
    expect("index", index, Dtype::Long, {call.samples, call.P}, index);
    expect_within("index", index, call.N, "N");
    call.A = A.data_ptr();
    call.B = B.data_ptr();
    call.type = type_of("A", A);
    call.stride_A = A.stride(0), call.stride_B = B.stride(0);
    call.coefficient = in<float>(coefficient);
    call.index = in<int64_t>(index);
    if (call.samples * call.P * call.size_A * call.size_B == 0) refuse("mix_factors: an empty call has zeros for sums");
    return call;
  }

  static void mix_factors(
      const Tensor& A, const Tensor& B, const Tensor& coefficient, const Tensor& index, const Tensor& A_mix,
      const Tensor& B_mix) {
    auto call = mixed<MixFactors>(A, B, coefficient, index);
    expect("A_mix", A_mix, A.scalar_type(), {call.samples, A.size(1), A.size(2)}, index);
    expect("B_mix", B_mix, A.scalar_type(), {call.samples, B.size(1), B.size(2)}, index);
    call.A_mix = A_mix.data_ptr();
    call.B_mix = B_mix.data_ptr();
    Kernels::mix_factors(call, index);
  }

  static void mix_factors_backward(
      const Tensor& grad_A, const Tensor& grad_B, const Tensor& A, const Tensor& B, const Tensor& coefficient,
      const Tensor& index, const Maybe& to_A, const Maybe& to_B, const Maybe& to_coefficient) {
    auto call = mixed<MixFactorsBackward>(A, B, coefficient, index);
    expect("grad_A", grad_A, A.scalar_type(), {call.samples, A.size(1), A.size(2)}, index);
    expect("grad_B", grad_B, A.scalar_type(), {call.samples, B.size(1), B.size(2)}, index);
    if (to_A) expect("to_A", *to_A, A.scalar_type(), {call.N, A.size(1), A.size(2)}, index);
    if (to_B) expect("to_B", *to_B, A.scalar_type(), {call.N, B.size(1), B.size(2)}, index);
    if (to_coefficient) expect("to_coefficient", *to_coefficient, Dtype::Float, {call.samples, call.P}, index);
    call.grad_A = grad_A.data_ptr();
    call.grad_B = grad_B.data_ptr();
    call.to_A = out<void>(to_A);
    call.to_B = out<void>(to_B);
    call.to_coefficient = out<float>(to_coefficient);
    const Workspace workspace(index, Kernels::workspace(call));
    call.workspace = workspace.pointer();
    Kernels::mix_factors_backward(call, index);
  }

  // The factors of inject_add, whose last dimension alone need lie without gaps.
  template <typename Call>
  static void factors(Call& call, const Tensor& A, const Tensor& B, const Tensor& on) {
    call.N = A.size(0), call.R = A.size(1), call.d_in = A.size(2), call.d_out = B.size(2);
    expect("A", A, A.scalar_type(), {call.N, call.R, call.d_in}, on, 1);
    expect("B", B, A.scalar_type(), {call.N, call.R, call.d_out}, on, 1);
    call.A = A.data_ptr();
    call.B = B.data_ptr();
    call.factor_type = type_of("A", A);
    call.A_stride_n = A.stride(0), call.A_stride_r = A.stride(1);
    call.B_stride_n = B.stride(0), call.B_stride_r = B.stride(1);
    if (call.factor_type != call.type && call.factor_type != Type::float32)
      refuse("A: expected Float or the dtype of the activations, got ", show(A));
  }

  static void inject_add(
      const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& index, const Tensor& coefficient, double scale,
      const Tensor& y, const Maybe& arrived) {
    InjectAdd call{};
    call.type = type_of("x", x);
    factors(call, A, B, x);
    call.samples = x.size(0), call.S = x.size(1), call.P = index.size(1);
    expect("x", x, x.scalar_type(), {call.samples, call.S, call.d_in}, x, 1);
    expect("index", index, Dtype::Long, {call.samples, call.P}, x);
    expect_within("index", index, call.N, "N");
    expect("coefficient", coefficient, Dtype::Float, {call.samples, call.P}, x);
    expect("y", y, x.scalar_type(), {call.samples, call.S, call.d_out}, x);
    if (call.samples * call.S * call.P * call.R * call.d_in * call.d_out == 0) return;
    call.x = x.data_ptr();
    call.x_stride_b = x.stride(0), call.x_stride_s = x.stride(1);
    call.index = in<int64_t>(index);
    call.coefficient = in<float>(coefficient);
    call.scale = static_cast<float>(scale);
    call.y = y.data_ptr();
    if (arrived) {
      expect("arrived", *arrived, Dtype::Int, {call.samples}, x);
      call.arrived = out<int32_t>(arrived);
    }
    const Workspace workspace(x, Kernels::workspace(call));
    call.workspace = workspace.pointer();
    Kernels::inject_add(call, x);
  }

  template <typename Library>
  static void implement(Library& library) {  // on every device
    library.impl("select", TORCH_BOX(&Bound::select));
    library.impl("select_backward", TORCH_BOX(&Bound::select_backward));
    library.impl("aggregate", TORCH_BOX(&Bound::aggregate));
    library.impl("aggregate_backward", TORCH_BOX(&Bound::aggregate_backward));
    library.impl("mix_factors", TORCH_BOX(&Bound::mix_factors));
    library.impl("mix_factors_backward", TORCH_BOX(&Bound::mix_factors_backward));
    library.impl("inject_add", TORCH_BOX(&Bound::inject_add));
  }

  template <typename Library>
  static void implement_on_gpu(Library& library) {  // what the CPU does otherwise
    library.impl("select_aggregate", TORCH_BOX(&Bound::select_aggregate));
  }
};

}  // namespace cllava

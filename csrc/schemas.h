// One line of schema for each native op. Most write their outputs in place, so these ops are for this library's own use:
// autograd and compilers see the functional ops that cllava_fast.ops defines on top of them. inject and inject_backward
// are the CPU's alone.
#pragma once

#include <torch/csrc/stable/library.h>

// Each library says of which schemas it is: arguments go by position, and those of others would be misread.
#define CLLAVA_SAYS_ITS_SCHEMAS \
  extern "C" __attribute__((visibility("default"))) unsigned cllava_schemas() { return CLLAVA_SCHEMAS; }

namespace cllava {

inline void define(torch::stable::detail::StableLibrary& library) {
  library.def(
      "select(Tensor query, Tensor keys, Tensor? allowed, int groups, bool by_batch, Tensor(a!) similarity, "
      "Tensor(b!) weight, Tensor(c!) index) -> ()");
  library.def(
      "select_backward(Tensor grad, Tensor query, Tensor keys, Tensor index, int groups, bool by_batch, "
      "Tensor(a!) out) -> ()");
  library.def(
      "aggregate(Tensor index, Tensor weight, Tensor row_task, Tensor row_mean, Tensor context, Tensor(a!) "
      "coefficient, Tensor(b!) rows) -> ()");
  library.def(
      "select_aggregate(Tensor query, Tensor keys, Tensor? allowed, int groups, bool by_batch, Tensor row_task, "
      "Tensor row_mean, Tensor context, Tensor(a!) coefficient, Tensor(b!) rows) -> ()");
  library.def(
      "aggregate_backward(Tensor grad, Tensor index, Tensor weight, Tensor row_task, Tensor row_mean, Tensor "
      "context, Tensor(a!)? grad_weight, Tensor(b!)? grad_context) -> ()");
  library.def(
      "mix_factors(Tensor A, Tensor B, Tensor coefficient, Tensor index, Tensor(a!) A_mix, Tensor(b!) B_mix) -> "
      "()");
  library.def(
      "mix_factors_backward(Tensor grad_A, Tensor grad_B, Tensor A, Tensor B, Tensor coefficient, Tensor index, "
      "Tensor(a!)? to_A, Tensor(b!)? to_B, Tensor(c!)? to_coefficient) -> ()");
  library.def(
      "inject_add(Tensor x, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale, Tensor(a!) y, "
      "Tensor(b!)? arrived=None) -> ()");
  library.def(
      "inject(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor B, Tensor index, Tensor "
      "coefficient, Tensor? past_A, Tensor? past_B, Tensor? past_coefficient, float scale, bool whole, int "
      "gathered, bool save) -> (Tensor y, Tensor low, Tensor past_low)");
  library.def(
      "inject_backward(Tensor grad, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor index, Tensor "
      "coefficient, Tensor? past_A, Tensor? past_B, Tensor? past_coefficient, float scale, bool whole, int gathered, "
      "Tensor low, Tensor past_low, bool need_x, bool need_A, bool need_B, bool need_coefficient, bool need_past) -> "
      "(Tensor x, Tensor A, Tensor B, Tensor coefficient, Tensor past_coefficient)");
}

}  // namespace cllava

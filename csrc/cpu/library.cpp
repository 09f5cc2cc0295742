// The one file of the CPU library that knows torch: schemas of all native ops, and the CPU's implementations.
#include "../bind.h"
#include "kernels.h"

namespace {

struct Cpu {
  template <typename Call>
  static int64_t workspace(const Call&) { return 0; }
  static void select(const cllava::Select& call, const cllava::Tensor&) { cllava::cpu::select(call); }
  static void select_backward(const cllava::SelectBackward& call, const cllava::Tensor&) { cllava::cpu::select_backward(call); }
  static void aggregate(const cllava::Aggregate& call, const cllava::Tensor&) { cllava::cpu::aggregate(call); }
  static void aggregate_backward(const cllava::AggregateBackward& call, const cllava::Tensor&) { cllava::cpu::aggregate_backward(call); }
  static void mix_factors(const cllava::MixFactors& call, const cllava::Tensor&) { cllava::cpu::mix_factors(call); }
  static void mix_factors_backward(const cllava::MixFactorsBackward& call, const cllava::Tensor&) { cllava::cpu::mix_factors_backward(call); }
  static void inject_add(const cllava::InjectAdd& call, const cllava::Tensor&) { cllava::cpu::inject_add(call); }
  static void merge(const cllava::Merge& call, const cllava::Tensor&) { cllava::cpu::merge(call); }
};

}  // namespace

// Outputs are written in place, so these ops are for this library's own use: autograd and compilers see the functional
// ops that cllava_fast.ops defines on top of them.
STABLE_TORCH_LIBRARY(cllava_fast_native, library) {
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
      "aggregate_backward(Tensor grad, Tensor index, Tensor weight, Tensor row_task, Tensor row_mean, Tensor "
      "context, Tensor(a!)? grad_weight, Tensor(b!)? grad_context) -> ()");
  library.def(
      "mix_factors(Tensor A, Tensor B, Tensor coefficient, Tensor index, Tensor(a!) A_mix, Tensor(b!) B_mix) -> "
      "()");
  library.def(
      "mix_factors_backward(Tensor grad_A, Tensor grad_B, Tensor A, Tensor B, Tensor coefficient, Tensor index, "
      "Tensor(a!)? to_A, Tensor(b!)? to_B, Tensor(c!)? to_coefficient) -> ()");
  library.def(
      "inject_add(Tensor x, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale, Tensor(a!) y) -> "
      "()");
  library.def(
      "merge(Tensor weight, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale, Tensor(a!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cllava_fast_native, CPU, library) { cllava::Bound<Cpu>::implement(library); }

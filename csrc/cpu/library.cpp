// Defines all native ops, and implements them for the CPU. Beside it inject_many.cpp alone knows torch, whose products it
// calls.
#include "../bind.h"
#include "../schemas.h"
#include "inject_many.h"
#include "kernels.h"

namespace {

struct Cpu {
  template <typename Call>
  static int64_t workspace(const Call&) { return 0; }
  template <typename Call>
  static const Call& of_float_keys(const Call& call) {
    if (call.type != cllava::Type::float32)
      cllava::refuse("keys: expected Float on the CPU, got ", call.type == cllava::Type::float16 ? "Half" : "BFloat16");
    return call;
  }
  static void select(const cllava::Select& call, const cllava::Tensor&) { cllava::cpu::select(of_float_keys(call)); }
  static void select_backward(const cllava::SelectBackward& call, const cllava::Tensor&) { cllava::cpu::select_backward(of_float_keys(call)); }
  static void aggregate(const cllava::Aggregate& call, const cllava::Tensor&) { cllava::cpu::aggregate(call); }
  static void aggregate_backward(const cllava::AggregateBackward& call, const cllava::Tensor&) { cllava::cpu::aggregate_backward(call); }
  static void mix_factors(const cllava::MixFactors& call, const cllava::Tensor&) { cllava::cpu::mix_factors(call); }
  static void mix_factors_backward(const cllava::MixFactorsBackward& call, const cllava::Tensor&) { cllava::cpu::mix_factors_backward(call); }
  static void inject_add(const cllava::InjectAdd& call, const cllava::Tensor&) { cllava::cpu::inject_add(call); }
};

}  // namespace

CLLAVA_SAYS_ITS_SCHEMAS

STABLE_TORCH_LIBRARY(cllava_fast_native, library) { cllava::define(library); }

STABLE_TORCH_LIBRARY_IMPL(cllava_fast_native, CPU, library) {
  cllava::Bound<Cpu>::implement(library);
  library.impl("inject", TORCH_BOX(&cllava::cpu::inject));
  library.impl("inject_backward", TORCH_BOX(&cllava::cpu::inject_backward));
}

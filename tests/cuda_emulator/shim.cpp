// The launchers of csrc/cuda as C functions, for ctypes: each is named as its struct, takes it, and returns an error's text or null.
#include <exception>
#include <string>

#include "../../csrc/cuda/ops.cuh"

namespace {

template <typename Op>
const char* run(void (*launch)(const Op&, cudaStream_t), const Op& op) {
  static std::string error;
  try {
    launch(op, nullptr);
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

}  // namespace

#define EXPORT(Op, launch) \
  extern "C" const char* Op(const cllava::Op& op) { return run(cllava::cuda::launch, op); }
#define EXPORT_WORKSPACE(Op, workspace) \
  extern "C" int64_t Op##_workspace(const cllava::Op& op) { return cllava::cuda::workspace(op); }

EXPORT(Select, select)
EXPORT_WORKSPACE(Select, select_workspace)
EXPORT(SelectBackward, select_backward)
EXPORT(Aggregate, aggregate)
EXPORT(AggregateBackward, aggregate_backward)
EXPORT_WORKSPACE(AggregateBackward, aggregate_backward_workspace)
EXPORT(MixFactors, mix_factors)
EXPORT(MixFactorsBackward, mix_factors_backward)
EXPORT_WORKSPACE(MixFactorsBackward, mix_factors_backward_workspace)
EXPORT(InjectAdd, inject_add)
EXPORT_WORKSPACE(InjectAdd, inject_add_workspace)

extern "C" void emulator_seed(unsigned seed) { emulator::machine.random.seed(seed); }

// The CPU's kernels. Each computes what its struct in ops.h says; keys are float32 here. merge has no kernel: the library's
// matrix product is faster.
#pragma once

#include "../ops.h"

namespace cllava::cpu {

void select(const Select&);
void select_backward(const SelectBackward&);
void aggregate(const Aggregate&);
void aggregate_backward(const AggregateBackward&);
void mix_factors(const MixFactors&);
void mix_factors_backward(const MixFactorsBackward&);
void inject_add(const InjectAdd&);

}  // namespace cllava::cpu

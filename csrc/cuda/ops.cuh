// The native CUDA kernels: one launcher for each op, and the workspace in bytes of those that need one.
//
// Nothing waits, allocates or reads device memory on the host, so a graph can capture every launch. std::runtime_error
// names the kernel whose launch failed. Whoever calls checks shapes and the limits below.
#pragma once

#include <cuda_runtime.h>

#include "../ops.h"

namespace cllava::cuda {

constexpr int64_t SELECT_MOST_M = 64;                      // what a running top-M holds
constexpr int64_t SELECT_MOST_GROUPS = 64;                 // norms that a block keeps; select_backward likewise
constexpr int64_t SELECT_MOST_N = (int64_t(1) << 32) - 1;  // rows that a row number tells apart
constexpr int64_t SELECT_BACKWARD_MOST_D = 8192;           // the widest row that a block keeps
constexpr int64_t INJECT_ADD_MOST_S = 16;                  // tokens of a sample

// Why no kernel can run on the current device, or null: no code for such a chip, a driver older than the toolkit.
const char* cannot_run();

int64_t select_workspace(const Select&);
void select(const Select&, cudaStream_t);

void select_backward(const SelectBackward&, cudaStream_t);

void aggregate(const Aggregate&, cudaStream_t);

int64_t aggregate_backward_workspace(const AggregateBackward&);
void aggregate_backward(const AggregateBackward&, cudaStream_t);

void mix_factors(const MixFactors&, cudaStream_t);

int64_t mix_factors_backward_workspace(const MixFactorsBackward&);
void mix_factors_backward(const MixFactorsBackward&, cudaStream_t);

int64_t inject_add_workspace(const InjectAdd&);
void inject_add(const InjectAdd&, cudaStream_t);

}  // namespace cllava::cuda

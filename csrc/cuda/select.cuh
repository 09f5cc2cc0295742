// What select's forward and backward share.
#pragma once

#include "threads.cuh"

namespace cllava::cuda {

constexpr float SELECT_SUM_FLOOR = 1e-6f;  // below this the weights are uniform

// x / norm, and 0 where the norm is 0.
__device__ __forceinline__ float over_norm(float x, float norm) { return norm == 0.0f ? 0.0f : __fdiv_rn(x, norm); }

// Of one chunk of a query, by a warp, in all lanes.
__device__ __forceinline__ float chunk_norm(const float* chunk, int64_t columns, int lane) {
  float square = 0.0f;
  for (int64_t column = lane; column < columns; column += WARP) {
    square = __fmaf_rn(chunk[column], chunk[column], square);
  }
  return __fsqrt_rn(warp_sum(square));
}

}  // namespace cllava::cuda

// What select's forward and backward share.
#pragma once

#include "numbers.cuh"
#include "threads.cuh"

namespace cllava::cuda {

constexpr float SELECT_SUM_FLOOR = 1e-6f;  // below this the weights are uniform

// x / norm, and 0 where the norm is 0.
__device__ __forceinline__ float over_norm(float x, float norm) { return norm == 0.0f ? 0.0f : __fdiv_rn(x, norm); }

constexpr int SELECT_COLUMNS = 4;  // adjacent ones that a lane takes at a time, of queries and keys

// Of one chunk of a query, by a warp, in all lanes; `vector`: its address and length allow loads of SELECT_COLUMNS.
__device__ __forceinline__ float chunk_norm(const float* chunk, int64_t columns, bool vector, int lane) {
  float square = 0.0f;
#pragma unroll 4
  for (int64_t column = lane * SELECT_COLUMNS; column < columns; column += WARP * SELECT_COLUMNS) {
    float part[SELECT_COLUMNS];
    load(vector, chunk + column, columns - column, part);
#pragma unroll
    for (int i = 0; i < SELECT_COLUMNS; i++) square = __fmaf_rn(part[i], part[i], square);
  }
  return __fsqrt_rn(warp_sum(square));
}

}  // namespace cllava::cuda

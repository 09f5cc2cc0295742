// The contextual coefficient of one row, as aggregate and the tail of select add it up: to the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cllava::cuda {

// What a sample's selected rows, one after the other, add to a row of `task`. What the formula does not read is not
// loaded.
struct Past {
  float total = 0.0f;
  bool read = false;

  __device__ __forceinline__ void add(float weight, int64_t from_task, int64_t task, const float* context, int64_t T) {
    if (task < from_task) {
      total = __fmaf_rn(weight, context[from_task * T + task], total);
      read = true;
    }
  }

  __device__ __forceinline__ float coefficient(const float* row_mean) const { return read ? total * *row_mean : 0.0f; }
};

}  // namespace cllava::cuda

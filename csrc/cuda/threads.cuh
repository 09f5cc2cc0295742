// What the threads of a warp or a block do together, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cllava::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

// Of all lanes, in all lanes: bit-equal there, as a + b equals b + a.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(ALL, value, distance));
  }
  return value;
}

// How many of COUNT values summed at once each lane is left with.
template <int COUNT>
constexpr int left_of = COUNT > WARP ? COUNT / WARP : 1;

// How many lanes are left with the same ones.
template <int COUNT>
constexpr int lanes_alike = COUNT < WARP ? WARP / COUNT : 1;

// warp_sum of COUNT values (a power of two), to the bit, with one exchange a value instead of five: lanes halve what
// they hold at each step. Leaves in value[i], i < left_of<COUNT>, the sum number first_of<COUNT>(lane) + i.
template <int COUNT>
__device__ __forceinline__ void warp_sums(float (&value)[COUNT], int lane) {
  int held = COUNT;
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    if (held > 1) {
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < COUNT / 2; i++) {
        if (i < held / 2) {
          const float kept = upper ? value[i + held / 2] : value[i];
          const float given = upper ? value[i] : value[i + held / 2];
          value[i] = __fadd_rn(kept, __shfl_xor_sync(ALL, given, distance));
        }
      }
      held /= 2;
    } else {
      value[0] = __fadd_rn(value[0], __shfl_xor_sync(ALL, value[0], distance));
    }
  }
}

template <int COUNT>
__device__ __forceinline__ int first_of(int lane) {
  return lane / lanes_alike<COUNT> * left_of<COUNT>;
}

// Of all threads of a block of WARPS warps, in all threads. `scratch` is shared, and free again after a barrier.
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float (&scratch)[WARPS]) {
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) total += scratch[warp];
  return total;
}

// The place of each thread with `keep` among those, in order, and their count. `scratch` as above. It has a barrier:
// what all threads read before it, they may overwrite after it.
template <int WARPS>
__device__ __forceinline__ int block_place(bool keep, int& count, int (&scratch)[WARPS]) {
  const unsigned kept = __ballot_sync(ALL, keep);
  const int warp = threadIdx.x / WARP;
  if (threadIdx.x % WARP == 0) scratch[warp] = __popc(kept);
  __syncthreads();
  int place = __popc(kept & ((1u << (threadIdx.x % WARP)) - 1));
  count = 0;
#pragma unroll
  for (int other = 0; other < WARPS; other++) {
    if (other < warp) place += scratch[other];
    count += scratch[other];
  }
  return place;
}

}  // namespace cllava::cuda

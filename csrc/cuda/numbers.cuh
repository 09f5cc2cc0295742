// Reading and writing several adjacent numbers of any type as float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cllava::cuda {

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(__half value) { return __half2float(value); }
__device__ __forceinline__ float number(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void put(float* to, float value) { *to = value; }
__device__ __forceinline__ void put(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void put(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// One 32-bit word of what was loaded.
__device__ __forceinline__ void unpack(unsigned word, const float*, float* to) { to[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack(unsigned word, const __half*, float* to) {
  to[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffff)));
  to[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ __forceinline__ void unpack(unsigned word, const __nv_bfloat16*, float* to) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}

struct Cached {
  template <typename T>
  static __device__ __forceinline__ T read(const T* from) {
    return *from;
  }
};

struct PastL1 {  // for what a multiprocessor reads once, so that it keeps what it reads often
  template <typename T>
  static __device__ __forceinline__ T read(const T* from) {
    return __ldcg(from);
  }
};

// COUNT numbers at an address that is a multiple of their size in bytes, or of 16 where that is larger.
template <int COUNT, typename Read = Cached, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[COUNT]) {
  constexpr int BYTES = COUNT * sizeof(T), EACH = 4 / sizeof(T);
  if constexpr (BYTES == 8) {
    const uint2 words = Read::read(reinterpret_cast<const uint2*>(from));
    unpack(words.x, from, to);
    unpack(words.y, from, to + EACH);
  } else {
    static_assert(BYTES % 16 == 0);
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      const uint4 words = Read::read(reinterpret_cast<const uint4*>(from) + i);
      unpack(words.x, from, to + 4 * i * EACH);
      unpack(words.y, from, to + (4 * i + 1) * EACH);
      unpack(words.z, from, to + (4 * i + 2) * EACH);
      unpack(words.w, from, to + (4 * i + 3) * EACH);
    }
  }
}

// The same from any address, one by one; 0 beyond the first `left`.
template <int COUNT, typename Read = Cached, typename T>
__device__ __forceinline__ void load_some(const T* from, int64_t left, float (&to)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) to[i] = i < left ? number(Read::read(from + i)) : 0.0f;
}

template <int COUNT, typename T>
__device__ __forceinline__ void load(bool vector, const T* from, int64_t left, float (&to)[COUNT]) {
  if (vector && left >= COUNT) {
    load(from, to);
  } else {
    load_some(from, left, to);
  }
}

__device__ __forceinline__ unsigned pack(const float* from, const float*) { return __float_as_uint(from[0]); }
__device__ __forceinline__ unsigned pack(const float* from, const __half*) {
  return __half_as_ushort(__float2half_rn(from[0])) | unsigned(__half_as_ushort(__float2half_rn(from[1]))) << 16;
}
__device__ __forceinline__ unsigned pack(const float* from, const __nv_bfloat16*) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(from[0])) |
         unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(from[1]))) << 16;
}

// The first `left` of COUNT numbers; `vector` says that the address is aligned as for `load`.
template <int COUNT, typename T>
__device__ __forceinline__ void store(bool vector, T* to, int64_t left, const float (&from)[COUNT]) {
  constexpr int BYTES = COUNT * sizeof(T), EACH = 4 / sizeof(T);
  if (!vector || left < COUNT) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (i < left) put(to + i, from[i]);
    }
  } else if constexpr (BYTES == 8) {
    *reinterpret_cast<uint2*>(to) = {pack(from, to), pack(from + EACH, to)};
  } else {
    static_assert(BYTES % 16 == 0);
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      const float* four = from + 4 * i * EACH;
      reinterpret_cast<uint4*>(to)[i] = {pack(four, to), pack(four + EACH, to), pack(four + 2 * EACH, to),
                                         pack(four + 3 * EACH, to)};
    }
  }
}

}  // namespace cllava::cuda

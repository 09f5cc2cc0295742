// Stands in for CUDA's header, as cuda_runtime.h beside it does.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = value.bits >> 15, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? std::ldexp(float(1024 + fraction), int(exponent) - 25)
                              : std::ldexp(float(fraction), -24);
  return sign ? -size : size;
}

// To nearest, ties to even: nearbyint rounds so, in units of the last place of the result.
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  const double size = std::fabs(value);
  if (size >= 65520) return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
  const int last = size < 0x1p-14 ? -24 : exponent - 11;
  const unsigned units = unsigned(std::nearbyint(std::ldexp(size, -last)));
  return {uint16_t(sign | (size < 0x1p-14 ? units : ((last + 24) << 10) + units))};
}

// Arithmetic on adjacent numbers: float32, float16 or bfloat16 in memory, float32 in between.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../ops.h"

// One version of the function for each level of x86-64, chosen when the library is loaded: a build runs anywhere.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define CLLAVA_EVERY_LEVEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLLAVA_EVERY_LEVEL
#endif
#define CLLAVA_INLINE inline __attribute__((always_inline))  // into each of those versions

namespace cllava::cpu {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// Calls body with a null pointer of the C++ type.
template <typename Body>
void with_type(Type type, const Body& body) {
  if (type == Type::float32) return body(static_cast<float*>(nullptr));
  if (type == Type::float16) return body(static_cast<Half*>(nullptr));
  return body(static_cast<BFloat16*>(nullptr));
}

constexpr int64_t lanes = 16;
typedef float Lanes __attribute__((vector_size(lanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(lanes * sizeof(float))));
typedef uint16_t Shorts __attribute__((vector_size(lanes * sizeof(uint16_t))));

CLLAVA_INLINE void load(Lanes& out, const float* from) { std::memcpy(&out, from, sizeof out); }

CLLAVA_INLINE void load(Lanes& out, const BFloat16* from) {
  Shorts raw;
  std::memcpy(&raw, from, sizeof raw);
  const Bits bits = __builtin_convertvector(raw, Bits) << 16;
  std::memcpy(&out, &bits, sizeof out);
}

CLLAVA_INLINE void load(Lanes& out, const Half* from) {
  Shorts raw;
  std::memcpy(&raw, from, sizeof raw);
  const Bits half = __builtin_convertvector(raw, Bits), magnitude = (half & 0x7FFF) << 13;
  std::memcpy(&out, &magnitude, sizeof out);
  out *= 0x1p112f;  // the exponent's new bias, for subnormal numbers too
  Bits bits;
  std::memcpy(&bits, &out, sizeof bits);
  bits |= magnitude >= 0x7C00 << 13 ? Bits{} + 0x7F800000 : Bits{};  // infinity and NaN
  bits |= (half & 0x8000) << 16;
  std::memcpy(&out, &bits, sizeof out);
}

CLLAVA_INLINE void store(const Lanes& value, float* to) { std::memcpy(to, &value, sizeof value); }

CLLAVA_INLINE void store(const Lanes& value, Half* to) {  // to nearest even; NaN stays NaN
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Bits magnitude = bits & 0x7FFFFFFF;
  Lanes small;
  std::memcpy(&small, &magnitude, sizeof small);
  small += 0.5f;  // whose last bit is the smallest number of float16
  Bits subnormal;
  std::memcpy(&subnormal, &small, sizeof subnormal);
  Bits half = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  half = magnitude < 0x38800000 ? subnormal - 0x3F000000 : half;
  half = magnitude >= 0x477FF000 ? Bits{} + 0x7C00 : half;
  half = value == value ? half : Bits{} + 0x7E00;
  const Shorts raw = __builtin_convertvector(half | (bits >> 16 & 0x8000), Shorts);
  std::memcpy(to, &raw, sizeof raw);
}

CLLAVA_INLINE void store(const Lanes& value, BFloat16* to) {  // to nearest even; NaN stays NaN
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Bits chosen = value == value ? rounded : (bits >> 16) | 0x40;
  const Shorts raw = __builtin_convertvector(chosen, Shorts);
  std::memcpy(to, &raw, sizeof raw);
}

// Fewer than `lanes` numbers; the rest of the lanes is 0.
template <typename T>
CLLAVA_INLINE void load(Lanes& out, const T* from, int64_t count) {
  T padded[lanes] = {};
  std::memcpy(static_cast<void*>(padded), from, count * sizeof(T));
  load(out, padded);
}

typedef float Quad __attribute__((vector_size(4 * sizeof(float))));

CLLAVA_INLINE Quad quarters(const Lanes& value) {  // lane l, l + 4, l + 8 and l + 12 in one
  Quad parts[4];
  std::memcpy(parts, &value, sizeof value);
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

CLLAVA_INLINE float sum(const Lanes& value) {
  const Quad each = quarters(value);
  return (each[0] + each[2]) + (each[1] + each[3]);
}

// sum over i of a[i] * b[i]
template <typename A, typename B>
CLLAVA_EVERY_LEVEL float dot(const A* a, const B* b, int64_t size) {
  constexpr int chains = 4;  // so that no addition waits for the one before
  Lanes sums[chains] = {}, left, right;
  int64_t i = 0;
  for (; i + chains * lanes <= size; i += chains * lanes)
    for (int chain = 0; chain < chains; ++chain) {
      load(left, a + i + chain * lanes);
      load(right, b + i + chain * lanes);
      sums[chain] += left * right;
    }
  for (; i < size; i += lanes) {
    load(left, a + i, size - i < lanes ? size - i : lanes);
    load(right, b + i, size - i < lanes ? size - i : lanes);
    sums[0] += left * right;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// total[i] += strength * row[i]
template <typename T>
CLLAVA_EVERY_LEVEL void add(float* total, const T* row, float strength, int64_t size) {
  int64_t i = 0;
  Lanes value, sums;
  for (; i + lanes <= size; i += lanes) {
    load(value, row + i);
    load(sums, total + i);
    sums += strength * value;
    store(sums, total + i);
  }
  for (; i < size; ++i) total[i] += strength * static_cast<float>(row[i]);
}

// Converts `size` numbers; one of the types is float.
template <typename From, typename To>
CLLAVA_EVERY_LEVEL void convert(const From* from, To* to, int64_t size) {
  int64_t i = 0;
  Lanes value;
  for (; i + lanes <= size; i += lanes) {
    load(value, from + i);
    store(value, to + i);
  }
  for (; i < size; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
}

}  // namespace cllava::cpu

// Arithmetic on adjacent numbers: float32, float16 or bfloat16 in memory, float32 in between.
//
// Everything is a template over V, the vectors of one level of x86-64, and is inlined into its caller: at_this_level
// and parallel_vectors (parallel.h) run a body that is compiled for the CPU at hand, so that one build runs anywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../ops.h"

#define CLLAVA_INLINE inline __attribute__((always_inline))
#define CLLAVA_INLINED __attribute__((always_inline))  // of a lambda
#define CLLAVA_UNROLL _Pragma("GCC unroll 16")  // an array of vectors stays in registers where each index is a constant

namespace cllava::cpu {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// Calls body with a null pointer of the C++ type.
template <typename Body>
auto with_type(Type type, const Body& body) {
  if (type == Type::float32) return body(static_cast<float*>(nullptr));
  if (type == Type::float16) return body(static_cast<Half*>(nullptr));
  return body(static_cast<BFloat16*>(nullptr));
}

// As wide as the level's registers: wider ones would go through memory.
template <int64_t count>
struct Vectors {
  static constexpr int64_t lanes = count;
  typedef float Lanes __attribute__((vector_size(count * sizeof(float))));
  typedef uint32_t Bits __attribute__((vector_size(count * sizeof(float))));
  typedef uint16_t Shorts __attribute__((vector_size(count * sizeof(uint16_t))));
};

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
template <typename Body>
__attribute__((target("arch=x86-64-v4"))) auto at_v4(const Body& body) { return body(Vectors<16>{}); }

template <typename Body>
__attribute__((target("arch=x86-64-v3"))) auto at_v3(const Body& body) { return body(Vectors<8>{}); }

inline const int level = [] {
  __builtin_cpu_init();
  const int highest = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  const char* lower = std::getenv("CLLAVA_CPU_LEVEL");  // so that tests see each
  return lower ? std::min(highest, std::atoi(lower)) : highest;
}();

// Runs body(Vectors<..>{}), a lambda that is CLLAVA_INLINED.
template <typename Body>
auto at_this_level(const Body& body) {
  if (level == 4) return at_v4(body);
  if (level == 3) return at_v3(body);
  return body(Vectors<4>{});
}
#else
template <typename Body>
auto at_this_level(const Body& body) { return body(Vectors<4>{}); }
#endif

template <typename V>
CLLAVA_INLINE void load(typename V::Lanes& out, const float* from) { std::memcpy(&out, from, sizeof out); }

template <typename V>
CLLAVA_INLINE void load(typename V::Lanes& out, const BFloat16* from) {
  typename V::Shorts raw;
  std::memcpy(&raw, from, sizeof raw);
  const typename V::Bits bits = __builtin_convertvector(raw, typename V::Bits) << 16;
  std::memcpy(&out, &bits, sizeof out);
}

template <typename V>
CLLAVA_INLINE void load(typename V::Lanes& out, const Half* from) {
  using Bits = typename V::Bits;
  typename V::Shorts raw;
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

template <typename V>
CLLAVA_INLINE void store(const typename V::Lanes& value, float* to) { std::memcpy(to, &value, sizeof value); }

template <typename V>
CLLAVA_INLINE void store(const typename V::Lanes& value, Half* to) {  // to nearest even; NaN stays NaN
  using Bits = typename V::Bits;
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Bits magnitude = bits & 0x7FFFFFFF;
  typename V::Lanes small;
  std::memcpy(&small, &magnitude, sizeof small);
  small += 0.5f;  // whose last bit is the smallest number of float16
  Bits subnormal;
  std::memcpy(&subnormal, &small, sizeof subnormal);
  Bits half = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  half = magnitude < 0x38800000 ? subnormal - 0x3F000000 : half;
  half = magnitude >= 0x477FF000 ? Bits{} + 0x7C00 : half;
  half = value == value ? half : Bits{} + 0x7E00;
  const auto raw = __builtin_convertvector(half | (bits >> 16 & 0x8000), typename V::Shorts);
  std::memcpy(static_cast<void*>(to), &raw, sizeof raw);
}

template <typename V>
CLLAVA_INLINE void store(const typename V::Lanes& value, BFloat16* to) {  // to nearest even; NaN stays NaN
  typename V::Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const typename V::Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const typename V::Bits chosen = value == value ? rounded : (bits >> 16) | 0x40;
  const auto raw = __builtin_convertvector(chosen, typename V::Shorts);
  std::memcpy(static_cast<void*>(to), &raw, sizeof raw);
}

// Fewer numbers than lanes; the rest of the lanes is 0.
template <typename V, typename T>
CLLAVA_INLINE void load(typename V::Lanes& out, const T* from, int64_t count) {
  T padded[V::lanes] = {};
  std::memcpy(static_cast<void*>(padded), from, count * sizeof(T));
  load<V>(out, padded);
}

typedef float Quad __attribute__((vector_size(4 * sizeof(float))));

// The sum of every fourth lane. By reference: a level's vectors cannot be arguments of another's functions.
CLLAVA_INLINE void quarters(const Vectors<4>::Lanes& value, Quad& out) { out = value; }

CLLAVA_INLINE void quarters(const Vectors<8>::Lanes& value, Quad& out) {
  out = __builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7);
}

CLLAVA_INLINE void quarters(const Vectors<16>::Lanes& value, Quad& out) {
  const Vectors<8>::Lanes half = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                                 __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  quarters(half, out);
}

template <typename Lanes>
CLLAVA_INLINE float sum(const Lanes& value) {
  Quad each;
  quarters(value, each);
  return (each[0] + each[2]) + (each[1] + each[3]);
}

// sum over i of a[i] * b[i]
template <typename V, typename A, typename B>
CLLAVA_INLINE float dot(const A* a, const B* b, int64_t size) {
  constexpr int chains = 4;  // so that no addition waits for the one before
  constexpr int64_t lanes = V::lanes;
  typename V::Lanes sums[chains], left, right;
  CLLAVA_UNROLL for (auto& chain : sums) chain = typename V::Lanes{};
  int64_t i = 0;
  for (; i + chains * lanes <= size; i += chains * lanes)
    CLLAVA_UNROLL for (int chain = 0; chain < chains; ++chain) {
      load<V>(left, a + i + chain * lanes);
      load<V>(right, b + i + chain * lanes);
      sums[chain] += left * right;
    }
  for (; i < size; i += lanes) {
    load<V>(left, a + i, size - i < lanes ? size - i : lanes);
    load<V>(right, b + i, size - i < lanes ? size - i : lanes);
    sums[0] += left * right;
  }
  const typename V::Lanes total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum(total);
}

constexpr int64_t keys_at_once = 4;  // their products are a Quad

template <typename Lanes>
CLLAVA_INLINE void sums_of(const Lanes* value, Quad& out) {  // of each of four
  Quad a, b, c, d;
  quarters(value[0], a);
  quarters(value[1], b);
  quarters(value[2], c);
  quarters(value[3], d);
  const Quad left = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  const Quad right = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
  out = __builtin_shufflevector(left, right, 0, 1, 4, 5) + __builtin_shufflevector(left, right, 2, 3, 6, 7);
}

// out[i, quad] = dots of query i, padded with zeros to a multiple of the lanes, with four keys; where asked for,
// out[queries, quad] = the keys' dots with themselves, which cost no reading of their own.
template <typename V, int64_t queries, bool squares, int64_t quads = 1, typename K>
CLLAVA_INLINE void dots(
    const float* query, int64_t query_stride, const K* const* key, int64_t width, Quad* out) {
  constexpr int64_t keys = quads * keys_at_once;
  typename V::Lanes sums[queries + squares][keys], q[queries], k;
  CLLAVA_UNROLL for (auto& of_query : sums)
    CLLAVA_UNROLL for (auto& lanes : of_query) lanes = typename V::Lanes{};
  const auto add_at = [&](int64_t d, int64_t count) CLLAVA_INLINED {
    CLLAVA_UNROLL for (int64_t i = 0; i < queries; ++i) load<V>(q[i], query + i * query_stride + d);
    CLLAVA_UNROLL for (int64_t j = 0; j < keys; ++j) {
      if (count == V::lanes)
        load<V>(k, key[j] + d);
      else
        load<V>(k, key[j] + d, count);
      CLLAVA_UNROLL for (int64_t i = 0; i < queries; ++i) sums[i][j] += q[i] * k;
      if (squares) sums[queries][j] += k * k;
    }
  };
  int64_t d = 0;
  for (; d + V::lanes <= width; d += V::lanes) add_at(d, V::lanes);
  if (d < width) add_at(d, width - d);
  CLLAVA_UNROLL for (int64_t i = 0; i < (queries + squares) * quads; ++i)
    sums_of(sums[i / quads] + i % quads * keys_at_once, out[i]);
}

// total[i] += sum over rows of strength * row[i]
template <typename V, int64_t rows, typename T>
CLLAVA_INLINE void add(float* total, const T* const* row, const float* strength, int64_t size) {
  int64_t i = 0;
  typename V::Lanes value, sums;
  for (; i + V::lanes <= size; i += V::lanes) {
    load<V>(sums, total + i);
    CLLAVA_UNROLL for (int64_t j = 0; j < rows; ++j) {
      load<V>(value, row[j] + i);
      sums += strength[j] * value;
    }
    store<V>(sums, total + i);
  }
  for (; i < size; ++i)
    for (int64_t j = 0; j < rows; ++j) total[i] += strength[j] * static_cast<float>(row[j][i]);
}

// Converts `size` numbers; one of the types is float.
template <typename V, typename From, typename To>
CLLAVA_INLINE void convert(const From* from, To* to, int64_t size) {
  int64_t i = 0;
  typename V::Lanes value;
  for (; i + V::lanes <= size; i += V::lanes) {
    load<V>(value, from + i);
    store<V>(value, to + i);
  }
  for (; i < size; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
}

}  // namespace cllava::cpu

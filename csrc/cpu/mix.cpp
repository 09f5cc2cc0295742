// mix_factors on the CPU, in strips of columns. Rows that several samples share are copied to a scratch first, in
// float32: side by side they stay in cache, where rows a power of two apart would displace each other.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cllava::cpu {
namespace {

constexpr int64_t strip = 256;  // columns

struct Term {
  int64_t source;
  float strength;
};

// Rows, each once: their places in a scratch.
struct Distinct {
  std::vector<int64_t> rows;
  std::vector<int64_t> places;  // of every row there is; -1 where it is not among them

  explicit Distinct(int64_t count) : places(count, -1) {}

  int64_t place(int64_t row) {
    if (places[row] < 0) {
      places[row] = rows.size();
      rows.push_back(row);
    }
    return places[row];
  }
};

// The strip of each distinct row that begins at column `first`, in float32 and side by side.
template <typename V, typename T>
CLLAVA_INLINE void copy_strips(const Distinct& distinct, const T* source, int64_t apart, int64_t width, float* scratch) {
  for (const int64_t row : distinct.rows) {
    convert<V>(source + row * apart, scratch, width);
    scratch += strip;
  }
}

// total[i] = sum over terms of strength * source row
template <typename V>
CLLAVA_INLINE void weighted_sum(const std::vector<Term>& terms, const float* source, float* total) {
  constexpr int64_t at_once = 8;  // vectors of sums that stay in registers
  static_assert(strip % (at_once * V::lanes) == 0);
  for (int64_t i = 0; i < strip; i += at_once * V::lanes) {
    typename V::Lanes sums[at_once], value;
    CLLAVA_UNROLL for (int64_t j = 0; j < at_once; ++j) sums[j] = typename V::Lanes{};
    for (const Term& term : terms) {
      const float* row = source + term.source * strip + i;
      CLLAVA_UNROLL for (int64_t j = 0; j < at_once; ++j) {
        load<V>(value, row + j * V::lanes);
        sums[j] += term.strength * value;
      }
    }
    CLLAVA_UNROLL for (int64_t j = 0; j < at_once; ++j) store<V>(sums[j], total + i + j * V::lanes);
  }
}

using Sums = std::vector<std::vector<Term>>;  // the terms of each row of an output

// out[row] = sum over its terms of strength * source row, in order.
template <typename From, typename To>
void add_up(Sums sums, int64_t sources, const From* source, int64_t apart, int64_t size, To* out) {
  Distinct distinct(sources);
  int64_t count = 0;
  for (auto& terms : sums) {
    for (Term& term : terms) term.source = distinct.place(term.source);
    count += terms.size();
  }
  const int64_t strips = (size + strip - 1) / strip, cost = strip * (count + distinct.rows.size() + sums.size());
  parallel_vectors(strips, cost, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    std::vector<float> scratch(distinct.rows.size() * strip);
    float total[strip];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * strip, width = std::min(strip, size - first);
      copy_strips<V>(distinct, source + first, apart, width, scratch.data());
      for (size_t row = 0; row < sums.size(); ++row) {
        weighted_sum<V>(sums[row], scratch.data(), total);
        convert<V>(total, out + row * size + first, width);
      }
    }
  });
}

// out[strip of the columns, pair] = gradient of its sample . its row
template <typename G, typename T>
void add_products(const MixFactorsBackward& call, const G* grad, const T* factor, int64_t apart, int64_t size, float* out) {
  constexpr int64_t quads = 2, rows_at_once = quads * keys_at_once;
  Distinct distinct(call.N);
  const int64_t pairs = call.samples * call.P;
  for (int64_t p = 0; p < pairs; ++p) distinct.place(call.index[p]);
  const int64_t strips = (size + strip - 1) / strip, cost = strip * (pairs + distinct.rows.size());
  parallel_vectors(strips, cost, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    std::vector<float> scratch(distinct.rows.size() * strip);
    float own[strip];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * strip, width = std::min(strip, size - first);
      copy_strips<V>(distinct, factor + first, apart, width, scratch.data());
      if (width < strip) std::fill(own + width, own + strip, 0.f);
      for (int64_t b = 0; b < call.samples; ++b) {
        convert<V>(grad + b * size + first, own, width);
        for (int64_t p = b * call.P, here; p < (b + 1) * call.P; p += here) {
          here = std::min(rows_at_once, (b + 1) * call.P - p);
          const float* rows[rows_at_once];
          for (int64_t j = 0; j < rows_at_once; ++j)  // the last one again where there are fewer
            rows[j] = scratch.data() + distinct.places[call.index[p + std::min(j, here - 1)]] * strip;
          Quad found[quads];
          dots<V, 1, false, quads>(own, 0, rows, width, found);
          for (int64_t j = 0; j < here; ++j) out[piece * pairs + p + j] = found[j / keys_at_once][j % keys_at_once];
        }
      }
    }
  });
}

}  // namespace

void mix_factors(const MixFactors& call) {
  Sums sums(call.samples);
  for (int64_t b = 0; b < call.samples; ++b)
    for (int64_t p = b * call.P; p < (b + 1) * call.P; ++p)
      if (call.coefficient[p] != 0) sums[b].push_back({call.index[p], call.coefficient[p]});
  with_type(call.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    add_up(sums, call.N, static_cast<const T*>(call.A), call.stride_A, call.size_A, static_cast<T*>(call.A_mix));
    add_up(sums, call.N, static_cast<const T*>(call.B), call.stride_B, call.size_B, static_cast<T*>(call.B_mix));
  });
}

void mix_factors_backward(const MixFactorsBackward& call) {
  Sums sums(call.N);  // of each row, samples in order; a sample once, its pairs added up
  for (int64_t b = 0; b < call.samples; ++b)
    for (int64_t p = b * call.P; p < (b + 1) * call.P; ++p) {
      auto& terms = sums[call.index[p]];
      if (terms.empty() || terms.back().source != b) terms.push_back({b, 0.f});
      terms.back().strength += call.coefficient[p];
    }
  for (auto& terms : sums)
    terms.erase(
        std::remove_if(terms.begin(), terms.end(), [](const Term& term) { return term.strength == 0; }), terms.end());
  with_type(call.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto* grad_A = static_cast<const T*>(call.grad_A);
    const auto* grad_B = static_cast<const T*>(call.grad_B);
    if (call.to_A) add_up(sums, call.samples, grad_A, call.size_A, call.size_A, static_cast<T*>(call.to_A));
    if (call.to_B) add_up(sums, call.samples, grad_B, call.size_B, call.size_B, static_cast<T*>(call.to_B));
    if (!call.to_coefficient) return;
    const int64_t pairs = call.samples * call.P, strips_A = (call.size_A + strip - 1) / strip;
    const int64_t strips = strips_A + (call.size_B + strip - 1) / strip;
    std::vector<float> products(strips * pairs);
    add_products(call, grad_A, static_cast<const T*>(call.A), call.stride_A, call.size_A, products.data());
    add_products(
        call, grad_B, static_cast<const T*>(call.B), call.stride_B, call.size_B, products.data() + strips_A * pairs);
    std::fill(call.to_coefficient, call.to_coefficient + pairs, 0.f);
    for (int64_t piece = 0; piece < strips; ++piece)
      for (int64_t p = 0; p < pairs; ++p) call.to_coefficient[p] += products[piece * pairs + p];
  });
}

}  // namespace cllava::cpu

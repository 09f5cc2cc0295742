// mix_factors on the CPU, in strips of columns. What is added up (the rows that act; backward, the samples' gradients) is
// copied to a scratch first, each once and in float32: side by side it stays in cache, where rows a power of two apart
// displace each other.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cllava::cpu {
namespace {

constexpr int64_t strip = 256;  // columns

// Asks for `size` numbers that will be read, or written.
template <int write = 0, typename T>
CLLAVA_INLINE void prefetch(const T* numbers, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(numbers + i, write);
}

struct Term {
  int64_t source;
  float strength;
};

// Rows, each once, and one strip of each.
struct Distinct {
  std::vector<int64_t> rows;
  std::vector<int64_t> places;  // of every row there is: where it stands in the scratch, or -1

  explicit Distinct(int64_t count) : places(count, -1) {}

  int64_t place(int64_t row) {
    if (places[row] < 0) {
      places[row] = rows.size();
      rows.push_back(row);
    }
    return places[row];
  }

  // The strips that begin where `source` points to in row 0.
  template <typename V, typename T>
  CLLAVA_INLINE void copy(const T* source, int64_t apart, int64_t width, float* scratch) const {
    constexpr size_t ahead = 3;  // rows that are asked for early: the hardware foresees no jump from row to row
    for (size_t at = 0; at < rows.size(); ++at) {
      if (at + ahead < rows.size()) prefetch(source + rows[at + ahead] * apart, width);
      convert<V>(source + rows[at] * apart, scratch + at * strip, width);
    }
  }
};

// The terms of each row of an output; a term's source is its place in the scratch.
struct Sums {
  std::vector<std::vector<Term>> terms;
  Distinct distinct;
  std::vector<int64_t> before;  // terms of the rows before each
  int64_t count = 0;  // of terms

  Sums(std::vector<std::vector<Term>> of_rows, int64_t sources) : terms(std::move(of_rows)), distinct(sources) {
    for (auto& row : terms) {
      for (Term& term : row) term.source = distinct.place(term.source);
      before.push_back(count);
      count += row.size();
    }
  }
};

// Runs body(vectors, strip's number, its first column, its width, row, copied strips) for each strip and each of `rows`.
template <typename T, typename Body>
void each_strip(
    const Distinct& distinct, const T* source, int64_t apart, int64_t size, int64_t rows, int64_t cost, const Body& body) {
  const int64_t strips = (size + strip - 1) / strip;
  // a thread copies a strip once for all rows that it gets
  cost += strip * distinct.rows.size() / std::max<int64_t>(1, rows);
  parallel_vectors(strips * rows, cost, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    std::vector<float> scratch(distinct.rows.size() * strip);
    int64_t copied = -1;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t number = piece / rows, first = number * strip, width = std::min(strip, size - first);
      if (number != copied) distinct.copy<decltype(vectors)>(source + first, apart, width, scratch.data());
      copied = number;
      body(vectors, number, first, width, piece % rows, scratch.data());
    }
  });
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
      if (term.strength == 0) continue;  // padding: what is there may be infinite
      const float* row = source + term.source * strip + i;
      CLLAVA_UNROLL for (int64_t j = 0; j < at_once; ++j) {
        load<V>(value, row + j * V::lanes);
        sums[j] += term.strength * value;
      }
    }
    CLLAVA_UNROLL for (int64_t j = 0; j < at_once; ++j) store<V>(sums[j], total + i + j * V::lanes);
  }
}

// out[row] = sum over its terms of strength * source row, in order.
template <typename T>
void add_up(const Sums& sums, const T* source, int64_t apart, int64_t size, T* out) {
  const int64_t rows = sums.terms.size(), cost = strip * (1 + sums.count / std::max<int64_t>(1, rows));
  const auto body = [&](auto vectors, int64_t, int64_t first, int64_t width, int64_t row, const float* scratch) CLLAVA_INLINED {
    using V = decltype(vectors);
    float total[strip];
    prefetch<1>(out + row * size + first, width);
    weighted_sum<V>(sums.terms[row], scratch, total);
    convert<V>(total, out + row * size + first, width);
  };
  each_strip(sums.distinct, source, apart, size, rows, cost, body);
}

// out[strip of the columns, term] = row . the term's source, terms being counted through all rows
template <typename T>
void add_products(const Sums& sums, const T* source, const T* factor, int64_t apart, int64_t size, float* out) {
  const int64_t rows = sums.terms.size(), cost = strip * (1 + sums.count / std::max<int64_t>(1, rows));
  const auto body = [&](auto vectors, int64_t number, int64_t first, int64_t width, int64_t row, const float* scratch) CLLAVA_INLINED {
    using V = decltype(vectors);
    const std::vector<Term>& terms = sums.terms[row];
    const int64_t count = terms.size();
    if (count == 0) return;
    if (row + 1 < rows) prefetch(factor + (row + 1) * apart + first, width);
    float own[strip] = {};
    convert<V>(factor + row * apart + first, own, width);
    float* to = out + number * sums.count + sums.before[row];
    constexpr int64_t quads = 3, at_once = quads * keys_at_once;
    for (int64_t p = 0; p < count; p += at_once) {
      const int64_t here = std::min(at_once, count - p);
      const float* samples[at_once];
      for (int64_t j = 0; j < at_once; ++j)  // the last one again where there are fewer
        samples[j] = scratch + terms[p + std::min(j, here - 1)].source * strip;
      Quad found[quads];
      if (here > 2 * keys_at_once)
        dots<V, 1, false, 3>(own, 0, samples, width, found);
      else if (here > keys_at_once)
        dots<V, 1, false, 2>(own, 0, samples, width, found);
      else
        dots<V, 1, false, 1>(own, 0, samples, width, found);
      for (int64_t j = 0; j < here; ++j) to[p + j] = found[j / keys_at_once][j % keys_at_once];
    }
  };
  each_strip(sums.distinct, source, size, size, rows, cost, body);
}

}  // namespace

void mix_factors(const MixFactors& call) {
  std::vector<std::vector<Term>> terms(call.samples);
  for (int64_t b = 0; b < call.samples; ++b)
    for (int64_t p = b * call.P; p < (b + 1) * call.P; ++p)
      if (call.coefficient[p] != 0) terms[b].push_back({call.index[p], call.coefficient[p]});
  const Sums sums(std::move(terms), call.N);
  with_type(call.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    add_up(sums, static_cast<const T*>(call.A), call.stride_A, call.size_A, static_cast<T*>(call.A_mix));
    add_up(sums, static_cast<const T*>(call.B), call.stride_B, call.size_B, static_cast<T*>(call.B_mix));
  });
}

void mix_factors_backward(const MixFactorsBackward& call) {
  const int64_t pairs = call.samples * call.P;
  std::vector<std::vector<Term>> terms(call.N);  // of each row, samples in order; a sample once, its pairs added up
  std::vector<int64_t> place(pairs);  // where each pair's term stands among its row's
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t b = pair / call.P;
    auto& row = terms[call.index[pair]];
    if (row.empty() || row.back().source != b) row.push_back({b, 0.f});
    row.back().strength += call.coefficient[pair];
    place[pair] = row.size() - 1;
  }
  const Sums sums(std::move(terms), call.samples);
  with_type(call.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto* grad_A = static_cast<const T*>(call.grad_A);
    const auto* grad_B = static_cast<const T*>(call.grad_B);
    if (call.to_A) add_up(sums, grad_A, call.size_A, call.size_A, static_cast<T*>(call.to_A));
    if (call.to_B) add_up(sums, grad_B, call.size_B, call.size_B, static_cast<T*>(call.to_B));
    if (!call.to_coefficient) return;
    const int64_t strips_A = (call.size_A + strip - 1) / strip, strips = strips_A + (call.size_B + strip - 1) / strip;
    std::vector<float> products(strips * sums.count), totals(sums.count);
    add_products(sums, grad_A, static_cast<const T*>(call.A), call.stride_A, call.size_A, products.data());
    float* const of_B = products.data() + strips_A * sums.count;
    add_products(sums, grad_B, static_cast<const T*>(call.B), call.stride_B, call.size_B, of_B);
    for (int64_t piece = 0; piece < strips; ++piece)
      for (int64_t i = 0; i < sums.count; ++i) totals[i] += products[piece * sums.count + i];
    for (int64_t pair = 0; pair < pairs; ++pair)
      call.to_coefficient[pair] = totals[sums.before[call.index[pair]] + place[pair]];
  });
}

}  // namespace cllava::cpu

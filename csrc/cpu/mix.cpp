// mix_factors on the CPU: rows are read where they lie, in strips of columns that stay in cache.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace cllava::cpu {
namespace {

constexpr int64_t strip = 2048;  // columns

struct Term {
  int64_t source;
  float strength;
};

// out[row] = sum over its terms of strength * source row, in order. Terms of strength 0 are not there.
template <typename T>
void add_up(
    const std::vector<std::vector<Term>>& terms, const T* source, int64_t apart, int64_t size, T* out) {
  const int64_t strips = (size + strip - 1) / strip;
  int64_t all = 0;
  for (const auto& row : terms) all += row.size();
  const int64_t count = terms.size() * strips;
  parallel(count, strip * (1 + all / static_cast<int64_t>(terms.size())), [&](int64_t begin, int64_t end) {
    std::vector<float> total(strip);
    for (int64_t piece = begin; piece < end; ++piece) {
      // the rows of one strip are neighbours: what they share is still in cache
      const int64_t row = piece % terms.size(), first = piece / terms.size() * strip;
      const int64_t width = std::min(strip, size - first);
      std::fill(total.begin(), total.end(), 0.f);
      for (const Term& term : terms[row]) add(total.data(), source + term.source * apart + first, term.strength, width);
      convert(total.data(), out + row * size + first, width);
    }
  });
}

}  // namespace

void mix_factors(const MixFactors& call) {
  std::vector<std::vector<Term>> terms(call.samples);
  for (int64_t b = 0; b < call.samples; ++b)
    for (int64_t p = b * call.P; p < (b + 1) * call.P; ++p)
      if (call.coefficient[p] != 0) terms[b].push_back({call.index[p], call.coefficient[p]});
  with_type(call.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    add_up(terms, static_cast<const T*>(call.A), call.stride_A, call.size_A, static_cast<T*>(call.A_mix));
    add_up(terms, static_cast<const T*>(call.B), call.stride_B, call.size_B, static_cast<T*>(call.B_mix));
  });
}

void mix_factors_backward(const MixFactorsBackward& call) {
  std::vector<std::vector<Term>> terms(call.N);  // of each row, samples in order; a sample once, its pairs added up
  for (int64_t b = 0; b < call.samples; ++b)
    for (int64_t p = b * call.P; p < (b + 1) * call.P; ++p) {
      auto& row = terms[call.index[p]];
      if (row.empty() || row.back().source != b) row.push_back({b, 0.f});
      row.back().strength += call.coefficient[p];
    }
  for (auto& row : terms)
    row.erase(std::remove_if(row.begin(), row.end(), [](const Term& term) { return term.strength == 0; }), row.end());
  with_type(call.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* grad_A = static_cast<const T*>(call.grad_A);
    const T* grad_B = static_cast<const T*>(call.grad_B);
    if (call.to_A) add_up(terms, grad_A, call.size_A, call.size_A, static_cast<T*>(call.to_A));
    if (call.to_B) add_up(terms, grad_B, call.size_B, call.size_B, static_cast<T*>(call.to_B));
    if (!call.to_coefficient) return;
    parallel(call.samples * call.P, call.size_A + call.size_B, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t b = p / call.P, row = call.index[p];
        call.to_coefficient[p] =
            dot(grad_A + b * call.size_A, static_cast<const T*>(call.A) + row * call.stride_A, call.size_A) +
            dot(grad_B + b * call.size_B, static_cast<const T*>(call.B) + row * call.stride_B, call.size_B);
      }
    });
  });
}

}  // namespace cllava::cpu

// mix_factors on the CPU: rows are read where they lie, in strips of columns that stay in cache.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace cllava::cpu {
namespace {

constexpr int64_t strip = 1024;  // columns
constexpr int64_t at_once = 8 * lanes;  // columns whose sums stay in registers

struct Term {
  int64_t source;
  float strength;
};

// total[i] = sum over terms of strength * source row
template <typename T>
CLLAVA_EVERY_LEVEL void weighted_sum(
    const Term* terms, int64_t count, const T* source, int64_t apart, float* total, int64_t width) {
  int64_t i = 0;
  Lanes value;
  for (; i + at_once <= width; i += at_once) {
    Lanes sums[8] = {};
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < 8; ++j) {
        load(value, source + terms[t].source * apart + i + j * lanes);
        sums[j] += terms[t].strength * value;
      }
    for (int64_t j = 0; j < 8; ++j) store(sums[j], total + i + j * lanes);
  }
  std::fill(total + i, total + width, 0.f);
  for (int64_t t = 0; t < count; ++t)
    add(total + i, source + terms[t].source * apart + i, terms[t].strength, width - i);
}

// out[row] = sum over its terms of strength * source row, in order. Terms of strength 0 are not there.
template <typename From, typename To>
void add_up(
    const std::vector<std::vector<Term>>& terms, const From* source, int64_t apart, int64_t size, To* out) {
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
      weighted_sum(terms[row].data(), terms[row].size(), source + first, apart, total.data(), width);
      convert(total.data(), out + row * size + first, width);
    }
  });
}

// out[pair] += grad of its sample . its row, strip by strip, so that samples share the rows in cache
template <typename T>
void add_products(const MixFactorsBackward& call, const float* grad, const void* factor, int64_t apart, int64_t size,
                  int64_t begin, int64_t end) {
  for (int64_t first = 0; first < size; first += strip)
    for (int64_t p = begin; p < end; ++p)
      call.to_coefficient[p] +=
          dot(grad + p / call.P * size + first,
              static_cast<const T*>(factor) + call.index[p] * apart + first, std::min(strip, size - first));
}

// Numbers that are read many times, in float32 once and for all.
const float* in_float32(const float* from, int64_t, std::vector<float>&) { return from; }

template <typename T>
const float* in_float32(const T* from, int64_t count, std::vector<float>& space) {
  space.resize(count);
  convert(from, space.data(), count);
  return space.data();
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
    std::vector<float> space_A, space_B;
    const float* grad_A = in_float32(static_cast<const T*>(call.grad_A), call.samples * call.size_A, space_A);
    const float* grad_B = in_float32(static_cast<const T*>(call.grad_B), call.samples * call.size_B, space_B);
    if (call.to_A) add_up(terms, grad_A, call.size_A, call.size_A, static_cast<T*>(call.to_A));
    if (call.to_B) add_up(terms, grad_B, call.size_B, call.size_B, static_cast<T*>(call.to_B));
    if (!call.to_coefficient) return;
    parallel(call.samples * call.P, call.size_A + call.size_B, [&](int64_t begin, int64_t end) {
      std::fill(call.to_coefficient + begin, call.to_coefficient + end, 0.f);
      add_products<T>(call, grad_A, call.A, call.stride_A, call.size_A, begin, end);
      add_products<T>(call, grad_B, call.B, call.stride_B, call.size_B, begin, end);
    });
  });
}

}  // namespace cllava::cpu

// inject for few tokens on the CPU: factor rows are read where they lie, once for each sample and four at a time.
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cllava::cpu {
namespace {

constexpr int64_t strip = 1024;  // columns of the output
constexpr int64_t at_once = keys_at_once;  // columns of the factors

// A column of a sample's joined factors.
template <typename F>
struct Column {
  const F *A, *B;
  float strength;
};

// Without those of coefficient 0, which add nothing.
template <typename F>
std::vector<Column<F>> columns_of(const InjectAdd& call, int64_t b) {
  std::vector<Column<F>> columns;
  columns.reserve(call.P * call.R);
  for (int64_t pair = b * call.P; pair < (b + 1) * call.P; ++pair) {
    const float strength = call.coefficient[pair] * call.scale;
    if (strength == 0) continue;
    const F* A = static_cast<const F*>(call.A) + call.index[pair] * call.A_stride_n;
    const F* B = static_cast<const F*>(call.B) + call.index[pair] * call.B_stride_n;
    for (int64_t r = 0; r < call.R; ++r) columns.push_back({A + r * call.A_stride_r, B + r * call.B_stride_r, strength});
  }
  return columns;
}

template <typename X, typename F>
void inject_add_as(const InjectAdd& call) {
  const int64_t K = call.P * call.R, groups = (K + at_once - 1) / at_once;
  const X* x = static_cast<const X*>(call.x);
  X* y = static_cast<X*>(call.y);
  std::vector<std::vector<Column<F>>> columns;
  for (int64_t b = 0; b < call.samples; ++b) columns.push_back(columns_of<F>(call, b));
  std::vector<float> low(call.samples * call.S * K);  // [B, S, K], of which a sample fills as many as it has columns
  const int64_t cost = call.S * call.d_in * at_once;
  parallel_vectors(call.samples * groups, cost, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    const int64_t padded = (call.d_in + V::lanes - 1) / V::lanes * V::lanes;
    std::vector<float> tokens(call.S * padded);
    int64_t converted = -1;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / groups, first = piece % groups * at_once;
      const int64_t here = std::min(at_once, static_cast<int64_t>(columns[b].size()) - first);
      if (here <= 0) continue;
      if (converted != b)
        for (int64_t s = 0; s < call.S; ++s)
          convert<V>(x + b * call.x_stride_b + s * call.x_stride_s, tokens.data() + s * padded, call.d_in);
      converted = b;
      const Column<F>* const own = columns[b].data() + first;
      const F* rows[at_once];
      for (int64_t j = 0; j < at_once; ++j) rows[j] = own[std::min(j, here - 1)].A;  // the last one again
      for (int64_t s = 0; s < call.S; ++s) {
        Quad found;
        dots<V, 1, false>(tokens.data() + s * padded, 0, rows, call.d_in, &found);
        for (int64_t j = 0; j < here; ++j) low[(b * call.S + s) * K + first + j] = own[j].strength * found[j];
      }
    }
  });
  const int64_t strips = (call.d_out + strip - 1) / strip;
  parallel_vectors(call.samples * strips, call.S * K * strip, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    std::vector<float> total(call.S * strip);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / strips, first = piece % strips * strip, width = std::min(strip, call.d_out - first);
      const int64_t count = columns[b].size();
      X* out = y + b * call.S * call.d_out + first;
      for (int64_t s = 0; s < call.S; ++s) convert<V>(out + s * call.d_out, total.data() + s * strip, width);
      for (int64_t k = 0; k < count; k += at_once) {
        const int64_t here = std::min(at_once, count - k);
        const F* rows[at_once];
        for (int64_t j = 0; j < here; ++j) rows[j] = columns[b][k + j].B + first;
        for (int64_t s = 0; s < call.S; ++s) {
          float* const to = total.data() + s * strip;
          const float* const strength = low.data() + (b * call.S + s) * K + k;
          if (here == at_once)
            add<V, at_once>(to, rows, strength, width);
          else
            for (int64_t j = 0; j < here; ++j) add<V, 1>(to, rows + j, strength + j, width);
        }
      }
      for (int64_t s = 0; s < call.S; ++s) convert<V>(total.data() + s * strip, out + s * call.d_out, width);
    }
  });
}

}  // namespace

void inject_add(const InjectAdd& call) {
  with_type(call.type, [&](auto* tag) {
    using X = std::remove_pointer_t<decltype(tag)>;
    if (call.factor_type == call.type) return inject_add_as<X, X>(call);
    inject_add_as<X, float>(call);
  });
}

}  // namespace cllava::cpu

// inject for few tokens, and merge, on the CPU: factor rows are read where they lie, once for each sample.
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace cllava::cpu {
namespace {

constexpr int64_t strip = 1024;  // columns of the output

template <typename X, typename F>
void inject_add_as(const InjectAdd& call) {
  const int64_t K = call.P * call.R;
  const X* x = static_cast<const X*>(call.x);
  const F* A = static_cast<const F*>(call.A);
  const F* B = static_cast<const F*>(call.B);
  X* y = static_cast<X*>(call.y);
  std::vector<float> low(call.samples * K * call.S);  // [B, K, S]
  parallel(call.samples * K, call.S * call.d_in, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      const int64_t b = column / K, pair = column / call.R, r = column % call.R;
      const float strength = call.coefficient[pair] * call.scale;
      const F* row = A + call.index[pair] * call.A_stride_n + r * call.A_stride_r;
      for (int64_t s = 0; s < call.S; ++s)
        low[column * call.S + s] =
            strength == 0 ? 0.f : strength * dot(x + b * call.x_stride_b + s * call.x_stride_s, row, call.d_in);
    }
  });
  const int64_t strips = (call.d_out + strip - 1) / strip;
  parallel(call.samples * strips, call.S * K * strip, [&](int64_t begin, int64_t end) {
    std::vector<float> total(call.S * strip);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / strips, first = piece % strips * strip, width = std::min(strip, call.d_out - first);
      X* out = y + b * call.S * call.d_out + first;
      for (int64_t s = 0; s < call.S; ++s) convert(out + s * call.d_out, total.data() + s * strip, width);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t pair = b * call.P + k / call.R;
        if (call.coefficient[pair] == 0) continue;
        const F* row = B + call.index[pair] * call.B_stride_n + k % call.R * call.B_stride_r + first;
        for (int64_t s = 0; s < call.S; ++s) add(total.data() + s * strip, row, low[(b * K + k) * call.S + s], width);
      }
      for (int64_t s = 0; s < call.S; ++s) convert(total.data() + s * strip, out + s * call.d_out, width);
    }
  });
}

// One output row at a time: its K strengths times the rows of A.
template <typename W, typename F>
void merge_as(const Merge& call) {
  const int64_t K = call.P * call.R;
  const F* A = static_cast<const F*>(call.A);
  const F* B = static_cast<const F*>(call.B);
  parallel(call.d_out, K * call.d_in, [&](int64_t begin, int64_t end) {
    std::vector<float> total(call.d_in);
    for (int64_t o = begin; o < end; ++o) {
      convert(static_cast<const W*>(call.weight) + o * call.weight_stride, total.data(), call.d_in);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t p = k / call.R, r = k % call.R;
        const float strength = call.coefficient[p] * call.scale;
        if (strength == 0) continue;
        const float b = static_cast<float>(B[call.index[p] * call.B_stride_n + r * call.B_stride_r + o]);
        add(total.data(), A + call.index[p] * call.A_stride_n + r * call.A_stride_r, strength * b, call.d_in);
      }
      convert(total.data(), static_cast<W*>(call.out) + o * call.d_in, call.d_in);
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

void merge(const Merge& call) {
  with_type(call.type, [&](auto* tag) {
    using W = std::remove_pointer_t<decltype(tag)>;
    if (call.factor_type == call.type) return merge_as<W, W>(call);
    merge_as<W, float>(call);
  });
}

}  // namespace cllava::cpu

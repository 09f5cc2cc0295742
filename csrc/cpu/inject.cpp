// inject for few tokens on the CPU: factor rows are read where they lie, once for each sample.
#include <vector>

#include "kernels.h"
#include "parallel.h"

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
  parallel_vectors(call.samples * K, call.S * call.d_in, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    for (int64_t column = begin; column < end; ++column) {
      const int64_t b = column / K, pair = column / call.R, r = column % call.R;
      const float strength = call.coefficient[pair] * call.scale;
      const F* row = A + call.index[pair] * call.A_stride_n + r * call.A_stride_r;
      for (int64_t s = 0; s < call.S; ++s)
        low[column * call.S + s] =
            strength == 0 ? 0.f : strength * dot<V>(x + b * call.x_stride_b + s * call.x_stride_s, row, call.d_in);
    }
  });
  const int64_t strips = (call.d_out + strip - 1) / strip;
  parallel_vectors(call.samples * strips, call.S * K * strip, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    std::vector<float> total(call.S * strip);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / strips, first = piece % strips * strip, width = std::min(strip, call.d_out - first);
      X* out = y + b * call.S * call.d_out + first;
      for (int64_t s = 0; s < call.S; ++s) convert<V>(out + s * call.d_out, total.data() + s * strip, width);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t pair = b * call.P + k / call.R;
        if (call.coefficient[pair] * call.scale == 0) continue;
        const F* row = B + call.index[pair] * call.B_stride_n + k % call.R * call.B_stride_r + first;
        for (int64_t s = 0; s < call.S; ++s) add<V>(total.data() + s * strip, row, low[(b * K + k) * call.S + s], width);
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

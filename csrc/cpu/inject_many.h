// inject for many tokens; see inject_many.cpp.
#pragma once

#include <tuple>

#include "../bind.h"

namespace cllava::cpu {

// y, on top of `weight` and `bias` or of `base`, and where `save` asks for it what x is projected to, on the pairs and on
// the past. Tensors may have gaps, but for factors, of which so many entries may be `gathered` at once.
std::tuple<Tensor, Tensor, Tensor> inject(
    const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& base, const Tensor& A, const Tensor& B,
    const Tensor& index, const Tensor& coefficient, const Maybe& past_A, const Maybe& past_B,
    const Maybe& past_coefficient, double scale, bool whole, int64_t gathered, bool save);

// Gradients of x, A, B, coefficient and past_coefficient, of no size where they are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(
    const Tensor& grad, const Maybe& x, const Maybe& weight, const Tensor& A, const Tensor& B, const Tensor& index,
    const Tensor& coefficient, const Maybe& past_A, const Maybe& past_B, const Maybe& past_coefficient, double scale,
    bool whole, int64_t gathered, const Tensor& low, const Tensor& past_low, bool need_x, bool need_A, bool need_B,
    bool need_coefficient, bool need_past);

}  // namespace cllava::cpu

// inject for many tokens on the CPU: what reference.py does, in the same order, by the same matrix products of
// PyTorch's. One call from Python instead of some thirty, which at small sizes take as long as the increments
// themselves, and one pass over what lies between two products.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "inject_many.h"
#include "parallel.h"
#include "products.h"

namespace cllava::cpu {
namespace {

constexpr int64_t block = 16;  // tokens that are added up in float32, before they meet the others in float64

// Of other factors all rows would have to be copied, where the reference copies those that act.
void expect_readable(const char* name, const Tensor& factor, const Tensor& x) {
  const Dtype dtype = factor.scalar_type();
  if (!factor.is_contiguous() || (dtype != Dtype::Float && dtype != x.scalar_type()))
    refuse(name, ": left to the reference: ", show(factor));
}

struct Given {
  Tensor A, B, index, coefficient;
  Maybe past_A, past_B, past_coefficient;
  float scale;
  bool whole;
  int64_t gathered, samples, S, N, R, P;
  bool shared, per_token;

  Given(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& index_, const Tensor& coefficient_,
        const Maybe& past_A, const Maybe& past_B, const Maybe& past_coefficient_, double scale, bool whole,
        int64_t gathered)
      : A(A), B(B), index(dense(index_)), coefficient(dense(coefficient_)), past_A(past_A), past_B(past_B),
        past_coefficient(dense(past_coefficient_)),
        scale(static_cast<float>(scale)), whole(whole), gathered(gathered), samples(x.size(0)), S(x.size(1)),
        N(B.size(0)), R(B.size(1)), P(index.size(1)), shared(A.size(0) != N), per_token(coefficient.dim() == 3) {
    const int64_t d_in = A.size(2), d_out = B.size(2);
    expect_readable("A", A, x);
    expect_readable("B", B, x);
    expect("A", A, A.scalar_type(), {shared ? 1 : N, R, d_in}, x);
    expect("B", B, B.scalar_type(), {N, R, d_out}, x);
    expect("index", index, Dtype::Long, {samples, P}, x);
    expect_within("index", index, N, "N");
    if (per_token)
      expect("coefficient", coefficient, Dtype::Float, {samples, S, P}, x);
    else
      expect("coefficient", coefficient, Dtype::Float, {samples, P}, x);
    if (shared && !per_token) refuse("inject: rows that share one A are for coefficients of each token");
    if (!past_A) return;
    if (!past_B || !past_coefficient) refuse("inject: past.A without past.B and past.coefficient");
    const int64_t C = past_A->size(0), Q = past_A->size(1);
    expect_readable("past.A", *past_A, x);
    expect_readable("past.B", *past_B, x);
    expect("past.A", *past_A, past_A->scalar_type(), {C, Q, d_in}, x);
    expect("past.B", *past_B, past_B->scalar_type(), {C, Q, d_out}, x);
    expect("past.coefficient", *past_coefficient, Dtype::Float, {samples, C}, x);
  }

  int64_t rows() const { return whole ? N : P; }  // whose columns a token meets
  bool all(const Tensor& factor) const { return whole || factor.size(0) != N; }  // whether a token meets all its rows
};

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, float>  ? Dtype::Float
                           : std::is_same_v<T, Half> ? Dtype::Half
                                                     : Dtype::BFloat16;

// Calls body with a null pointer of the factor's C++ type: T or float.
template <typename T, typename Body>
auto with_factor(const Tensor& factor, const Body& body) {
  if (factor.scalar_type() == dtype_of<T>) return body(static_cast<T*>(nullptr));
  return body(static_cast<float*>(nullptr));
}

template <typename V, typename From, typename To>
CLLAVA_INLINE void copy(const From* from, To* to, int64_t size) {
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(static_cast<void*>(to), from, size * sizeof(To));
  else
    convert<V>(from, to, size);
}

// out[i] = in[row(i)], rows of `size` adjacent numbers.
template <typename From, typename To, typename Row>
void copy_rows(const From* from, To* to, int64_t count, int64_t size, const Row& row) {
  if (size == 0) return;
  parallel_vectors(count, size, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    for (int64_t i = begin; i < end; ++i) copy<decltype(vectors)>(from + row(i) * size, to + i * size, size);
  });
}

// A factor's columns in T: [N, R, d] -> [N * R, d]
template <typename T>
Tensor columns(const Tensor& factor) {
  if (factor.scalar_type() == dtype_of<T>) return flat(factor);
  const int64_t rows = factor.size(0) * factor.size(1), d = factor.size(2);
  const Tensor found = empty({rows, d}, dtype_of<T>);
  copy_rows(in<float>(factor), out<T>(found), rows, d, [](int64_t i) { return i; });
  return found;
}

// Those of samples from `first` on: [count, P * R, d]
template <typename T>
Tensor gather(const Tensor& factor, const Given& given, int64_t first, int64_t count) {
  const Tensor found = empty({count, given.P * given.R, factor.size(2)}, dtype_of<T>);
  const int64_t* index = in<int64_t>(given.index) + first * given.P;
  with_factor<T>(factor, [&](auto* tag) {
    using F = std::remove_pointer_t<decltype(tag)>;
    copy_rows(in<F>(factor), out<T>(found), count * given.P, given.R * factor.size(2), [&](int64_t i) { return index[i]; });
  });
  return found;
}

// Calls body(rows, first, count) for samples that are worked on together.
template <typename T, typename Body>
void in_turns(const Tensor& factor, const Given& given, const Body& body) {
  const int64_t together = std::max<int64_t>(1, given.gathered / std::max<int64_t>(1, given.P * given.R * factor.size(2)));
  for (int64_t first = 0; first < given.samples; first += together) {
    const int64_t count = std::min(together, given.samples - first);
    body(gather<T>(factor, given, first, count), first, count);
  }
}

template <typename T>
Tensor project(const Tensor& x, const Tensor& factor) {  // [B, S, d], [N, R, d] -> [B, S, N * R]
  const Tensor low = empty({x.size(0), x.size(1), factor.size(0) * factor.size(1)}, dtype_of<T>);
  mm(flat(low), flat(dense(x)), transposed(columns<T>(factor)));
  return low;
}

template <typename T>
Tensor shrink(const Tensor& x, const Tensor& factor, const Given& given) {  // [B, S, d] -> [B, S, K]
  if (given.all(factor)) return project<T>(x, factor);
  const Tensor low = empty({given.samples, given.S, given.P * given.R}, dtype_of<T>);
  in_turns<T>(factor, given, [&](const Tensor& rows, int64_t first, int64_t count) {
    bmm(part(low, first, count), part(x, first, count), transposed(rows));
  });
  return low;
}

template <typename T>
void expand(const Tensor& y, const Tensor& low, const Tensor& factor, const Given& given) {  // [B, S, K] to [B, S, d]
  if (given.all(factor)) return add_mm(flat(y), flat(low), columns<T>(factor));
  in_turns<T>(factor, given, [&](const Tensor& rows, int64_t first, int64_t count) {
    add_bmm(part(y, first, count), part(low, first, count), rows);
  });
}

// How strongly rows act: [B, S or 1, rows]. A row that appears twice in a sample counts twice.
Tensor strengths(const Given& given) {
  const int64_t tokens = given.per_token ? given.S : 1, rows = given.rows(), P = given.P;
  const Tensor found = empty({given.samples, tokens, rows}, Dtype::Float);
  parallel(given.samples * tokens, P + rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t* index = in<int64_t>(given.index) + i / tokens * P;
      const float* coefficient = in<float>(given.coefficient) + i * P;
      float* to = out<float>(found) + i * rows;
      if (given.whole) std::fill(to, to + rows, 0.f);
      for (int64_t p = 0; p < P; ++p) {
        const float strength = coefficient[p] * given.scale;
        if (given.whole)
          to[index[p]] += strength;
        else
          to[p] = strength;
      }
    }
  });
  return found;
}

Tensor past_strengths(const Given& given) {  // [B, 1, C]
  const int64_t C = given.past_A->size(0);
  const Tensor found = empty({given.samples, 1, C}, Dtype::Float);
  const float* coefficient = in<float>(*given.past_coefficient);
  std::transform(coefficient, coefficient + given.samples * C, out<float>(found), [&](float c) { return c * given.scale; });
  return found;
}

// value * strength; in float16 an overflow in a row that does not act stays there.
template <typename V, typename T>
CLLAVA_INLINE void multiply(const T* from, const float* strength, T* to, int64_t size) {
  constexpr bool half = std::is_same_v<T, Half>;
  typename V::Lanes value, factor;
  int64_t k = 0;
  for (; k + V::lanes <= size; k += V::lanes) {
    load<V>(value, from + k);
    load<V>(factor, strength + k);
    value *= factor;
    if (half) value = factor == 0 ? typename V::Lanes{} : value;
    store<V>(value, to + k);
  }
  for (; k < size; ++k)
    to[k] = half && strength[k] == 0 ? T(0.f) : static_cast<T>(static_cast<float>(from[k]) * strength[k]);
}

// Calls body(vectors, token, strength of each column [K]) for all tokens.
template <typename Body>
void each_token(const Tensor& strength, int64_t samples, int64_t S, int64_t rank, const Body& body) {
  const int64_t rows = strength.size(2), together = strength.size(1) == 1 ? S : 1;
  const float* const of_rows = in<float>(strength);
  parallel_vectors(samples * S, 4 * rows * rank, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    std::vector<float> of_column(rows * rank);
    for (int64_t token = begin; token < end; ++token) {
      if (token == begin || token % together == 0) {
        float* to = of_column.data();
        for (const float* row = of_rows + token / together * rows; to < of_column.data() + rows * rank; ++row)
          for (int64_t r = 0; r < rank; ++r) *to++ = *row;
      }
      body(vectors, token, of_column.data());
    }
  });
}

// [B, S, K], or [B, S, R] that rows share, times strengths: [B, S, K]
template <typename T>
Tensor weighed(const Tensor& low, const Tensor& strength, int64_t rank) {
  const int64_t K = strength.size(2) * rank, width = low.size(2);
  const Tensor found = empty({low.size(0), low.size(1), K}, dtype_of<T>);
  const T* const from = in<T>(low);
  T* const to = out<T>(found);
  const auto body = [&](auto vectors, int64_t token, const float* of_column) CLLAVA_INLINED {
    for (int64_t k = 0; k < K; k += width)
      multiply<decltype(vectors)>(from + token * width, of_column + k, to + token * K + k, width);
  };
  each_token(strength, low.size(0), low.size(1), rank, body);
  return found;
}

// The gradient of what all rows share: [B, S, K] to [B, S, R]
template <typename T>
Tensor folded(const Tensor& low_grad, const Tensor& strength, int64_t rank) {
  const int64_t K = low_grad.size(2);
  const Tensor found = empty({low_grad.size(0), low_grad.size(1), rank}, dtype_of<T>);
  const T* const from = in<T>(low_grad);
  T* const to = out<T>(found);
  const auto body = [&](auto vectors, int64_t token, const float* of_column) CLLAVA_INLINED {
    using V = decltype(vectors);
    std::vector<float> total(rank);
    for (int64_t k = 0; k < K; k += rank) {
      const T* const row = from + token * K + k;
      const float strength_of_row = of_column[k];
      if (std::is_same_v<T, Half> && strength_of_row == 0) continue;
      add<V, 1>(total.data(), &row, &strength_of_row, rank);
    }
    copy<V>(total.data(), to + token * rank, rank);
  };
  each_token(strength, low_grad.size(0), low_grad.size(1), rank, body);
  return found;
}

template <typename V, typename T>
CLLAVA_INLINE void add_products(const T* a, const T* b, float* total, int64_t size) {
  typename V::Lanes left, right, sums;
  int64_t k = 0;
  for (; k + V::lanes <= size; k += V::lanes) {
    load<V>(left, a + k);
    load<V>(right, b + k);
    load<V>(sums, total + k);
    sums += left * right;
    store<V>(sums, total + k);
  }
  for (; k < size; ++k) total[k] += static_cast<float>(a[k]) * static_cast<float>(b[k]);
}

// The strengths' gradient times scale, [B, S or 1, rows], from [B, S, K] and [B, S, K], or [B, S, R] that rows share.
template <typename T>
Tensor strength_grad(
    const Tensor& low_grad, const Tensor& low, int64_t rows, int64_t rank, bool per_token, float scale) {
  const int64_t S = low.size(1), K = rows * rank, width = low.size(2), together = per_token ? 1 : S;
  const int64_t sums = per_token ? low.size(0) * S : low.size(0);
  const Tensor found = empty({low.size(0), per_token ? S : 1, rows}, Dtype::Float);
  const T* const left = in<T>(low_grad);
  const T* const right = in<T>(low);
  float* const to = out<float>(found);
  parallel_vectors(sums, 4 * together * K, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    std::vector<float> products(K);
    std::vector<double> total(K);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t first = i * together; first < (i + 1) * together; first += block) {
        std::fill(products.begin(), products.end(), 0.f);
        for (int64_t token = first; token < std::min((i + 1) * together, first + block); ++token)
          for (int64_t k = 0; k < K; k += width)
            add_products<V>(left + token * K + k, right + token * width, products.data() + k, width);
        for (int64_t k = 0; k < K; ++k) total[k] += products[k];
      }
      const double* column = total.data();
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r) sum += *column++;
        to[i * rows + row] = static_cast<float>(sum * scale);
      }
    }
  });
  return found;
}

Tensor of_pairs(const Tensor& of_rows, const Given& given) {  // [B, S or 1, rows] -> like coefficient
  const int64_t tokens = of_rows.size(1), P = given.P, rows = given.rows();
  const Tensor found =
      given.per_token ? empty({given.samples, tokens, P}, Dtype::Float) : empty({given.samples, P}, Dtype::Float);
  for (int64_t i = 0; i < given.samples * tokens; ++i)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t row = given.whole ? in<int64_t>(given.index)[i / tokens * P + p] : p;
      out<float>(found)[i * P + p] = in<float>(of_rows)[i * rows + row];
    }
  return found;
}

// out[row] = the sum of its pairs, [B * P, size], in order
template <typename T, typename F>
void add_pairs(const T* pairs, const Given& given, int64_t size, F* to) {
  std::vector<std::vector<const T*>> of_rows(given.N);
  const int64_t count = given.samples * given.P;
  for (int64_t pair = 0; pair < count; ++pair) of_rows[in<int64_t>(given.index)[pair]].push_back(pairs + pair * size);
  const int64_t cost = size * (1 + count / std::max<int64_t>(1, given.N));
  parallel_vectors(given.N, cost, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    using V = decltype(vectors);
    constexpr float once = 1;
    std::vector<float> total(size);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(total.begin(), total.end(), 0.f);
      for (const T* pair : of_rows[row]) add<V, 1>(total.data(), &pair, &once, size);
      copy<V>(total.data(), to + row * size, size);
    }
  });
}

// The gradient of `factor` [N, R, d]: [B, S, K] with [B, S, d], summed over tokens.
template <typename T>
Tensor factor_grad(const Tensor& low, const Tensor& x, const Tensor& factor, const Given& given) {
  const int64_t N = factor.size(0), R = factor.size(1), d = factor.size(2), K = low.size(2);
  const bool all = given.all(factor);
  const Tensor by_column = all ? empty({K, d}, dtype_of<T>) : empty({given.samples, K, d}, dtype_of<T>);
  if (all)
    mm(by_column, transposed(flat(low)), flat(dense(x)));
  else
    bmm(by_column, transposed(low), x);
  if (all && factor.scalar_type() == dtype_of<T>) return seen(by_column, {N, R, d}, {R * d, d, 1});
  const Tensor found = empty({N, R, d}, factor.scalar_type());
  with_factor<T>(factor, [&](auto* tag) {
    using F = std::remove_pointer_t<decltype(tag)>;
    if (all)
      copy_rows(in<T>(by_column), out<F>(found), K, d, [](int64_t i) { return i; });
    else
      add_pairs(in<T>(by_column), given, R * d, out<F>(found));
  });
  return found;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> inject_as(
    const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& base, const Given& given, bool save) {
  const Tensor low = shrink<T>(x, given.A, given);
  const Tensor past_low = given.past_A ? project<T>(x, *given.past_A) : empty({0}, dtype_of<T>);
  // late, so that what is added next finds it in the cache
  const Tensor y = base ? copied(*base) : linear(x, *weight, bias);
  if (given.past_A)
    add_mm(flat(y), flat(weighed<T>(past_low, past_strengths(given), given.past_B->size(1))), columns<T>(*given.past_B));
  expand<T>(y, weighed<T>(low, strengths(given), given.R), given.B, given);
  if (save) return {y, low, past_low};
  return {y, empty({0}, dtype_of<T>), empty({0}, dtype_of<T>)};
}

struct Needed {
  bool x, A, B, coefficient, past;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_as(
    const Tensor& grad, const Maybe& x, const Maybe& weight, const Given& given, const Tensor& low,
    const Tensor& past_low, const Needed& need) {
  Tensor to_x = empty({0}, dtype_of<T>), to_past = empty({0}, dtype_of<T>), to_coefficient = empty({0}, Dtype::Float);
  Tensor to_A = empty({0}, given.A.scalar_type()), to_B = empty({0}, given.B.scalar_type());
  const Tensor strength = strengths(given);
  if (need.B) to_B = factor_grad<T>(weighed<T>(low, strength, given.R), grad, given.B, given);
  if (need.x || need.A || need.coefficient) {
    const Tensor low_grad = shrink<T>(grad, given.B, given);
    if (need.coefficient)
      to_coefficient = of_pairs(strength_grad<T>(low_grad, low, given.rows(), given.R, given.per_token, given.scale), given);
    const Tensor of_x = given.shared ? folded<T>(low_grad, strength, given.R) : weighed<T>(low_grad, strength, given.R);
    if (need.A) to_A = factor_grad<T>(of_x, *x, given.A, given);
    if (need.x) {
      to_x = empty({given.samples, given.S, given.A.size(2)}, dtype_of<T>);
      if (weight)
        mm(flat(to_x), flat(grad), *weight);
      else if (to_x.numel())
        std::memset(to_x.data_ptr(), 0, to_x.numel() * sizeof(T));
      expand<T>(to_x, of_x, given.A, given);
    }
  }
  if (given.past_A && (need.x || need.past)) {
    const int64_t C = given.past_A->size(0), Q = given.past_A->size(1);
    const Tensor low_grad = project<T>(grad, *given.past_B);
    if (need.past) {
      const Tensor found = strength_grad<T>(low_grad, past_low, C, Q, false, given.scale);
      to_past = seen(found, {given.samples, C}, {C, 1});
    }
    if (need.x) add_mm(flat(to_x), flat(weighed<T>(low_grad, past_strengths(given), Q)), columns<T>(*given.past_A));
  }
  return {to_x, to_A, to_B, to_coefficient, to_past};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> inject(
    const Tensor& x, const Maybe& weight, const Maybe& bias, const Maybe& base, const Tensor& A, const Tensor& B,
    const Tensor& index, const Tensor& coefficient, const Maybe& past_A, const Maybe& past_B,
    const Maybe& past_coefficient, double scale, bool whole, int64_t gathered, bool save) {
  const Given given(x, A, B, index, coefficient, past_A, past_B, past_coefficient, scale, whole, gathered);
  const Dtype dtype = x.scalar_type();
  expect("x", x, dtype, {given.samples, given.S, A.size(2)}, x, 0);
  if (!weight && !base) refuse("inject: neither weight nor y");
  if (weight) expect("weight", *weight, dtype, {B.size(2), A.size(2)}, x, 0);
  if (base) expect("y", *base, dtype, {given.samples, given.S, B.size(2)}, x, 0);
  return with_type(type_of("x", x), [&](auto* tag) {
    return inject_as<std::remove_pointer_t<decltype(tag)>>(x, weight, bias, base, given, save);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(
    const Tensor& grad_, const Maybe& x, const Maybe& weight, const Tensor& A, const Tensor& B, const Tensor& index,
    const Tensor& coefficient, const Maybe& past_A, const Maybe& past_B, const Maybe& past_coefficient, double scale,
    bool whole, int64_t gathered, const Tensor& low_, const Tensor& past_low_, bool need_x, bool need_A, bool need_B,
    bool need_coefficient, bool need_past) {
  const Tensor grad = dense(grad_), low = dense(low_), past_low = dense(past_low_);
  const Given given(grad, A, B, index, coefficient, past_A, past_B, past_coefficient, scale, whole, gathered);
  const Dtype dtype = grad.scalar_type();
  const int64_t samples = given.samples, S = given.S;
  expect("grad", grad, dtype, {samples, S, B.size(2)}, grad);
  if (need_A && !x) refuse("inject_backward: the gradient of A asks for x");
  if (need_A) expect("x", *x, dtype, {samples, S, A.size(2)}, grad, 0);
  if (weight) expect("weight", *weight, dtype, {B.size(2), A.size(2)}, grad, 0);
  if (need_B || need_coefficient)
    expect("low", low, dtype, {samples, S, (given.shared ? 1 : given.rows()) * given.R}, grad);
  need_past &= past_A.has_value();
  if (need_past) expect("past_low", past_low, dtype, {samples, S, past_A->size(0) * past_A->size(1)}, grad);
  const Needed need{need_x, need_A, need_B, need_coefficient, need_past};
  return with_type(type_of("grad", grad), [&](auto* tag) {
    return backward_as<std::remove_pointer_t<decltype(tag)>>(grad, x, weight, given, low, past_low, need);
  });
}

}  // namespace cllava::cpu

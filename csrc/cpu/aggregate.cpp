// aggregate on the CPU: plain loops. Sums of a sample by task come first, so that a row costs one product.
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cllava::cpu {

void aggregate(const Aggregate& call) {
  const auto [B, M, N, T] = std::tuple(call.B, call.M, call.N, call.T);
  parallel(B, 4 * (M * T + N), [&, M = M, N = N, T = T](int64_t begin, int64_t end) {
    std::vector<float> by_task(T);  // sum over the selected rows of weight * context[their task, t]
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* index = call.index + b * M;
      const float* weight = call.weight + b * M;
      float* coefficient = call.coefficient + b * (M + N);
      int64_t* rows = call.rows + b * (M + N);
      std::fill(by_task.begin(), by_task.end(), 0.f);
      int64_t read = 0;  // tasks before this one are read by some selected row
      for (int64_t m = 0; m < M; ++m) {
        const int64_t task = call.row_task[index[m]];
        for (int64_t t = 0; t < task; ++t) by_task[t] += weight[m] * call.context[task * T + t];
        read = std::max(read, task);
        coefficient[m] = weight[m];
        rows[m] = index[m];
      }
      for (int64_t n = 0; n < N; ++n) {
        const int64_t task = call.row_task[n];
        coefficient[M + n] = task < read ? by_task[task] * call.row_mean[n] : 0.f;
        rows[M + n] = n;
      }
    }
  });
}

void aggregate_backward(const AggregateBackward& call) {
  const auto [B, M, N, T] = std::tuple(call.B, call.M, call.N, call.T);
  std::vector<double> context(call.grad_context ? T * T : 0, 0.0);
  std::vector<double> by_task(T);  // sum over the rows of task t of grad * row_mean
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* index = call.index + b * M;
    const float* own = call.grad + b * (M + N);
    const float* past = own + M;
    std::fill(by_task.begin(), by_task.end(), 0.0);
    for (int64_t n = 0; n < N; ++n) by_task[call.row_task[n]] += static_cast<double>(past[n]) * call.row_mean[n];
    for (int64_t m = 0; m < M; ++m) {
      const int64_t task = call.row_task[index[m]];
      if (call.grad_weight) {
        double total = own[m];
        for (int64_t t = 0; t < task; ++t) total += call.context[task * T + t] * by_task[t];
        call.grad_weight[b * M + m] = total;
      }
      if (call.grad_context)
        for (int64_t t = 0; t < task; ++t) context[task * T + t] += call.weight[b * M + m] * by_task[t];
    }
  }
  for (size_t i = 0; i < context.size(); ++i) call.grad_context[i] = context[i];
}

}  // namespace cllava::cpu

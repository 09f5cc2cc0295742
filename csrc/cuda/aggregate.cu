// aggregate: the product form's coefficients in one launch, and their gradients to weight and context.
//
// Nothing is masked by a product with 0: what the formula does not read is not loaded, or not let through a condition.
#include "aggregate.cuh"
#include "launch.cuh"
#include "ops.cuh"
#include "threads.cuh"

namespace cllava::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int SUM_WARPS = 4;
constexpr int UNROLL = 4;  // selected rows whose loads are in flight together

// A thread for each pair of each sample.
__global__ void __launch_bounds__(THREADS) coefficients(Aggregate p) {
  const int64_t pairs = p.M + p.N, pair = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (pair >= p.B * pairs) return;
  const int64_t sample = pair / pairs, column = pair % pairs;
  const int64_t* index = p.index + sample * p.M;
  const float* weight = p.weight + sample * p.M;
  if (column < p.M) {
    p.coefficient[pair] = weight[column];
    p.rows[pair] = index[column];
    return;
  }
  const int64_t n = column - p.M, task = p.row_task[n];
  Past past;
  for (int64_t first = 0; first < p.M; first += UNROLL) {
    int64_t from_task[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) from_task[i] = first + i < p.M ? p.row_task[index[first + i]] : -1;
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      if (first + i < p.M) past.add(weight[first + i], from_task[i], task, p.context, p.T);
    }
  }
  p.coefficient[pair] = past.coefficient(p.row_mean + n);
  p.rows[pair] = n;
}

// A block for each selected row of each sample.
__global__ void __launch_bounds__(SUM_WARPS * WARP) weight_gradient(AggregateBackward p) {
  __shared__ float scratch[SUM_WARPS];
  const int64_t pair = blockIdx.x;
  const float* grad = p.grad + pair / p.M * (p.M + p.N);
  const int64_t from_task = p.row_task[p.index[pair]];
  float total = 0.0f;
  for (int64_t n = threadIdx.x; n < p.N; n += SUM_WARPS * WARP) {
    const int64_t task = p.row_task[n];
    if (task < from_task) total += p.context[from_task * p.T + task] * (p.row_mean[n] * grad[p.M + n]);
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) p.grad_weight[pair] = grad[pair % p.M] + total;
}

// task_sum[b, t] = sum over the rows n of task t of grad[b, M + n] * row_mean[n]. A warp for each.
__global__ void __launch_bounds__(THREADS) task_sums(AggregateBackward p, float* task_sum) {
  const int64_t place = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  if (place >= p.B * p.T) return;
  const int64_t task = place % p.T;
  const float* grad = p.grad + place / p.T * (p.M + p.N) + p.M;
  float total = 0.0f;
  for (int64_t n = threadIdx.x % WARP; n < p.N; n += WARP) {
    if (p.row_task[n] == task) total += grad[n] * p.row_mean[n];
  }
  total = warp_sum(total);
  if (threadIdx.x % WARP == 0) task_sum[place] = total;
}

// A block for THREADS columns of one task's row, over the samples in order.
__global__ void __launch_bounds__(THREADS) context_gradient(AggregateBackward p, const float* task_sum) {
  __shared__ float mass[THREADS];  // weight that each sample puts on rows of the task
  __shared__ bool present[THREADS];
  const int64_t tiles = (p.T + THREADS - 1) / THREADS;
  const int64_t task = blockIdx.x / tiles, other = blockIdx.x % tiles * THREADS + threadIdx.x;
  float total = 0.0f;
  for (int64_t first = 0; first < p.B; first += THREADS) {
    const int64_t sample = first + threadIdx.x;
    float strength = 0.0f;
    bool found = false;
    for (int64_t m = 0; sample < p.B && m < p.M; m++) {
      if (p.row_task[p.index[sample * p.M + m]] == task) {
        strength += p.weight[sample * p.M + m];
        found = true;
      }
    }
    mass[threadIdx.x] = strength;
    present[threadIdx.x] = found;
    __syncthreads();
    if (other < task) {
      for (int b = 0; b < THREADS && first + b < p.B; b++) {
        if (present[b]) total += mass[b] * task_sum[(first + b) * p.T + other];
      }
    }
    __syncthreads();
  }
  if (other < p.T) p.grad_context[task * p.T + other] = total;
}

}  // namespace

const char* cannot_run() {
  cudaFuncAttributes of_one;
  const cudaError_t error = cudaFuncGetAttributes(&of_one, coefficients);
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

void aggregate(const Aggregate& p, cudaStream_t stream) {
  const unsigned grid = blocks("aggregate", divide_up(p.B * (p.M + p.N), THREADS));
  launch("aggregate coefficients", coefficients, grid, THREADS, stream, p);
}

int64_t aggregate_backward_workspace(const AggregateBackward& p) {
  return p.grad_context ? p.B * p.T * int64_t(sizeof(float)) : 0;
}

void aggregate_backward(const AggregateBackward& p, cudaStream_t stream) {
  if (p.grad_weight) {
    const unsigned grid = blocks("aggregate weight_gradient", p.B * p.M);
    launch("aggregate weight_gradient", weight_gradient, grid, SUM_WARPS * WARP, stream, p);
  }
  if (p.grad_context) {
    float* task_sum = static_cast<float*>(p.workspace);
    const unsigned sums = blocks("aggregate task_sums", divide_up(p.B * p.T, THREADS / WARP));
    launch("aggregate task_sums", task_sums, sums, THREADS, stream, p, task_sum);
    const unsigned grid = blocks("aggregate context_gradient", p.T * divide_up(p.T, THREADS));
    launch("aggregate context_gradient", context_gradient, grid, THREADS, stream, p, task_sum);
  }
}

}  // namespace cllava::cuda

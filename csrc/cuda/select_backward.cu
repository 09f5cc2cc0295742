// select_backward: d cos(q, k) / dk = (q^ - cos k^) / |k|, one weighted sum of unit queries for each row, in one launch.
//
// A block owns a few rows and adds up, in order of the batch, the samples that chose them: no atomics.
#include "launch.cuh"
#include "numbers.cuh"
#include "ops.cuh"
#include "select.cuh"
#include "threads.cuh"

namespace cllava::cuda {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int64_t ROWS = 32;            // of a block, in a pool of which most rows were not chosen
constexpr int64_t FEW_ROWS = 4096;      // up to here a block has one

struct Shared {
  float pull[SELECT_BACKWARD_MOST_D];  // sum of the unit queries, weighted; each entry of one thread, but for reading
  float query_norm[WARPS][SELECT_MOST_GROUPS];
  float strength[WARPS];
  float squares[WARPS], alongs[WARPS];
  int choice[THREADS];
  int scratch[WARPS];
};

// Whether any of the ROWS rows from `first` was chosen, as bits; in all threads.
__device__ unsigned chosen_rows(const SelectBackward& p, int64_t first, Shared& shared) {
  unsigned bits = 0;
  for (int64_t i = threadIdx.x; i < p.B * p.M; i += THREADS) {
    const int64_t row = p.index[i] - first;
    if (0 <= row && row < ROWS) bits |= 1u << row;
  }
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) bits |= __shfl_xor_sync(ALL, bits, distance);
  if (threadIdx.x % WARP == 0) shared.scratch[threadIdx.x / WARP] = int(bits);
  __syncthreads();
  for (int warp = 0; warp < WARPS; warp++) bits |= unsigned(shared.scratch[warp]);
  __syncthreads();
  return bits;
}

// Adds to `pull` the queries of up to WARPS choices of a row, one warp to each choice's norms.
__device__ void add_queries(const SelectBackward& p, bool vector, const int* choices, int count, Shared& shared) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int chunk = int(p.D / p.groups), M = int(p.M);
  if (warp < count) {
    const float* query = p.query + choices[warp] / M * p.D;
    for (int group = 0; group < p.groups; group++) {
      const float norm = chunk_norm(query + group * chunk, chunk, vector, lane);
      if (lane == 0) shared.query_norm[warp][group] = norm;
    }
    float strength = p.grad[choices[warp]];
    if (p.by_batch) {
      float total = 0.0f;
      for (int64_t b = lane; b < p.B; b += WARP) total += p.grad[b * M + choices[warp] % M];
      strength = __fdiv_rn(warp_sum(total), float(p.B));
    }
    if (lane == 0) shared.strength[warp] = strength;
  }
  __syncthreads();
  for (int column = threadIdx.x; column < p.D; column += THREADS) {
    const int group = column / chunk;
    float total = 0.0f;  // of these few alone: adding each to a long sum would round at its size every time
    for (int i = 0; i < count; i++) {
      const float unit = over_norm(p.query[choices[i] / M * p.D + column], shared.query_norm[i][group]);
      total = __fmaf_rn(shared.strength[i], unit, total);
    }
    shared.pull[column] += total;
  }
  __syncthreads();
}

template <typename T>
__device__ void chosen_row(const SelectBackward& p, bool vector, int64_t row, Shared& shared) {
  const int chunk = int(p.D / p.groups);
  for (int column = threadIdx.x; column < p.D; column += THREADS) shared.pull[column] = 0.0f;
  for (int64_t first = 0; first < p.B * p.M; first += THREADS) {
    const int64_t i = first + threadIdx.x;
    const bool here = i < p.B * p.M && p.index[i] == row;
    int count;
    const int place = block_place(here, count, shared.scratch);
    if (here) shared.choice[place] = int(i);
    __syncthreads();
    for (int done = 0; done < count; done += WARPS) {
      add_queries(p, vector, shared.choice + done, count - done < WARPS ? count - done : WARPS, shared);
    }
  }
  for (int group = 0; group < p.groups; group++) {
    const T* key = static_cast<const T*>(p.keys) + row * p.key_stride + group * chunk;
    T* out = static_cast<T*>(p.out) + row * p.D + group * chunk;
    const float* pull = shared.pull + group * chunk;
    float square = 0.0f, along = 0.0f;
    for (int column = threadIdx.x; column < chunk; column += THREADS) {
      square = __fmaf_rn(number(key[column]), number(key[column]), square);
    }
    const float norm = __fsqrt_rn(block_sum(square, shared.squares));
    for (int column = threadIdx.x; column < chunk; column += THREADS) {
      along = __fmaf_rn(over_norm(number(key[column]), norm), pull[column], along);
    }
    along = block_sum(along, shared.alongs);
    for (int column = threadIdx.x; column < chunk; column += THREADS) {
      const float across = __fmaf_rn(-over_norm(number(key[column]), norm), along, pull[column]);
      put(out + column, over_norm(across, norm * float(p.groups)));
    }
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 4) gradient(SelectBackward p, int rows, bool vector_query, bool vector_out) {
  __shared__ Shared shared;
  const int64_t first = int64_t(blockIdx.x) * rows;
  const unsigned chosen = chosen_rows(p, first, shared);
  constexpr int COUNT = 16 / sizeof(T);
  const float zeros[COUNT] = {};
  for (int64_t row = first; row < first + rows && row < p.N; row++) {
    if (chosen >> (row - first) & 1) {
      chosen_row<T>(p, vector_query, row, shared);
    } else {
      T* out = static_cast<T*>(p.out) + row * p.D;
      for (int column = threadIdx.x * COUNT; column < p.D; column += THREADS * COUNT) {
        store(vector_out, out + column, p.D - column, zeros);
      }
    }
  }
}

}  // namespace

void select_backward(const SelectBackward& p, cudaStream_t stream) {
  const int64_t rows = p.N <= FEW_ROWS ? 1 : ROWS;
  by_type(p.type, [&](auto number) {
    using T = decltype(number);
    launch("select gradient", gradient<T>, blocks("select gradient", divide_up(p.N, rows)), THREADS, stream, p,
           int(rows), aligned(16, Type::float32, p.query, p.D / p.groups), aligned(16, p.type, p.out, p.D));
  });
}

}  // namespace cllava::cuda

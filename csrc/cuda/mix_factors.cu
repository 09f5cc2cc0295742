// mix_factors: weighted sums of rows of A and B at the speed of memory, and their gradients.
//
// One kernel adds up rows for the forward (each sample's pairs) and for the gradients to A and B (each pool row's
// samples), both factors in one launch. Rows of weight 0 are not loaded: 0 is padding, and aggregate pads much.
#include "launch.cuh"
#include "numbers.cuh"
#include "ops.cuh"
#include "threads.cuh"

namespace cllava::cuda {
namespace {

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int SLICE = 8192;  // entries of a flattened row that one block of `dots` takes

template <typename T>
constexpr int columns_of = 16 / sizeof(T);  // adjacent ones that a thread takes at a time

struct Rows {
  const void* from;  // rows `apart`
  void* to;          // rows adjacent
  int64_t size, apart;
  bool vector;  // loads and stores of 16 bytes
};

struct AddUp {
  Rows first, second;
  int64_t first_tiles, rows, terms;
  const float* weight;   // [rows, terms]
  const int64_t* index;  // [rows, terms], or null: term t is row t
};

// to[row] = sum over t of weight[row, t] * from[index[row, t]], in order of t.
template <typename T>
__global__ void __launch_bounds__(THREADS) add_up(AddUp p) {
  constexpr int COLUMNS = columns_of<T>;
  __shared__ int64_t offset[THREADS];
  __shared__ float strength[THREADS];
  __shared__ int scratch[WARPS];
  const int64_t row = blockIdx.x % unsigned(p.rows);  // fastest: rows that share a source share the cache
  const int64_t tile = blockIdx.x / unsigned(p.rows);
  const Rows rows = tile < p.first_tiles ? p.first : p.second;
  const int64_t column = ((tile < p.first_tiles ? tile : tile - p.first_tiles) * THREADS + threadIdx.x) * COLUMNS;
  const T* from = static_cast<const T*>(rows.from) + column;
  float total[COLUMNS] = {};
  for (int64_t first = 0; first < p.terms; first += THREADS) {
    const int64_t term = first + threadIdx.x, at = row * p.terms + term;
    const float weight = term < p.terms ? p.weight[at] : 0.0f;
    int count;
    const int place = block_place(weight != 0.0f, count, scratch);
    if (weight != 0.0f) {
      strength[place] = weight;
      offset[place] = (p.index ? p.index[at] : term) * rows.apart;
    }
    __syncthreads();
    if (column < rows.size && rows.vector) {
#pragma unroll 4
      for (int i = 0; i < count; i++) {
        float part[COLUMNS];
        load(from + offset[i], part);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = __fmaf_rn(strength[i], part[c], total[c]);
      }
    } else if (column < rows.size) {
      for (int i = 0; i < count; i++) {
        float part[COLUMNS];
        load_some(from + offset[i], rows.size - column, part);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = __fmaf_rn(strength[i], part[c], total[c]);
      }
    }
  }
  if (column < rows.size) {
    store(rows.vector, static_cast<T*>(rows.to) + row * rows.size + column, rows.size - column, total);
  }
}

// strength[n, b] = sum of coefficient[b, p] over the pairs p that name row n.
__global__ void __launch_bounds__(THREADS) strengths(MixFactorsBackward p, float* strength) {
  __shared__ int64_t index[THREADS];
  __shared__ float coefficient[THREADS];
  const int64_t sample = blockIdx.x % p.samples, n = blockIdx.x / p.samples * THREADS + threadIdx.x;
  float total = 0.0f;
  for (int64_t first = 0; first < p.P; first += THREADS) {
    const int64_t pair = first + threadIdx.x;
    if (pair < p.P) {
      index[threadIdx.x] = p.index[sample * p.P + pair];
      coefficient[threadIdx.x] = p.coefficient[sample * p.P + pair];
    }
    __syncthreads();
    for (int i = 0; i < THREADS && first + i < p.P; i++) {
      if (index[i] == n) total += coefficient[i];
    }
    __syncthreads();
  }
  if (n < p.N) strength[n * p.samples + sample] = total;
}

template <typename T>
__device__ __forceinline__ float dot(const T* a, const T* b, int64_t size, bool vector) {
  constexpr int COLUMNS = columns_of<T>;
  float total = 0.0f;
  for (int64_t column = threadIdx.x * COLUMNS; column < size; column += THREADS * COLUMNS) {
    float a_part[COLUMNS], b_part[COLUMNS];
    load(vector, a + column, size - column, a_part);
    load(vector, b + column, size - column, b_part);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) total = __fmaf_rn(a_part[c], b_part[c], total);
  }
  return total;
}

struct Tiles {
  int64_t A, B;
  bool vector_A, vector_B;
};

// partial[tile, pair] = the part of one slice in <grad_A[b], A[row]> + <grad_B[b], B[row]>.
template <typename T>
__global__ void __launch_bounds__(THREADS) dots(MixFactorsBackward p, Tiles tiles, float* partial) {
  __shared__ float scratch[WARPS];
  const int64_t pairs = p.samples * p.P, pair = blockIdx.x % pairs;
  const int64_t sample = pair / p.P, row = p.index[pair];
  const bool first = blockIdx.x / pairs < tiles.A;
  const int64_t begin = (blockIdx.x / pairs - (first ? 0 : tiles.A)) * SLICE;
  const int64_t size = first ? p.size_A : p.size_B;
  const T* grad = static_cast<const T*>(first ? p.grad_A : p.grad_B) + sample * size + begin;
  const T* factor = static_cast<const T*>(first ? p.A : p.B) + row * (first ? p.stride_A : p.stride_B) + begin;
  const int64_t width = size - begin < SLICE ? size - begin : SLICE;
  const float total = block_sum(dot(grad, factor, width, first ? tiles.vector_A : tiles.vector_B), scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(THREADS) sum_tiles(const float* partial, float* out, int64_t pairs, int64_t tiles) {
  const int64_t pair = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (pair >= pairs) return;
  float total = 0.0f;
  for (int64_t tile = 0; tile < tiles; tile++) total += partial[tile * pairs + pair];
  out[pair] = total;
}

Rows rows_of(Type type, const void* from, void* to, int64_t size, int64_t apart) {
  return {from, to, size, apart, aligned(16, type, from, size, apart) && aligned(16, type, to)};
}

void launch_add_up(Type type, AddUp p, cudaStream_t stream) {
  by_type(type, [&](auto number) {
    using T = decltype(number);
    const int64_t wide = THREADS * columns_of<T>;
    p.first_tiles = divide_up(p.first.size, wide);
    const int64_t grid = (p.first_tiles + divide_up(p.second.size, wide)) * p.rows;
    launch("mix_factors add_up", add_up<T>, blocks("mix_factors add_up", grid), THREADS, stream, p);
  });
}

int64_t tiles_of(const MixFactorsBackward& p) { return divide_up(p.size_A, SLICE) + divide_up(p.size_B, SLICE); }

int64_t strength_count(const MixFactorsBackward& p) { return p.to_A || p.to_B ? p.N * p.samples : 0; }

}  // namespace

void mix_factors(const MixFactors& p, cudaStream_t stream) {
  AddUp sum{};
  sum.first = rows_of(p.type, p.A, p.A_mix, p.size_A, p.stride_A);
  sum.second = rows_of(p.type, p.B, p.B_mix, p.size_B, p.stride_B);
  sum.rows = p.samples;
  sum.terms = p.P;
  sum.weight = p.coefficient;
  sum.index = p.index;
  launch_add_up(p.type, sum, stream);
}

int64_t mix_factors_backward_workspace(const MixFactorsBackward& p) {
  return (strength_count(p) + (p.to_coefficient ? tiles_of(p) * p.samples * p.P : 0)) * int64_t(sizeof(float));
}

void mix_factors_backward(const MixFactorsBackward& p, cudaStream_t stream) {
  float* strength = static_cast<float*>(p.workspace);
  if (p.to_A || p.to_B) {
    const unsigned grid = blocks("mix_factors strengths", divide_up(p.N, THREADS) * p.samples);
    launch("mix_factors strengths", strengths, grid, THREADS, stream, p, strength);
    AddUp sum{};  // a size of 0 for what is not wanted
    if (p.to_A) sum.first = rows_of(p.type, p.grad_A, p.to_A, p.size_A, p.size_A);
    if (p.to_B) sum.second = rows_of(p.type, p.grad_B, p.to_B, p.size_B, p.size_B);
    sum.rows = p.N;
    sum.terms = p.samples;
    sum.weight = strength;
    launch_add_up(p.type, sum, stream);
  }
  if (p.to_coefficient) {
    const int64_t pairs = p.samples * p.P;
    float* partial = strength + strength_count(p);
    Tiles tiles{};
    tiles.A = divide_up(p.size_A, SLICE);
    tiles.B = divide_up(p.size_B, SLICE);
    tiles.vector_A = aligned(16, p.type, p.A, p.stride_A, p.size_A) && aligned(16, p.type, p.grad_A);
    tiles.vector_B = aligned(16, p.type, p.B, p.stride_B, p.size_B) && aligned(16, p.type, p.grad_B);
    by_type(p.type, [&](auto number) {
      const unsigned grid = blocks("mix_factors dots", tiles_of(p) * pairs);
      launch("mix_factors dots", dots<decltype(number)>, grid, THREADS, stream, p, tiles, partial);
    });
    const unsigned grid = blocks("mix_factors sum_tiles", divide_up(pairs, THREADS));
    launch("mix_factors sum_tiles", sum_tiles, grid, THREADS, stream, partial, p.to_coefficient, pairs, tiles_of(p));
  }
}

}  // namespace cllava::cuda

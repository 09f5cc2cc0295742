// merge: out = W0 + scale * sum_p coefficient_p * B_p^T A_p, with one rounding.
//
// A block computes a tile of `out`; DEPTH of the K = P * R rows of A and B at a time lie in shared memory, as float32,
// those of B times their coefficient. Rows whose coefficient is 0 are padding and are not read.
#include "launch.cuh"
#include "numbers.cuh"
#include "ops.cuh"

namespace cllava::cuda {
namespace {

constexpr int THREADS = 256, DEPTH = 16;
constexpr int HIGH = 64, WIDE = 128;            // tile of out
constexpr int SIDE = 4;                         // a thread has SIDE rows and two times SIDE columns of it
constexpr int ACROSS = WIDE / (2 * SIDE);       // threads along a row of the tile
static_assert(THREADS == ACROSS * HIGH / SIDE);

// COUNT columns from `first` on of DEPTH rows of a factor, which begin at `row`, perhaps weighted; 0 beyond the width.
template <int COUNT, typename F>
__device__ __forceinline__ void fetch(const void* factor, const int64_t (&row)[DEPTH], const float (&weight)[DEPTH],
                                      bool weighted, int64_t first, int64_t width, float (&to)[DEPTH][COUNT]) {
#pragma unroll 4
  for (int i = threadIdx.x; i < DEPTH * COUNT; i += THREADS) {
    const int depth = i / COUNT;
    const int64_t column = first + i % COUNT;
    float value = 0.0f;
    if (weight[depth] != 0.0f && column < width) {
      value = number(static_cast<const F*>(factor)[row[depth] + column]) * (weighted ? weight[depth] : 1.0f);
    }
    to[depth][i % COUNT] = value;
  }
}

template <typename T, typename F>
__global__ void __launch_bounds__(THREADS) add_product(Merge p, bool vector) {
  alignas(16) __shared__ float A[DEPTH][WIDE];
  alignas(16) __shared__ float B[DEPTH][HIGH];
  __shared__ int64_t A_row[DEPTH], B_row[DEPTH];
  __shared__ float weight[DEPTH];
  const unsigned tiles = unsigned((p.d_in + WIDE - 1) / WIDE), R = unsigned(p.R), K = unsigned(p.P) * R;
  const int64_t left = int64_t(blockIdx.x % tiles) * WIDE, top = int64_t(blockIdx.x / tiles) * HIGH;
  const int x = threadIdx.x % ACROSS * SIDE, y = threadIdx.x / ACROSS * SIDE;
  float total[SIDE][2][SIDE] = {};
  for (unsigned k = 0; k < K; k += DEPTH) {
    if (threadIdx.x < DEPTH) {
      const unsigned pair = (k + threadIdx.x) / R, r = (k + threadIdx.x) % R;
      const int64_t n = pair < p.P ? p.index[pair] : 0;
      weight[threadIdx.x] = pair < p.P ? p.coefficient[pair] * p.scale : 0.0f;
      A_row[threadIdx.x] = n * p.A_stride_n + r * p.A_stride_r;
      B_row[threadIdx.x] = n * p.B_stride_n + r * p.B_stride_r;
    }
    __syncthreads();
    fetch<WIDE, F>(p.A, A_row, weight, false, left, p.d_in, A);
    fetch<HIGH, F>(p.B, B_row, weight, true, top, p.d_out, B);
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < DEPTH; depth++) {
      float a[2][SIDE], b[SIDE];
      load(&A[depth][x], a[0]);
      load(&A[depth][WIDE / 2 + x], a[1]);
      load(&B[depth][y], b);
#pragma unroll
      for (int i = 0; i < SIDE; i++) {
#pragma unroll
        for (int j = 0; j < 2 * SIDE; j++) {
          total[i][j / SIDE][j % SIDE] = __fmaf_rn(b[i], a[j / SIDE][j % SIDE], total[i][j / SIDE][j % SIDE]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
    const int64_t high = top + y + i;
    if (high >= p.d_out) break;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t column = left + half * (WIDE / 2) + x;
      float value[SIDE];
      load(vector, static_cast<const T*>(p.weight) + high * p.weight_stride + column, p.d_in - column, value);
#pragma unroll
      for (int j = 0; j < SIDE; j++) value[j] += total[i][half][j];
      store(vector, static_cast<T*>(p.out) + high * p.d_in + column, p.d_in - column, value);
    }
  }
}

}  // namespace

void merge(const Merge& p, cudaStream_t stream) {
  const int64_t bytes = SIDE * size_of(p.type);
  const bool vector = aligned(bytes, p.type, p.weight, p.weight_stride) && aligned(bytes, p.type, p.out, p.d_in);
  const unsigned grid = blocks("merge", divide_up(p.d_out, HIGH) * divide_up(p.d_in, WIDE));
  by_types(p.type, p.factor_type, [&](auto number, auto factor) {
    launch("merge", add_product<decltype(number), decltype(factor)>, grid, THREADS, stream, p, vector);
  });
}

}  // namespace cllava::cuda

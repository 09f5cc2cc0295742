// inject_add for few tokens a sample: y += scale * sum_p coefficient_p * B_p^T (A_p x), in place.
//
// `shrink` projects a sample's tokens on its K = P * R rows of A, `expand` adds the weighted rows of B; between them
// stand float32 sums [B, splits, S, K]. Both read each factor row once for all tokens of the sample, and none whose
// coefficient is 0: that is padding.
//
// `one_launch` is for decoding, where a GPU waits for each launch: one token, and a count of the blocks that are done
// with a sample, so that the last one may add up what all have left in float32 [B, groups, d_out].
#include "launch.cuh"
#include "numbers.cuh"
#include "ops.cuh"
#include "threads.cuh"

namespace cllava::cuda {
namespace {

constexpr int ROWS = 4;  // of A that a warp of `shrink` takes
constexpr int SHRINK_WARPS = 2;
constexpr int ENOUGH_WARPS = 64;  // of `shrink` for one sample: with fewer, d_in is split
constexpr int EXPAND_WARPS = 8;
constexpr int EXPAND_THREADS = EXPAND_WARPS * WARP;

struct Splits {
  int64_t groups;   // of ROWS rows
  int64_t count;
  int64_t columns;  // of each
};

template <typename F>
__device__ __forceinline__ const F* factor_row(const void* factor, int64_t n, int64_t r, int64_t stride_n,
                                               int64_t stride_r) {
  return static_cast<const F*>(factor) + n * stride_n + r * stride_r;
}

template <typename T, typename F, int TOKENS, bool VECTOR, int ROWS>
__device__ __forceinline__ void project(const InjectAdd& p, const T* x, const F* const (&row)[ROWS], int64_t begin,
                                        int64_t end, float (&total)[TOKENS * ROWS]) {
  constexpr int COLUMNS = 16 / sizeof(T), STEP = WARP * COLUMNS;
  const auto add = [&](int64_t column) {
    float a[ROWS][COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if constexpr (VECTOR) {
        load(row[r] + column, a[r]);
      } else {
        load_some(row[r] + column, end - column, a[r]);
      }
    }
    const T* token = x + column;
#pragma unroll
    for (int s = 0; s < TOKENS; s++) {
      float part[COLUMNS];
      if constexpr (VECTOR) {
        load(token, part);
      } else {
        load_some(token, end - column, part);
      }
      if (s + 1 < p.S) token += p.x_stride_s;  // beyond the last token: that one again
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          total[s * ROWS + r] = __fmaf_rn(a[r][c], part[c], total[s * ROWS + r]);
        }
      }
    }
  };
  const int64_t first = begin + threadIdx.x % WARP * COLUMNS;
  if constexpr (ROWS == 1) {
#pragma unroll 4  // loads that do not wait for each other, which several rows have anyway
    for (int64_t column = first; column < end; column += STEP) add(column);
  } else {
    for (int64_t column = first; column < end; column += STEP) add(column);
  }
}

// low[b, split, s, k] = x[b, s] along row k, over the columns of one split. Undefined where row k has coefficient 0.
template <typename T, typename F, int TOKENS>
__global__ void __launch_bounds__(SHRINK_WARPS * WARP, TOKENS == 16 ? 4 : 8) shrink(InjectAdd p, Splits splits, bool vector, float* low) {
  const int lane = threadIdx.x % WARP;
  const unsigned which = blockIdx.x * SHRINK_WARPS + threadIdx.x / WARP;
  const unsigned groups = unsigned(splits.groups), count = unsigned(splits.count), R = unsigned(p.R);
  const int64_t sample = which / groups / count, split = which / groups % count;
  if (sample >= p.samples) return;  // the whole warp
  const unsigned first = which % groups * ROWS, K = unsigned(p.P) * R;
  const F* row[ROWS] = {};
  const F* any = nullptr;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const unsigned k = first + r;
    const int64_t pair = sample * p.P + k / R;
    if (k < K && p.coefficient[pair] * p.scale != 0.0f) {
      any = row[r] = factor_row<F>(p.A, p.index[pair], k % R, p.A_stride_n, p.A_stride_r);
    }
  }
  if (!any) return;  // the whole warp
#pragma unroll
  for (int r = 0; r < ROWS; r++) row[r] = row[r] ? row[r] : any;  // a row that is read anyway; nobody reads the sum
  const T* x = static_cast<const T*>(p.x) + sample * p.x_stride_b;
  const int64_t begin = split * splits.columns;
  const int64_t end = begin + splits.columns < p.d_in ? begin + splits.columns : p.d_in;
  float total[TOKENS * ROWS] = {};
  if (vector) {
    project<T, F, TOKENS, true>(p, x, row, begin, end, total);
  } else {
    project<T, F, TOKENS, false>(p, x, row, begin, end, total);
  }
  warp_sums(total, lane);
  if (lane % lanes_alike<TOKENS * ROWS> != 0) return;
#pragma unroll
  for (int i = 0; i < left_of<TOKENS * ROWS>; i++) {
    const int place = first_of<TOKENS * ROWS>(lane) + i;
    const unsigned s = place / ROWS, k = first + place % ROWS;
    if (s < p.S && k < K) low[((sample * count + split) * p.S + s) * K + k] = total[i];
  }
}

// A block for a tile of columns of one sample: its warps share the rows of B, then add up their sums in order.
template <typename T, typename F, int TOKENS>
__global__ void __launch_bounds__(EXPAND_THREADS) expand(InjectAdd p, Splits splits, bool vector, const float* low) {
  constexpr int COLUMNS = 16 / sizeof(F), TILE = WARP * COLUMNS, UNROLL = TOKENS == 16 ? 2 : 4;
  __shared__ const F* row[EXPAND_THREADS];
  __shared__ float weight[EXPAND_THREADS][TOKENS];
  __shared__ float partial[EXPAND_WARPS][TILE];
  __shared__ int scratch[EXPAND_WARPS];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const unsigned tiles = unsigned((p.d_out + TILE - 1) / TILE), R = unsigned(p.R), K = unsigned(p.P) * R;
  const int64_t sample = blockIdx.x / tiles, tile = int64_t(blockIdx.x % tiles) * TILE;
  const int64_t column = tile + lane * COLUMNS;
  float total[TOKENS][COLUMNS] = {};
  for (unsigned first = 0; first < K; first += EXPAND_THREADS) {
    const unsigned k = first + threadIdx.x;
    const int64_t pair = sample * p.P + k / R;
    const float strength = k < K ? p.coefficient[pair] * p.scale : 0.0f;
    int count;
    const int place = block_place(strength != 0.0f, count, scratch);
    if (strength != 0.0f) {
      row[place] = factor_row<F>(p.B, p.index[pair], k % R, p.B_stride_n, p.B_stride_r);
#pragma unroll
      for (int s = 0; s < TOKENS; s++) {
        float sum = 0.0f;
        for (int64_t split = 0; s < p.S && split < splits.count; split++) {
          sum += low[((sample * splits.count + split) * p.S + s) * K + k];
        }
        weight[place][s] = strength * sum;
      }
    }
    __syncthreads();
    if (column < p.d_out && vector) {
#pragma unroll UNROLL
      for (int i = warp; i < count; i += EXPAND_WARPS) {
        float part[COLUMNS];
        load(row[i] + column, part);
#pragma unroll
        for (int s = 0; s < TOKENS; s++) {
#pragma unroll
          for (int c = 0; c < COLUMNS; c++) total[s][c] = __fmaf_rn(weight[i][s], part[c], total[s][c]);
        }
      }
    } else if (column < p.d_out) {
      for (int i = warp; i < count; i += EXPAND_WARPS) {
        float part[COLUMNS];
        load_some(row[i] + column, p.d_out - column, part);
#pragma unroll
        for (int s = 0; s < TOKENS; s++) {
#pragma unroll
          for (int c = 0; c < COLUMNS; c++) total[s][c] = __fmaf_rn(weight[i][s], part[c], total[s][c]);
        }
      }
    }
  }
  T* y = static_cast<T*>(p.y) + sample * p.S * p.d_out;
#pragma unroll
  for (int s = 0; s < TOKENS; s++) {
    if (s < p.S) {
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) partial[warp][lane * COLUMNS + c] = total[s][c];
      __syncthreads();
      const int64_t mine = tile + threadIdx.x;
      if (threadIdx.x < TILE && mine < p.d_out) {
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < EXPAND_WARPS; other++) sum += partial[other][threadIdx.x];
        put(y + s * p.d_out + mine, number(y[s * p.d_out + mine]) + sum);
      }
      __syncthreads();
    }
  }
}

// A block for WARPS of a sample's K rows: each warp projects the token on one of A, then all add the rows of B.
template <typename T, typename F, int WARPS>
__global__ void __launch_bounds__(WARPS * WARP) one_launch(InjectAdd p, unsigned groups, bool vector_A, bool vector_B,
                                                           bool vector_y, float* partial) {
  constexpr int COLUMNS = 16 / sizeof(F), UNROLL = 4;
  constexpr int64_t STEP = WARPS * WARP * COLUMNS;
  __shared__ const F* row[WARPS];
  __shared__ float weight[WARPS];
  __shared__ int rows;
  __shared__ bool last;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const unsigned R = unsigned(p.R), k = blockIdx.x % groups * WARPS + warp;
  const int64_t sample = blockIdx.x / groups, pair = sample * p.P + k / R;
  const float strength = k < unsigned(p.P) * R ? p.coefficient[pair] * p.scale : 0.0f;
  float total[1] = {};
  if (strength != 0.0f) {  // the whole warp
    const F* const one[1] = {factor_row<F>(p.A, p.index[pair], k % R, p.A_stride_n, p.A_stride_r)};
    const T* x = static_cast<const T*>(p.x) + sample * p.x_stride_b;
    if (vector_A) {
      project<T, F, 1, true>(p, x, one, 0, p.d_in, total);
    } else {
      project<T, F, 1, false>(p, x, one, 0, p.d_in, total);
    }
    total[0] = warp_sum(total[0]);
  }
  if (lane == 0) {
    row[warp] = strength != 0.0f ? factor_row<F>(p.B, p.index[pair], k % R, p.B_stride_n, p.B_stride_r) : nullptr;
    weight[warp] = strength * total[0];
  }
  __syncthreads();
  if (warp == 0) {  // those that act move together
    const F* const mine = lane < WARPS ? row[lane] : nullptr;
    const float own = lane < WARPS ? weight[lane] : 0.0f;
    const unsigned kept = __ballot_sync(ALL, mine != nullptr);
    __syncwarp();  // all have read
    if (mine != nullptr) {
      const int place = __popc(kept & ((1u << lane) - 1));
      row[place] = mine;
      weight[place] = own;
    }
    if (lane == 0) rows = __popc(kept);
  }
  __syncthreads();
  T* y = static_cast<T*>(p.y) + sample * p.d_out;
  const auto add = [&](int64_t column, const float(&sum)[COLUMNS]) {
    float value[COLUMNS];
    load(vector_y, y + column, p.d_out - column, value);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) value[c] += sum[c];
    store(vector_y, y + column, p.d_out - column, value);
  };
  float* const mine = partial + int64_t(blockIdx.x) * p.d_out;
  for (int64_t column = threadIdx.x * COLUMNS; column < p.d_out; column += STEP) {
    float sum[COLUMNS] = {};
#pragma unroll UNROLL
    for (int i = 0; i < rows; i++) {
      float part[COLUMNS];
      load(vector_B, row[i] + column, p.d_out - column, part);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) sum[c] = __fmaf_rn(weight[i], part[c], sum[c]);
    }
    if (groups == 1) {
      add(column, sum);
    } else {
      store(vector_B, mine + column, p.d_out - column, sum);
    }
  }
  if (groups == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(p.arrived + sample, 1) == int(groups) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const float* const every = partial + sample * groups * p.d_out;
  for (int64_t column = threadIdx.x * COLUMNS; column < p.d_out; column += STEP) {
    float sum[COLUMNS] = {};
#pragma unroll UNROLL
    for (unsigned group = 0; group < groups; group++) {  // in order, whichever block is the last
      float part[COLUMNS];
      const float* from = every + group * p.d_out + column;
      if (vector_B) {
        load<COLUMNS, PastL1>(from, part);
      } else {
        load_some<COLUMNS, PastL1>(from, p.d_out - column, part);
      }
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) sum[c] += part[c];
    }
    add(column, sum);
  }
  if (threadIdx.x == 0) p.arrived[sample] = 0;
}

// Rows of a block: many leave fewer sums, few fill the GPU where there are not many.
int warps_at_once(const InjectAdd& p) { return p.P * p.R <= 128 ? 8 : 16; }

int64_t groups_of(const InjectAdd& p) { return divide_up(p.P * p.R, warps_at_once(p)); }

bool in_one_launch(const InjectAdd& p) { return p.arrived != nullptr && p.S == 1; }

template <typename T, typename F, int WARPS>
void launch_one(const InjectAdd& p, cudaStream_t stream) {
  const bool vector_A = aligned(16, p.type, p.x, p.x_stride_b, p.d_in) &&
                        aligned(16, p.factor_type, p.A, p.A_stride_n, p.A_stride_r);
  // a thread's columns, of B and of the sums, are whole where those of y are
  const bool vector_B = aligned(16, p.factor_type, p.B, p.B_stride_n, p.B_stride_r, p.d_out);
  const bool vector_y = aligned(16 / int64_t(sizeof(F)) * int64_t(sizeof(T)), p.type, p.y, p.d_out);
  const int64_t groups = groups_of(p);
  launch("inject_add one token", one_launch<T, F, WARPS>, blocks("inject_add one token", p.samples * groups),
         WARPS * WARP, stream, p, unsigned(groups), vector_A, vector_B, vector_y, static_cast<float*>(p.workspace));
}

Splits splits_of(const InjectAdd& p) {
  const int64_t step = WARP * 16 / size_of(p.type), steps = divide_up(p.d_in, step);
  Splits splits{};
  splits.groups = divide_up(p.P * p.R, ROWS);
  // by K and d_in alone, not by how many samples there are: a sample's sum does not notice the batch around it
  const int64_t wanted = divide_up(ENOUGH_WARPS, splits.groups), most = divide_up(steps, 2);
  splits.columns = divide_up(steps, wanted < most ? wanted : most) * step;
  splits.count = divide_up(p.d_in, splits.columns);
  return splits;
}

template <typename T, typename F, int TOKENS>
void launch_both(const InjectAdd& p, cudaStream_t stream) {
  const Splits splits = splits_of(p);
  float* low = static_cast<float*>(p.workspace);
  const bool vector_A = aligned(16, p.type, p.x, p.x_stride_b, p.x_stride_s, p.d_in) &&
                        aligned(16, p.factor_type, p.A, p.A_stride_n, p.A_stride_r);
  const int64_t warps = p.samples * splits.count * splits.groups;
  launch("inject_add shrink", shrink<T, F, TOKENS>, blocks("inject_add shrink", divide_up(warps, SHRINK_WARPS)),
         SHRINK_WARPS * WARP, stream, p, splits, vector_A, low);
  const bool vector_B = aligned(16, p.factor_type, p.B, p.B_stride_n, p.B_stride_r, p.d_out);
  const int64_t tiles = p.samples * divide_up(p.d_out, WARP * 16 / int64_t(sizeof(F)));
  launch("inject_add expand", expand<T, F, TOKENS>, blocks("inject_add expand", tiles), EXPAND_THREADS, stream, p,
         splits, vector_B, low);
}

}  // namespace

int64_t inject_add_workspace(const InjectAdd& p) {
  if (in_one_launch(p)) return groups_of(p) == 1 ? 0 : p.samples * groups_of(p) * p.d_out * int64_t(sizeof(float));
  return p.samples * splits_of(p).count * p.S * p.P * p.R * int64_t(sizeof(float));
}

void inject_add(const InjectAdd& p, cudaStream_t stream) {
  by_types(p.type, p.factor_type, [&](auto number, auto factor) {
    using T = decltype(number);
    using F = decltype(factor);
    if (in_one_launch(p)) {
      warps_at_once(p) == 8 ? launch_one<T, F, 8>(p, stream) : launch_one<T, F, 16>(p, stream);
    } else if (p.S == 1) {
      launch_both<T, F, 1>(p, stream);
    } else if (p.S <= 4) {
      launch_both<T, F, 4>(p, stream);
    } else {
      launch_both<T, F, 16>(p, stream);
    }
  });
}

}  // namespace cllava::cuda

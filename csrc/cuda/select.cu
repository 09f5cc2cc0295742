// select: one launch for a small pool, a scan and a merge for a large one; by batch, the mean query before them. The
// block that finishes a sample can add the contextual coefficients: select_aggregate.
//
// A (query, key) product is a chain of float32 fmas over fixed columns for each lane, then a fixed tree over lanes, so a
// similarity depends on nothing but its two vectors: not on the batch, not on where the key lies or how it is aligned.
// Similarity and row are packed into one integer that orders by similarity, then by lowest row: a top-M of distinct
// integers has one answer, however the pool was cut.
#include "aggregate.cuh"
#include "launch.cuh"
#include "numbers.cuh"
#include "ops.cuh"
#include "select.cuh"
#include "threads.cuh"

namespace cllava::cuda {
namespace {

constexpr int COLUMNS = SELECT_COLUMNS, STEP = WARP * COLUMNS;
constexpr int KEYS = 4;              // that a warp takes at a time
constexpr int ROUND = 128;           // keys whose similarities wait in shared memory to be ranked
constexpr int MERGE_WARPS = 8;
constexpr int MOST_SLICES = 800;     // blocks for each tile of queries, a few for each multiprocessor of a large GPU
constexpr int64_t ONE_LAUNCH_ROWS = 2048;
// One block reads the whole pool of a one-launch call, from L2 for all queries but the first: a few microseconds for
// this many entries in float32, the price of the second launch.
constexpr int64_t ONE_LAUNCH_ENTRIES = int64_t(1) << 17;

// Sixteen queries hold 64 sums in each lane: small blocks, three of them on a multiprocessor.
template <int QUERIES>
constexpr int warps_of = QUERIES == 1 ? 16 : QUERIES == 4 ? 8 : 4;
template <int QUERIES>
constexpr int blocks_at_once = QUERIES == 1 ? 1 : QUERIES == 4 ? 2 : 3;

struct Cut {
  int64_t copies;       // samples that get each selection
  int64_t slice_rows;
  int64_t slices;
  uint64_t* candidates;  // [B, slices, M], or null if there is one slice, which has one query a block
  bool unit;             // the only query's chunks need no division by their norm
  bool vector;           // rows and chunks are aligned for loads of COLUMNS numbers
};

// Integers that order by similarity, then by lowest row; a NaN comes first, as torch sorts it. None is 0.
__device__ __forceinline__ uint64_t pack_rank(float similarity, int64_t row) {
  if (similarity == 0.0f) similarity = 0.0f;  // -0 equals 0
  const unsigned bits = similarity != similarity ? 0x7fc00000u : __float_as_uint(similarity);
  const unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(order) << 32 | (0xffffffffu - unsigned(row));
}

__device__ __forceinline__ float similarity_of(uint64_t rank) {
  const unsigned order = unsigned(rank >> 32);
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ int64_t row_of(uint64_t rank) { return 0xffffffffu - unsigned(rank); }

// The highest ranks so far, descending, across a warp: lane l holds places l and 32 + l. 0 is an empty place.
struct TopM {
  uint64_t near = 0, far = 0;

  // Each lane offers one rank, or 0.
  __device__ __forceinline__ void offer(uint64_t rank, int M, int lane) {
    uint64_t last = lowest(M);
    unsigned waiting = __ballot_sync(ALL, rank > last);
    while (waiting) {
      const int from = __ffs(waiting) - 1;
      insert(__shfl_sync(ALL, rank, from), M, lane);
      last = lowest(M);
      waiting = __ballot_sync(ALL, rank > last) & (0xfffffffeu << from);
    }
  }

 private:
  __device__ __forceinline__ uint64_t lowest(int M) const {
    return M <= WARP ? __shfl_sync(ALL, near, M - 1) : __shfl_sync(ALL, far, M - 1 - WARP);
  }

  __device__ __forceinline__ void insert(uint64_t rank, int M, int lane) {
    if (M > WARP) {
      const uint64_t pushed = __shfl_sync(ALL, near, WARP - 1);
      const uint64_t coming = rank > pushed ? pushed : rank;
      shift_in(far, coming, lane);
    }
    shift_in(near, rank, lane);
  }

  // What is lower moves down a place; a rank below all changes nothing.
  static __device__ __forceinline__ void shift_in(uint64_t& held, uint64_t rank, int lane) {
    const int place = __popc(__ballot_sync(ALL, held > rank));
    const uint64_t above = __shfl_up_sync(ALL, held, 1);
    if (lane == place) held = rank;
    if (lane > place) held = above;
  }
};

// Similarities of KEYS keys from `first` and QUERIES samples from `query`, by one warp.
template <typename T, int QUERIES, bool VECTOR>
__device__ __forceinline__ void similarities(const Select& p, const float* query, int samples, int64_t first,
                                             const float (&query_norm)[QUERIES][SELECT_MOST_GROUPS],
                                             float (&score)[QUERIES][ROUND], bool unit, int column, int lane) {
  constexpr int COUNT = QUERIES * KEYS, LEFT = left_of<COUNT>;
  const int64_t chunk = p.D / p.groups;
  const T* key[KEYS];
#pragma unroll
  for (int k = 0; k < KEYS; k++) {
    const int64_t row = first + k < p.N ? first + k : p.N - 1;
    key[k] = static_cast<const T*>(p.keys) + row * p.key_stride;
  }
  float total[LEFT] = {};
  for (int group = 0; group < p.groups; group++) {
    float product[COUNT] = {}, key_square[KEYS] = {}, query_square = 0.0f;
    for (int64_t start = lane * COLUMNS; start < chunk; start += STEP) {
      const int64_t at = group * chunk + start, left = chunk - start;
      float k_part[KEYS][COLUMNS];
#pragma unroll
      for (int k = 0; k < KEYS; k++) {
        if constexpr (VECTOR) {
          load<COLUMNS, PastL1>(key[k] + at, k_part[k]);
        } else {
          load_some<COLUMNS, PastL1>(key[k] + at, left, k_part[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < KEYS; k++) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) key_square[k] = __fmaf_rn(k_part[k][i], k_part[k][i], key_square[k]);
      }
      const float* q_row = query + at;
#pragma unroll
      for (int q = 0; q < QUERIES; q++) {
        float q_part[COLUMNS];
        if constexpr (VECTOR) {
          load<COLUMNS>(q_row, q_part);
        } else {
          load_some<COLUMNS>(q_row, left, q_part);
        }
        if (q + 1 < samples) q_row += p.D;  // beyond the batch: its last sample again
        if constexpr (QUERIES == 1) {
#pragma unroll
          for (int i = 0; i < COLUMNS; i++) query_square = __fmaf_rn(q_part[i], q_part[i], query_square);
        }
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
#pragma unroll
          for (int i = 0; i < COLUMNS; i++) {
            product[q * KEYS + k] = __fmaf_rn(q_part[i], k_part[k][i], product[q * KEYS + k]);
          }
        }
      }
    }
    warp_sums(product, lane);
    warp_sums(key_square, lane);
    const float key_norm = __fsqrt_rn(key_square[0]);
    float only_norm = 1.0f;
    if (QUERIES == 1 && !unit) only_norm = __fsqrt_rn(warp_sum(query_square));  // chunk_norm, to the bit
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
      const int which = first_of<COUNT>(lane) + i;
      const float norm = __shfl_sync(ALL, key_norm, which % KEYS * lanes_alike<KEYS>);
      const float cosine = over_norm(over_norm(product[i], norm), QUERIES == 1 ? only_norm : query_norm[which / KEYS][group]);
      total[i] = __fadd_rn(total[i], cosine);
    }
  }
  if (lane % lanes_alike<COUNT> == 0) {
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
      const int which = first_of<COUNT>(lane) + i;
      score[which / KEYS][column + which % KEYS] = __fdiv_rn(total[i], float(p.groups));
    }
  }
}

// The selected rows of one sample, as the coefficients of earlier rows need them.
struct Chosen {
  float weight[2 * WARP];
  int64_t task[2 * WARP];
};

// Weights of a finished selection, for the `copies` samples from `sample` on that share it. By one warp. With TAIL they
// are select_aggregate's, here and below.
template <bool TAIL>
__device__ __forceinline__ void put_selected(const Select& p, const TopM& best, int64_t sample, int64_t copies,
                                             int lane, Chosen& chosen) {
  const uint64_t rank[2] = {best.near, best.far};
  float value[2], positive[2], usable[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const bool exists = lane + i * WARP < p.M;
    value[i] = similarity_of(rank[i]);
    positive[i] = exists && (value[i] > 0.0f || value[i] != value[i]) ? value[i] : 0.0f;
    // all of them, unless the caller skipped the count of allowed rows
    usable[i] = exists && value[i] != -INFINITY ? 1.0f : 0.0f;
  }
  const float total = warp_sum(__fadd_rn(positive[0], positive[1]));
  const float count = warp_sum(usable[0] + usable[1]);
  const bool uniform = total < SELECT_SUM_FLOOR;
  float share[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    share[i] = uniform ? __fdiv_rn(usable[i], count > 1.0f ? count : 1.0f) : __fdiv_rn(positive[i], total);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int place = lane + i * WARP;
    if (place >= p.M) continue;
    const int64_t row = row_of(rank[i]);
    for (int64_t copy = sample; copy < sample + copies; copy++) {
      if (TAIL) {
        p.coefficient[copy * (p.M + p.N) + place] = share[i];
        p.rows[copy * (p.M + p.N) + place] = row;
      } else {
        p.similarity[copy * p.M + place] = value[i];
        p.weight[copy * p.M + place] = share[i];
        p.index[copy * p.M + place] = row;
      }
    }
    if (TAIL) {
      chosen.weight[place] = share[i];
      chosen.task[place] = p.row_task[row];
    }
  }
}

// All outputs of a sample and its copies, by a block of WARPS warps whose first holds the selection.
template <int WARPS, bool TAIL>
__device__ __forceinline__ void finish(const Select& p, const TopM& best, int64_t sample, int64_t copies) {
  __shared__ Chosen chosen;
  if (threadIdx.x < WARP) put_selected<TAIL>(p, best, sample, copies, threadIdx.x, chosen);
  if (!TAIL) return;
  __syncthreads();
  for (int64_t n = threadIdx.x; n < p.N; n += WARPS * WARP) {
    const int64_t task = p.row_task[n];
    Past past;
    for (int m = 0; m < p.M; m++) past.add(chosen.weight[m], chosen.task[m], task, p.context, p.T);
    const float coefficient = past.coefficient(p.row_mean + n);
    for (int64_t copy = sample; copy < sample + copies; copy++) {
      p.coefficient[copy * (p.M + p.N) + p.M + n] = coefficient;
      p.rows[copy * (p.M + p.N) + p.M + n] = n;
    }
  }
}

template <typename T, int QUERIES, bool TAIL = false>
__global__ void __launch_bounds__(warps_of<QUERIES> * WARP, blocks_at_once<QUERIES>) scan(Select p, Cut cut) {
  constexpr int WARPS = warps_of<QUERIES>;
  __shared__ float query_norm[QUERIES][SELECT_MOST_GROUPS];  // for several queries
  __shared__ float score[QUERIES][ROUND];
  __shared__ uint64_t held[QUERIES][2 * WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t sample = int64_t(blockIdx.x) * QUERIES;  // neighbouring blocks read the same keys
  const int64_t begin = blockIdx.y * cut.slice_rows;
  const int64_t end = begin + cut.slice_rows < p.N ? begin + cut.slice_rows : p.N;
  const int samples = int(p.B - sample < QUERIES ? p.B - sample : QUERIES);
  const float* query = p.query + sample * p.D;
  const int64_t chunk = p.D / p.groups;
  const int groups = int(p.groups), M = int(p.M);
  for (int i = warp; QUERIES > 1 && i < QUERIES * groups; i += WARPS) {
    const int q = i / groups, group = i % groups;
    const float norm = q < samples ? chunk_norm(query + q * p.D + group * chunk, chunk, cut.vector, lane) : 1.0f;
    if (lane == 0) query_norm[q][group] = norm;
  }
  for (int i = threadIdx.x; i < QUERIES * 2 * WARP; i += WARPS * WARP) held[i / (2 * WARP)][i % (2 * WARP)] = 0;
  __syncthreads();
  for (int64_t first = begin; first < end; first += ROUND) {
    for (int column = warp * KEYS; column < ROUND && first + column < end; column += WARPS * KEYS) {
      if (cut.vector) {
        similarities<T, QUERIES, true>(p, query, samples, first + column, query_norm, score, cut.unit, column, lane);
      } else {
        similarities<T, QUERIES, false>(p, query, samples, first + column, query_norm, score, cut.unit, column, lane);
      }
    }
    __syncthreads();
    for (int q = warp; q < samples; q += WARPS) {
      TopM best{held[q][lane], held[q][WARP + lane]};
      for (int column = lane; column < ROUND; column += WARP) {
        const int64_t row = first + column;
        uint64_t rank = 0;
        if (row < end) {
          const bool may =
              !p.allowed || p.allowed[(sample + q) * p.allowed_stride_b + row * p.allowed_stride_n] != 0;
          rank = pack_rank(may ? score[q][column] : -INFINITY, row);
        }
        best.offer(rank, M, lane);
      }
      held[q][lane] = best.near;
      held[q][WARP + lane] = best.far;
    }
    __syncthreads();
  }
  if constexpr (QUERIES == 1) {
    if (!cut.candidates) return finish<WARPS, TAIL>(p, TopM{held[0][lane], held[0][WARP + lane]}, sample, cut.copies);
  }
  for (int q = warp; q < samples; q += WARPS) {
    uint64_t* to = cut.candidates + ((sample + q) * cut.slices + blockIdx.y) * M;
    if (lane < M) to[lane] = held[q][lane];
    if (WARP + lane < M) to[WARP + lane] = held[q][WARP + lane];
  }
}

template <bool TAIL>
__global__ void __launch_bounds__(MERGE_WARPS * WARP) merge_slices(Select p, Cut cut) {
  __shared__ uint64_t held[MERGE_WARPS][2 * WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, M = int(p.M);
  const int64_t count = cut.slices * M;
  const uint64_t* from = cut.candidates + blockIdx.x * count;
  TopM best;
  for (int64_t first = warp * WARP; first < count; first += MERGE_WARPS * WARP) {
    best.offer(first + lane < count ? from[first + lane] : 0, M, lane);
  }
  held[warp][lane] = best.near;
  held[warp][WARP + lane] = best.far;
  __syncthreads();
  for (int other = 1; warp == 0 && other < MERGE_WARPS; other++) {
    best.offer(held[other][lane], M, lane);
    if (M > WARP) best.offer(held[other][WARP + lane], M, lane);
  }
  finish<MERGE_WARPS, TAIL>(p, best, blockIdx.x, cut.copies);
}

// Mean over the batch of one normalised chunk: its product with a key's is the mean of the cosines.
__global__ void __launch_bounds__(MERGE_WARPS * WARP) mean_unit(Select p, bool vector, float* mean) {
  __shared__ float norm[MERGE_WARPS];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t chunk = p.D / p.groups, at = blockIdx.x * chunk;
  for (int64_t first = 0; first < p.B; first += MERGE_WARPS) {
    if (first + warp < p.B) {
      const float found = chunk_norm(p.query + (first + warp) * p.D + at, chunk, vector, lane);
      if (lane == 0) norm[warp] = found;
    }
    __syncthreads();
    const int samples = int(p.B - first < MERGE_WARPS ? p.B - first : MERGE_WARPS);
    for (int64_t column = threadIdx.x; column < chunk; column += MERGE_WARPS * WARP) {
      float total = first ? mean[at + column] : 0.0f;  // of this thread alone
      for (int b = 0; b < samples; b++) {
        total = __fadd_rn(total, over_norm(p.query[(first + b) * p.D + at + column], norm[b]));
      }
      mean[at + column] = first + samples == p.B ? __fdiv_rn(total, float(p.B)) : total;
    }
    __syncthreads();
  }
}

int queries_of(int64_t samples) { return samples == 1 ? 1 : samples <= 4 ? 4 : 16; }

int64_t slice_rows(const Select& p, int64_t samples) {
  if (p.N <= ONE_LAUNCH_ROWS && p.N * p.D <= ONE_LAUNCH_ENTRIES) return p.N;
  const int64_t pass = KEYS * (samples == 1 ? warps_of<1> : samples <= 4 ? warps_of<4> : warps_of<16>);  // keys that a block takes at a time
  return divide_up(divide_up(p.N, MOST_SLICES), pass) * pass;
}

int64_t mean_bytes(const Select& p) { return p.by_batch ? divide_up(p.D * 4, 16) * 16 : 0; }

template <typename T, int QUERIES, bool TAIL = false>
void launch_scan(const Select& p, const Cut& cut, cudaStream_t stream) {
  const dim3 grid(blocks("select scan", divide_up(p.B, QUERIES)), unsigned(cut.slices));
  launch("select scan", scan<T, QUERIES, TAIL>, grid, warps_of<QUERIES> * WARP, stream, p, cut);
}

}  // namespace

int64_t select_workspace(const Select& p) {
  const int64_t samples = p.by_batch ? 1 : p.B, slices = divide_up(p.N, slice_rows(p, samples));
  return mean_bytes(p) + (slices > 1 ? samples * slices * p.M * int64_t(sizeof(uint64_t)) : 0);
}

void select(const Select& given, cudaStream_t stream) {
  Select p = given;
  Cut cut{};
  cut.copies = 1;
  if (p.by_batch) {
    float* mean = static_cast<float*>(p.workspace);
    const bool vector = aligned(16, Type::float32, p.query, p.D / p.groups);
    launch("select mean_unit", mean_unit, unsigned(p.groups), MERGE_WARPS * WARP, stream, given, vector, mean);
    p.query = mean;
    p.B = 1;
    cut.copies = given.B;
    cut.unit = true;
  }
  cut.slice_rows = slice_rows(p, p.B);
  cut.slices = divide_up(p.N, cut.slice_rows);
  if (cut.slices > 1) {
    cut.candidates = reinterpret_cast<uint64_t*>(static_cast<char*>(p.workspace) + mean_bytes(p));
  }
  cut.vector = p.D / p.groups % COLUMNS == 0 && aligned(16, Type::float32, p.query) &&
               aligned(COLUMNS * size_of(p.type), p.type, p.keys, p.key_stride);
  const bool tail = p.coefficient != nullptr;
  by_type(p.type, [&](auto number) {
    using T = decltype(number);
    const int queries = cut.slices > 1 ? queries_of(p.B) : 1;
    if (tail && cut.slices == 1) {
      launch_scan<T, 1, true>(p, cut, stream);
    } else if (queries == 1) {
      launch_scan<T, 1>(p, cut, stream);
    } else if (queries == 4) {
      launch_scan<T, 4>(p, cut, stream);
    } else {
      launch_scan<T, 16>(p, cut, stream);
    }
  });
  if (cut.slices > 1) {
    const auto merge = tail ? merge_slices<true> : merge_slices<false>;
    launch("select merge", merge, blocks("select merge", p.B), MERGE_WARPS * WARP, stream, p, cut);
  }
}

}  // namespace cllava::cuda

// select on the CPU: keys in tiles that stay in cache, every query against a tile, a running top-M for each.
//
// A (query, key) product is the same chain of float32 operations whatever the batch and wherever the key lies, so equal
// keys get equal similarities. A similarity and its row are packed into one integer whose order is "higher similarity,
// then lower row": a top-M of distinct integers has one answer, however the pool was cut.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cllava::cpu {
namespace {

constexpr int64_t tile_rows = 128;
constexpr int64_t row_mask = (int64_t{1} << 31) - 1;
constexpr int64_t lowest = std::numeric_limits<int64_t>::min();
constexpr float sum_floor = 1e-6f;

// The length of a chunk; in float64 where a float32 sum of squares would overflow or lose what is small.
float length(const float* chunk, int64_t width, float square) {
  if (square > 1e-30f && square < 1e37f) return std::sqrt(square);
  double exact = 0;
  for (int64_t d = 0; d < width; ++d) exact += static_cast<double>(chunk[d]) * chunk[d];
  return std::sqrt(exact);
}

constexpr int64_t padding = Vectors<16>::lanes;  // the widest
int64_t padded(int64_t width) { return (width + padding - 1) / padding * padding; }

template <typename V>
constexpr int64_t queries_at_once = V::lanes == 16 ? 4 : 3;  // of whose sums 32 or 16 registers have room

CLLAVA_INLINE void add_quad(float* total, const Quad& value) {
  Quad sum;
  std::memcpy(&sum, total, sizeof sum);
  sum += value;
  std::memcpy(total, &sum, sizeof sum);
}

// dots of up to queries_at_once queries
template <typename V, int64_t count = queries_at_once<V>>
CLLAVA_INLINE void some_dots(
    int64_t queries, bool squares, const float* query, int64_t query_stride, const float* const* key, int64_t width,
    Quad* out) {
  if constexpr (count > 1)
    if (queries < count) return some_dots<V, count - 1>(queries, squares, query, query_stride, key, width, out);
  squares ? dots<V, count, true>(query, query_stride, key, width, out)
          : dots<V, count, false>(query, query_stride, key, width, out);
}

// cosines[sample, row] += unit query . key / |key| over one chunk, for the rows of a tile.
template <typename V>
CLLAVA_INLINE void add_cosines(
    const float* query, int64_t query_stride, int64_t samples, const float* keys, int64_t key_stride, int64_t rows,
    int64_t width, float* cosines) {
  constexpr int64_t together = queries_at_once<V>;
  Quad found[together + 1];
  for (int64_t row = 0; row < rows; row += keys_at_once) {
    const float* key[keys_at_once];
    Quad norm;
    const int64_t here = std::min(keys_at_once, rows - row);
    for (int64_t j = 0; j < keys_at_once; ++j)  // the last one again where there are fewer
      key[j] = keys + (row + std::min(j, here - 1)) * key_stride;
    for (int64_t b = 0, step; b < samples; b += step) {
      step = std::min(samples - b, together);
      some_dots<V>(step, b == 0, query + b * query_stride, query_stride, key, width, found);
      if (b == 0)
        for (int64_t j = 0; j < keys_at_once; ++j) norm[j] = length(key[j], width, found[step][j]);
      for (int64_t i = 0; i < step; ++i)  // past the last row there is room in the tile
        add_quad(cosines + (b + i) * tile_rows + row, norm == 0 ? Quad{} : found[i] / norm);
    }
  }
}

int64_t pack(float similarity, int64_t row) {
  if (std::isnan(similarity)) similarity = std::numeric_limits<float>::quiet_NaN();
  similarity += 0.f;  // -0 is 0
  int32_t bits;
  std::memcpy(&bits, &similarity, sizeof bits);
  if (similarity != similarity) bits = 0x7FC00000;  // ranks first, as in torch.sort
  const int64_t order = bits < 0 ? bits ^ 0x7FFFFFFF : bits;
  return order * (row_mask + 1) + (row_mask - row);
}

float similarity_of(int64_t packed) {
  if (packed == lowest) return -std::numeric_limits<float>::infinity();
  const int32_t order = static_cast<int32_t>(packed >> 31);
  const int32_t bits = order < 0 ? order ^ 0x7FFFFFFF : order;
  float similarity;
  std::memcpy(&similarity, &bits, sizeof bits);
  return similarity;
}

int64_t row_of(int64_t packed) { return row_mask - (packed & row_mask); }

// `best` [M], descending, takes `packed` in.
void keep(int64_t* best, int64_t M, int64_t packed) {
  if (packed <= best[M - 1]) return;
  int64_t at = M - 1;
  for (; at > 0 && best[at - 1] < packed; --at) best[at] = best[at - 1];
  best[at] = packed;
}

// Takes the rows of a tile in for one sample.
void take(const Select& call, int64_t b, int64_t first, int64_t rows, float* similarity, int64_t* best) {
  if (call.groups > 1)
    for (int64_t row = 0; row < rows; ++row) similarity[row] /= call.groups;
  if (call.allowed)
    for (int64_t row = 0; row < rows; ++row)
      if (!call.allowed[b * call.allowed_stride_b + (first + row) * call.allowed_stride_n])
        similarity[row] = -std::numeric_limits<float>::infinity();
  float bar = similarity_of(best[call.M - 1]);  // most rows stay below it
  for (int64_t row = 0; row < rows; ++row) {
    if (similarity[row] < bar) continue;
    keep(best, call.M, pack(similarity[row], first + row));
    bar = similarity_of(best[call.M - 1]);
  }
}

void finish(const Select& call, const int64_t* best, int64_t sample) {
  const int64_t M = call.M;
  float* similarity = call.similarity + sample * M;
  float* weight = call.weight + sample * M;
  double total = 0;  // of many, one after the other
  float usable = 0;
  for (int64_t m = 0; m < M; ++m) {
    similarity[m] = similarity_of(best[m]);
    call.index[sample * M + m] = row_of(best[m]);
    total += similarity[m] < 0 ? 0.f : similarity[m];
    usable += similarity[m] != -std::numeric_limits<float>::infinity();
  }
  for (int64_t m = 0; m < M; ++m) {
    const float positive = similarity[m] < 0 ? 0.f : similarity[m];
    const bool counts = similarity[m] != -std::numeric_limits<float>::infinity();
    weight[m] = total < sum_floor ? counts / std::max(usable, 1.f) : static_cast<float>(positive / total);
  }
}

// Unit chunks [samples, groups, padded chunk]; or their mean over the batch, as one sample.
template <typename V>
CLLAVA_INLINE void unit_queries(const Select& call, int64_t chunk, int64_t stride, float* units) {
  const float share = call.by_batch ? 1.f / call.B : 1.f;
  for (int64_t b = 0; b < call.B; ++b)
    for (int64_t g = 0; g < call.groups; ++g) {
      const float* query = call.query + b * call.D + g * chunk;
      float* unit = units + ((call.by_batch ? 0 : b) * call.groups + g) * stride;
      const float norm = length(query, chunk, dot<V>(query, query, chunk));
      if (norm != 0)
        for (int64_t d = 0; d < chunk; ++d) unit[d] += query[d] / norm * share;
    }
}

}  // namespace

void select(const Select& call) {
  const int64_t chunk = call.D / call.groups, stride = padded(chunk), M = call.M;
  const int64_t samples = call.by_batch ? 1 : call.B;
  std::vector<float> units(samples * call.groups * stride, 0.f);
  at_this_level([&](auto vectors) CLLAVA_INLINED {
    unit_queries<decltype(vectors)>(call, chunk, stride, units.data());
  });
  const float* keys = static_cast<const float*>(call.keys);
  // Each piece is one tile of keys or more, and keeps its own candidates [pieces, samples, M].
  const int64_t tiles = (call.N + tile_rows - 1) / tile_rows;
  const int64_t pieces = std::min<int64_t>(tiles, 64);
  std::vector<int64_t> candidates(pieces * samples * M, lowest);
  const int64_t cost = call.N * call.D * (samples + 1) / pieces;
  parallel_vectors(pieces, cost, [&](auto vectors, int64_t begin, int64_t end) CLLAVA_INLINED {
    std::vector<float> cosines(samples * tile_rows);
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t* best = candidates.data() + piece * samples * M;
      for (int64_t tile = piece; tile < tiles; tile += pieces) {
        const int64_t first = tile * tile_rows, rows = std::min(tile_rows, call.N - first);
        std::fill(cosines.begin(), cosines.end(), 0.f);
        for (int64_t g = 0; g < call.groups; ++g)
          add_cosines<decltype(vectors)>(
              units.data() + g * stride, call.groups * stride, samples, keys + first * call.key_stride + g * chunk,
              call.key_stride, rows, chunk, cosines.data());
        for (int64_t b = 0; b < samples; ++b) take(call, b, first, rows, cosines.data() + b * tile_rows, best + b * M);
      }
    }
  });
  for (int64_t b = 0; b < samples; ++b) {
    int64_t* best = candidates.data() + b * M;
    for (int64_t piece = 1; piece < pieces; ++piece)
      for (int64_t m = 0; m < M; ++m) keep(best, M, candidates[(piece * samples + b) * M + m]);
    for (int64_t copy = 0; copy < (call.by_batch ? call.B : 1); ++copy) finish(call, best, b + copy);
  }
}

// d cos(q, k) / dk = (q^ - cos k^) / |k|: one weighted sum of unit queries for each row, samples in order.
static CLLAVA_INLINE void row_gradient(
    const double* pull, const float* key, float* out, int64_t chunk, int64_t groups) {
  double square = 0, along = 0;
  for (int64_t d = 0; d < chunk; ++d) square += static_cast<double>(key[d]) * key[d];
  for (int64_t d = 0; d < chunk; ++d) along += pull[d] * key[d];
  const double norm = std::sqrt(square);
  for (int64_t d = 0; d < chunk; ++d)
    out[d] = norm == 0 ? 0.0 : (pull[d] - key[d] * along / square) / (norm * groups);
}

void select_backward(const SelectBackward& call) {
  const int64_t chunk = call.D / call.groups;
  const float* keys = static_cast<const float*>(call.keys);
  float* out = static_cast<float*>(call.out);
  // samples of each row, in order
  std::vector<std::vector<std::pair<int64_t, double>>> users(call.N);
  std::vector<double> inverse(call.B * call.groups);
  std::vector<double> mean(call.M);  // of the batch, which shares one selection
  for (int64_t b = 0; b < call.B; ++b)
    for (int64_t m = 0; m < call.M; ++m) mean[m] += static_cast<double>(call.grad[b * call.M + m]) / call.B;
  for (int64_t b = 0; b < call.B; ++b) {
    for (int64_t m = 0; m < call.M; ++m) {
      const int64_t at = b * call.M + m;
      users[call.index[at]].emplace_back(b, call.by_batch ? mean[m] : call.grad[at]);
    }
    for (int64_t g = 0; g < call.groups; ++g) {
      double square = 0;
      const float* query = call.query + b * call.D + g * chunk;
      for (int64_t d = 0; d < chunk; ++d) square += static_cast<double>(query[d]) * query[d];
      inverse[b * call.groups + g] = square == 0 ? 0.0 : 1.0 / std::sqrt(square);
    }
  }
  const int64_t cost = call.D * (1 + call.B * call.M / call.N);
  parallel_vectors(call.N, cost, [&](auto, int64_t begin, int64_t end) CLLAVA_INLINED {
    std::vector<double> pull(chunk);
    for (int64_t n = begin; n < end; ++n) {
      if (users[n].empty()) {
        std::fill(out + n * call.D, out + (n + 1) * call.D, 0.f);
        continue;
      }
      for (int64_t g = 0; g < call.groups; ++g) {
        std::fill(pull.begin(), pull.end(), 0.0);
        for (const auto& [b, grad] : users[n]) {
          const float* query = call.query + b * call.D + g * chunk;
          const double strength = grad * inverse[b * call.groups + g];
          for (int64_t d = 0; d < chunk; ++d) pull[d] += strength * query[d];
        }
        row_gradient(
            pull.data(), keys + n * call.key_stride + g * chunk, out + n * call.D + g * chunk, chunk, call.groups);
      }
    }
  });
}

}  // namespace cllava::cpu

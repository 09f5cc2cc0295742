// What the kernels of each op are given: raw pointers, sizes, and strides in elements. Shared by csrc/cpu and csrc/cuda.
//
// Shapes are as in the op's reference.py, which defines the result. Everything is contiguous unless it has a stride
// here; the last dimension always is. No size is 0: whoever fills a struct has dealt with empty calls.
#pragma once

#include <cstdint>

namespace cllava {

enum class Type { float32, float16, bfloat16 };

struct Select {
  const float* query;      // [B, D]
  const void* keys;        // [N, D]
  const uint8_t* allowed;  // [B, N] of 0 and 1, or null
  float* similarity;       // out [B, M]
  float* weight;           // out [B, M]
  int64_t* index;          // out [B, M]
  // select_aggregate has the last two of these instead of the three outputs above; for select all are null.
  const int64_t* row_task;  // [N]
  const float* row_mean;    // [N]
  const float* context;     // [T, T]
  float* coefficient;       // out [B, M + N]
  int64_t* rows;            // out [B, M + N]
  void* workspace;          // select_workspace() bytes, or null
  Type type;                // of keys
  int64_t B, N, D, M, groups, T;
  int64_t key_stride, allowed_stride_b, allowed_stride_n;
  bool by_batch;  // one selection for all samples, by the mean of their similarities; allowed is then [1, N]
};

struct SelectBackward {
  const float* grad;     // [B, M], of similarity
  const float* query;    // [B, D]
  const void* keys;      // [N, D]
  const int64_t* index;  // [B, M]
  void* out;             // out [N, D], of the keys' type
  Type type;             // of keys
  int64_t B, N, D, M, groups;
  int64_t key_stride;
  bool by_batch;
};

struct Aggregate {
  const int64_t* index;     // [B, M]
  const float* weight;      // [B, M]
  const int64_t* row_task;  // [N]
  const float* row_mean;    // [N]
  const float* context;     // [T, T]
  float* coefficient;       // out [B, M + N]
  int64_t* rows;            // out [B, M + N]
  int64_t B, M, N, T;
};

struct AggregateBackward {
  const float* grad;  // [B, M + N], of coefficient
  const int64_t* index;
  const float* weight;
  const int64_t* row_task;
  const float* row_mean;
  const float* context;
  float* grad_weight;   // out [B, M], or null
  float* grad_context;  // out [T, T], or null
  void* workspace;      // aggregate_backward_workspace() bytes, or null
  int64_t B, M, N, T;
};

// Rows are flattened: size_A = R * d_in and size_B = R * d_out elements, adjacent, stride_A and stride_B apart.
struct MixFactors {
  const void* A;             // [N, size_A]
  const void* B;             // [N, size_B]
  const float* coefficient;  // [samples, P]
  const int64_t* index;      // [samples, P]
  void* A_mix;               // out [samples, size_A]
  void* B_mix;               // out [samples, size_B]
  Type type;
  int64_t samples, P, N, size_A, size_B, stride_A, stride_B;
};

struct MixFactorsBackward {
  const void* grad_A;  // [samples, size_A]
  const void* grad_B;  // [samples, size_B]
  const void* A;       // [N, size_A]
  const void* B;       // [N, size_B]
  const float* coefficient;
  const int64_t* index;
  void* to_A;             // out [N, size_A], or null
  void* to_B;             // out [N, size_B], or null
  float* to_coefficient;  // out [samples, P], or null
  void* workspace;        // mix_factors_backward_workspace() bytes, or null
  Type type;
  int64_t samples, P, N, size_A, size_B, stride_A, stride_B;
};

// y += scale * increments, in place: few tokens (decoding, short prompts).
struct InjectAdd {
  const void* x;             // [B, S, d_in]
  const void* A;             // [N, R, d_in]
  const void* B;             // [N, R, d_out]
  const int64_t* index;      // [B, P]
  const float* coefficient;  // [B, P]
  void* y;                   // in and out [B, S, d_out]
  void* workspace;           // inject_add_workspace() bytes, or null
  int32_t* arrived;          // [B], zeros, and zeros again afterwards, for this call's own stream; or null
  Type type;                 // of x and y
  Type factor_type;          // of A and B: type, or float32
  float scale;
  int64_t samples, S, d_in, d_out, N, R, P;
  int64_t x_stride_b, x_stride_s;
  int64_t A_stride_n, A_stride_r, B_stride_n, B_stride_r;
};

}  // namespace cllava

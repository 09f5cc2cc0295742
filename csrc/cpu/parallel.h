// Threads: torch's own, as many as torch.set_num_threads says.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "rows.h"

namespace cllava::cpu {

// Runs body(begin, end) over [0, count), each of which costs so many operations.
template <typename Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  constexpr int64_t enough = 1 << 16;  // operations that pay for waking a thread
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, enough / std::max<int64_t>(1, cost)), body);
}

// The same with body(vectors, begin, end), a lambda that is CLLAVA_INLINED.
template <typename Body>
void parallel_vectors(int64_t count, int64_t cost, const Body& body) {
  parallel(count, cost, [&](int64_t begin, int64_t end) {
    at_this_level([&](auto vectors) CLLAVA_INLINED { body(vectors, begin, end); });
  });
}

}  // namespace cllava::cpu

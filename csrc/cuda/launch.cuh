// What launchers share: the launch itself, its error, and the choice of a kernel by the type of its numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../ops.h"

namespace cllava::cuda {

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is reported here, not once more by whoever asks next
    throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error) + " (grid " +
                             std::to_string(grid.x) + " x " + std::to_string(grid.y) + ", " + std::to_string(threads) +
                             " threads)");
  }
}

// A grid's first extent: what does not fit is refused, not cut off.
inline unsigned blocks(const char* name, int64_t count) {
  if (count > 0x7fffffff) {
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(count) +
                             " blocks, a grid has at most 2147483647. Split the call.");
  }
  return unsigned(count);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Whether `bytes` (a power of two) can be loaded at once from a pointer and from every stride (in elements) after it.
template <typename... Strides>
bool aligned(int64_t bytes, [[maybe_unused]] Type type, const void* pointer, Strides... strides) {
  const auto whole = [&](int64_t address) { return address % bytes == 0; };
  return whole(int64_t(reinterpret_cast<uintptr_t>(pointer))) && (whole(strides * size_of(type)) && ...);
}

// run(T{}) with the T that `type` names.
template <typename Run>
void by_type(Type type, const Run& run) {
  switch (type) {
    case Type::float32:
      return run(float{});
    case Type::float16:
      return run(__half{});
    case Type::bfloat16:
      return run(__nv_bfloat16{});
  }
}

// run(T{}, F{}): factors have the activations' type, or float32.
template <typename Run>
void by_types(Type type, Type factor_type, const Run& run) {
  by_type(type, [&](auto number) {
    factor_type == type ? run(number, number) : run(number, float{});
  });
}

}  // namespace cllava::cuda

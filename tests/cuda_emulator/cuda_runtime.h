// Stands in for CUDA's header when g++ compiles csrc/cuda for the tests: runs kernels on the CPU, without a GPU.
//
// One block runs at a time, blocks in random order. Its threads are fibers that give way only at barriers and warp-wide
// functions, and which of them goes on is random too (seeded; some blocks run whichever thread woke last, so that one
// warp gets far ahead), so a missing barrier shows as a wrong result. Shared memory is full of NaN when a block begins.
// std::runtime_error says where threads wait when they wait for ever: for a thread that has returned, at different
// barriers, or for a lane that a mask names and that does not come. Only what csrc/cuda uses is here.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // the module's thread-local memory holds nothing else

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;

struct Wait {  // where a thread waits, and what it brings
  const char* what;
  const char* file;
  int line;
  unsigned mask;  // of lanes; 0: the whole block
  int from;       // the lane whose value it wants, or -1 for all lanes' bits
  uint64_t value;

  bool same_place(const Wait& other) const {
    const auto same = [](const char* a, const char* b) { return a == b || !strcmp(a, b); };
    return line == other.line && mask == other.mask && same(what, other.what) && same(file, other.file);
  }
};

struct Fiber {
  enum { READY, WAITING, DONE } state;
  bool started;
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  Wait wait;
};

struct Machine {
  std::vector<Fiber> fibers{1024};
  std::vector<unsigned> ready;
  unsigned threads = 0, current = 0, order = 0;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  std::mt19937 random{0};
};
inline Machine machine;

// Fibers are entered once by setcontext, then switched by longjmp, which makes no system calls.
[[noreturn]] inline void leave() { _longjmp(machine.scheduler, 1); }

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

__attribute__((noinline)) inline void give_way(Fiber& fiber) {
  if (!_setjmp(fiber.at)) leave();
}

inline void entry() {
  (*machine.kernel)();
  machine.fibers[machine.current].state = Fiber::DONE;
  leave();
}

inline std::string describe(unsigned thread) {
  const Fiber& fiber = machine.fibers[thread];
  std::string name = "thread " + std::to_string(thread);
  if (fiber.state == Fiber::DONE) return name + " has returned";
  const Wait& wait = fiber.wait;
  return name + " waits in " + wait.what + " at " + wait.file + ":" + std::to_string(wait.line) +
         (wait.mask ? " with mask " + std::to_string(wait.mask) : "");
}

inline uint64_t wait_for_others(Wait wait) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.wait = wait;
  fiber.state = Fiber::WAITING;
  if (wait.mask && !(wait.mask >> (machine.current % WARP) & 1)) machine.error = "a lane outside its own mask";
  if (wait.mask && wait.from >= 0 && !(wait.mask >> wait.from & 1)) machine.error = "a lane reads one outside the mask";
  give_way(fiber);
  return fiber.wait.value;
}

inline void wake(unsigned thread) {
  machine.fibers[thread].state = Fiber::READY;
  machine.ready.push_back(thread);
}

// Wakes the threads that `thread` waits with, if it was the last to come.
inline void try_wake(unsigned thread) {
  const Wait wait = machine.fibers[thread].wait;
  const unsigned first = wait.mask ? thread - thread % WARP : 0;
  const unsigned end = wait.mask ? first + WARP : machine.threads;
  const auto waits = [&](unsigned other) { return !wait.mask || wait.mask >> (other - first) & 1; };
  for (unsigned other = first; other < end; other++) {
    if (!waits(other)) continue;
    if (other >= machine.threads) {
      machine.error = "lane " + std::to_string(other - first) + " is named but the block is too small for it";
      return;
    }
    const Fiber& fiber = machine.fibers[other];
    if (fiber.state != Fiber::WAITING || !fiber.wait.same_place(wait)) return;
  }
  uint64_t values[WARP] = {}, bits = 0;
  for (unsigned other = first; wait.mask && other < end; other++) {
    if (!waits(other)) continue;
    values[other - first] = machine.fibers[other].wait.value;
    bits |= uint64_t(values[other - first] != 0) << (other - first);
  }
  for (unsigned other = first; other < end; other++) {
    if (!waits(other)) continue;
    Wait& woken = machine.fibers[other].wait;
    if (wait.mask) woken.value = woken.from < 0 ? bits : values[woken.from];
    wake(other);
  }
}

inline void fill_shared_memory() {
  static thread_local char anything;  // of this module
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* mine) {
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& part = info->dlpi_phdr[i];
          char* memory = static_cast<char*>(info->dlpi_tls_data);
          if (part.p_type != PT_TLS || memory > mine || mine >= memory + part.p_memsz) continue;
          memset(memory, 0xff, part.p_memsz);
          return 1;
        }
        return 0;
      },
      &anything);
}

inline unsigned next_thread() {
  auto& ready = machine.ready;
  const size_t at = machine.order == 0 ? ready.size() - 1 : machine.random() % ready.size();
  const unsigned thread = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return thread;
}

inline void run_block() {
  fill_shared_memory();
  machine.order = machine.random() % 3;
  machine.ready.clear();
  for (unsigned thread = 0; thread < machine.threads; thread++) {
    Fiber& fiber = machine.fibers[thread];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
    wake(thread);
  }
  std::shuffle(machine.ready.begin(), machine.ready.end(), machine.random);
  while (!machine.ready.empty()) {
    const unsigned thread = machine.current = next_thread();
    threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
    resume(machine.fibers[thread]);
    if (machine.fibers[thread].state == Fiber::WAITING) try_wake(thread);
    if (!machine.error.empty()) throw std::runtime_error(machine.error + ": " + describe(thread));
  }
  for (unsigned thread = 0; thread < machine.threads; thread++) {
    if (machine.fibers[thread].state == Fiber::DONE) continue;
    for (unsigned other = 0; other < machine.threads; other++) {
      const Fiber& fiber = machine.fibers[other];
      if (fiber.state == Fiber::DONE || !fiber.wait.same_place(machine.fibers[thread].wait))
        throw std::runtime_error("deadlock: " + describe(thread) + ", " + describe(other));
    }
    throw std::runtime_error("deadlock: " + describe(thread));
  }
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!blocks || !threads || threads > 1024 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  gridDim = grid, blockDim = block;
  machine.threads = threads;
  machine.kernel = &kernel;
  machine.error.clear();
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (uint64_t i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
  }
  return cudaSuccess;
}

template <typename T>
T exchange(const char* what, unsigned mask, T value, int from, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Wait wait{what, file, line, mask, from, 0};
  memcpy(&wait.value, &value, sizeof(T));
  const uint64_t got = wait_for_others(wait);
  memcpy(&value, &got, sizeof(T));
  return value;
}

inline int lane() { return machine.current % WARP; }

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  const std::tuple<Parameters...> arguments(given...);
  return emulator::launch(*config, [&] { std::apply(kernel, arguments); });
}

#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(HERE) { emulator::wait_for_others({"__syncthreads", file, line, 0, -1, 0}); }
inline void __syncwarp(unsigned mask = ~0u, HERE) { emulator::wait_for_others({"__syncwarp", file, line, mask, -1, 0}); }
inline unsigned __ballot_sync(unsigned mask, bool bit, HERE) {
  return emulator::wait_for_others({"__ballot_sync", file, line, mask, -1, bit});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, HERE) {
  return emulator::exchange("__shfl_sync", mask, value, from % emulator::WARP, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, HERE) {
  return emulator::exchange("__shfl_xor_sync", mask, value, emulator::lane() ^ distance, file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, HERE) {
  const int lane = emulator::lane(), from = lane - int(distance);
  return emulator::exchange("__shfl_up_sync", mask, value, from < 0 ? lane : from, file, line);
}
#undef HERE

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }
inline void __threadfence() {}  // one block at a time
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

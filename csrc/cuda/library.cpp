// The one file of the CUDA library that knows torch. The ops are defined by the CPU library, which is loaded first.
//
// With CLLAVA_EMULATED the kernels run on the CPU through tests/cuda_emulator, on CPU tensors, in ops of another name.
#include "../bind.h"
#include "../schemas.h"
#include "ops.cuh"

#ifndef CLLAVA_EMULATED
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

#ifdef CLLAVA_EMULATED
struct OnDevice {
  explicit OnDevice(const cllava::Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
// Found at run time: a torch without CUDA, against which this may have been linked, has no such symbol.
cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (symbol == nullptr) cllava::refuse("this torch has no CUDA: libtorch_cuda.so is not loaded");
    return reinterpret_cast<Get>(symbol);
  }();
  void* stream = nullptr;
  if (get(device, &stream) != AOTI_TORCH_SUCCESS) cllava::refuse("no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

// The tensors' device becomes the current one, for the length of a call.
struct OnDevice {
  explicit OnDevice(const cllava::Tensor& on)
      : guard(on.get_device_index()), stream(current_stream(on.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};
#endif

using cllava::Tensor;

struct Cuda {
  static int64_t workspace(const cllava::Select& call) { return cllava::cuda::select_workspace(call); }
  static int64_t workspace(const cllava::AggregateBackward& call) {
    return cllava::cuda::aggregate_backward_workspace(call);
  }
  static int64_t workspace(const cllava::MixFactorsBackward& call) {
    return cllava::cuda::mix_factors_backward_workspace(call);
  }
  static int64_t workspace(const cllava::InjectAdd& call) { return cllava::cuda::inject_add_workspace(call); }
  template <typename Call>
  static void run(void (*kernel)(const Call&, cudaStream_t), const Call& call, const Tensor& on) {
    const OnDevice device(on);
    kernel(call, device.stream);
  }
  // The limits of ops.cuh, for a call that does not come through cllava_fast.ops.
  static void at_most(const char* name, int64_t size, int64_t most) {
    if (size > most) cllava::refuse(name, " = ", size, " is above ", most, ", the most that the kernel takes");
  }
  static void select(const cllava::Select& call, const Tensor& on) {
    at_most("M", call.M, cllava::cuda::SELECT_MOST_M);
    at_most("groups", call.groups, cllava::cuda::SELECT_MOST_GROUPS);
    at_most("N", call.N, cllava::cuda::SELECT_MOST_N);
    run(cllava::cuda::select, call, on);
  }
  static void select_backward(const cllava::SelectBackward& call, const Tensor& on) {
    at_most("D", call.D, cllava::cuda::SELECT_BACKWARD_MOST_D);
    at_most("groups", call.groups, cllava::cuda::SELECT_MOST_GROUPS);
    run(cllava::cuda::select_backward, call, on);
  }
  static void aggregate(const cllava::Aggregate& call, const Tensor& on) { run(cllava::cuda::aggregate, call, on); }
  static void aggregate_backward(const cllava::AggregateBackward& call, const Tensor& on) {
    run(cllava::cuda::aggregate_backward, call, on);
  }
  static void mix_factors(const cllava::MixFactors& call, const Tensor& on) {
    run(cllava::cuda::mix_factors, call, on);
  }
  static void mix_factors_backward(const cllava::MixFactorsBackward& call, const Tensor& on) {
    run(cllava::cuda::mix_factors_backward, call, on);
  }
  static void inject_add(const cllava::InjectAdd& call, const Tensor& on) {
    at_most("S", call.S, cllava::cuda::INJECT_ADD_MOST_S);
    at_most("P * R", call.P * call.R, 0x7fffffff);
    run(cllava::cuda::inject_add, call, on);
  }
};

}  // namespace

CLLAVA_SAYS_ITS_SCHEMAS

extern "C" __attribute__((visibility("default"))) const char* cllava_cannot_run() { return cllava::cuda::cannot_run(); }

#ifdef CLLAVA_EMULATED
STABLE_TORCH_LIBRARY(cllava_fast_emulated, library) { cllava::define(library); }
STABLE_TORCH_LIBRARY_IMPL(cllava_fast_emulated, CPU, library) {
  cllava::Bound<Cuda>::implement(library);
  cllava::Bound<Cuda>::implement_on_gpu(library);
}
#else
STABLE_TORCH_LIBRARY_IMPL(cllava_fast_native, CUDA, library) {
  cllava::Bound<Cuda>::implement(library);
  cllava::Bound<Cuda>::implement_on_gpu(library);
}
#endif

// The current CUDA stream through the stable ABI, and CUDA errors as exceptions.
#pragma once

#ifdef PACKOPS_WITH_CUDA

#include <cuda_runtime.h>

#include "torch/check.h"

// Weak, because only libtorch_cuda has it: the same binary must load under a CPU-only torch, where it stays null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace packops {

// Makes the tensor's device current for a scope and names its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    PACKOPS_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  RuntimeError, "no current CUDA stream for device ", tensor.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_cuda(cudaError_t error, const char* op) {
  if (__builtin_expect(error == cudaSuccess, 1)) return;
  cudaGetLastError();  // an error that is no fault of the context must not meet the next call
  // A launch may load its code, which takes memory too.
  if (error == cudaErrorMemoryAllocation) throw_error("OutOfMemoryError", std::string("CUDA out of memory. packops.") + op);
  raise("RuntimeError", op, ": ", cudaGetErrorString(error));
}

}  // namespace packops

#endif  // PACKOPS_WITH_CUDA

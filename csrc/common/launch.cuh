// Kernel launches and dynamic shared memory. Without a CUDA compiler the same functions run kernels on the emulator
// (tests/emulator).
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace packops {

#ifdef __CUDACC__

template <typename... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const std::type_identity_t<P>&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char packops_dynamic_shared[];
  return reinterpret_cast<T*>(packops_dynamic_shared);
}

#else

template <typename... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const std::type_identity_t<P>&... arguments) {
  emulator::run(grid, block, shared_bytes, 1, [&] { kernel(arguments...); });
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

#endif

// cluster: blocks per cluster; 0: none. follows: the previous launch on the stream is one of ours, and this one may start before
// that one has ended (programmatic dependent launch). So every thread of its kernel has to call griddepcontrol_wait() before it
// reads what that one writes. A kernel that reads nothing of it calls it in its first block alone, before that ends: what comes after
// this launch then comes after both. Device and code must support both: see DeviceLimits.
struct LaunchOptions {
  int cluster = 0;
  bool follows = false;
};
template <typename... P>
cudaError_t launch_with(LaunchOptions options, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, const std::type_identity_t<P>&... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {grid, block, shared_bytes, stream, attributes, 0};
  if (options.cluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(options.cluster), 1, 1};
  }
  if (options.follows) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace packops

// Kernel launches and dynamic shared memory, the two things that only a CUDA compiler can spell: tests/emulator has its own, and
// runs the kernels where there is no GPU.
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

// A launch in clusters of that many blocks, and one that follows another of this library on the stream: its blocks may start while
// that one's last are running, so the kernel has to call wait_for_launch_before(). Both need sm_90.
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

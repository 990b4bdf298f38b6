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
  extern __shared__ __align__(128) unsigned char packops_dynamic_shared[];
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

}  // namespace packops

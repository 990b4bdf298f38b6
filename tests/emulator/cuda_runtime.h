// As much of the CUDA runtime as packops' kernels and launchers use, for emulator.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

// ---- Types

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---- Device functions

using std::max;
using std::min;
template <typename A, typename B>
  requires(!std::is_same_v<A, B> && std::is_integral_v<A> && std::is_integral_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
  requires(!std::is_same_v<A, B> && std::is_integral_v<A> && std::is_integral_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline void __syncthreads() { emulator::wait(emulator::Waiting::for_block); }
inline void __syncwarp() { emulator::collective(0); }
inline unsigned __ballot_sync(unsigned, bool yes) {
  const auto& all = emulator::collective(yes);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= unsigned(all.present[lane] && all.value[lane]) << lane;
  return bits;
}
inline bool __syncthreads_or(bool yes) {
  static bool any;  // of a block, which are run one after the other
  __syncthreads();
  any = false;
  __syncthreads();
  any |= yes;
  __syncthreads();
  return any;
}
inline void __threadfence() {}
inline bool __any_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
inline unsigned __match_any_sync(unsigned, long long value) {
  const auto& all = emulator::collective(uint64_t(value));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= unsigned(all.present[lane] && all.value[lane] == uint64_t(value)) << lane;
  return bits;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::from_lane(value, (emulator::current % 32) ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_lane(value, lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = emulator::current % 32;
  return emulator::from_lane(value, lane < by ? lane : lane - by);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return std::exchange(*address, *address + value);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline int atomicMax(int* address, int value) { return std::exchange(*address, std::max(*address, value)); }

template <typename T>
T aligned_load(const T* p) {
  emulator::require(reinterpret_cast<uintptr_t>(p) % alignof(T) == 0, "a misaligned load");
  return *p;
}
template <typename T>
T __ldg(const T* p) {
  return aligned_load(p);
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return aligned_load(p);
}
template <typename T>
void __stcs(T* p, T value) {
  emulator::require(reinterpret_cast<uintptr_t>(p) % alignof(T) == 0, "a misaligned store");
  *p = value;
}

inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// ---- Host functions

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct Stream*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// An H200, but with few multiprocessors, so that every cluster has more than one row.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulator::architecture / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulator::architecture % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; break;
  }
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int maxThreadsPerBlock;  // as the launch bounds have it, here those of common/device.cuh's marker
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {emulator::code_has_wgmma ? 96 : 192, emulator::code_architecture};
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  return *clusters = 2, cudaSuccess;
}
template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(P...),
                               const std::type_identity_t<P>&... arguments) {
  int cluster = 0;
  bool follows = false;
  for (int i = 0; i < launch->numAttrs; i++) {
    const auto& attribute = launch->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = int(attribute.val.clusterDim.x);
    else follows = attribute.val.programmaticStreamSerializationAllowed;
  }
  if (cluster) {
    emulator::needs_sm90("clusters");
    emulator::cluster_launches++;
  }
  const dim3 grid = launch->gridDim;
  const auto count = [](const dim3& x) { return uint64_t(x.x) * x.y * x.z; };
  const uint64_t threads = count(launch->blockDim);
  std::vector<uint64_t> waited(count(grid));  // threads of a block
  emulator::run(grid, launch->blockDim, launch->dynamicSmemBytes, cluster ? cluster : 1, [&] {
    kernel(arguments...);
    waited[(uint64_t(blockIdx.z) * grid.y + blockIdx.y) * grid.x + blockIdx.x] +=
        emulator::fibers[emulator::current].waited_for_launch;
  });
  // Launches run one after the other here. On a GPU this one could read what the one before has not written yet. All threads of a block
  // wait for that, or none, where the block reads nothing of it; those of the first block always do.
  const bool whole_blocks = std::all_of(waited.begin(), waited.end(), [&](uint64_t n) { return n == 0 || n == threads; });
  emulator::require(!follows || (whole_blocks && (waited.empty() || waited[0] == threads)),
                    "a launch that may overlap the one before it does not wait for it");
  return cudaSuccess;
}

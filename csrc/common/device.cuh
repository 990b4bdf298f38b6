// What a launcher asks about the current device and about the code loaded for it, once per device.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "common/device.h"
#include "common/ptx.cuh"

namespace packops {

inline constexpr int kMaxDevices = 64;

struct Device : DeviceLimits {
  int index = 0;
};

// Every .cu file asks about its own code: hence the unnamed namespace.
namespace {

// Says by its launch bounds, which the host can read without running anything, whether it was compiled with wgmma. An
// architecture's number does not: code for 9.0 has none, code for 9.0a has.
constexpr int kWgmmaThreads = 96;
__global__ void __launch_bounds__(kHasWgmma ? kWgmmaThreads : 2 * kWgmmaThreads) marker_kernel() {}

cudaError_t loaded_code(int device, LoadedCode& code) {
  static std::atomic<int> known[kMaxDevices];  // 2 * architecture + has_wgmma; 0: not asked yet
  auto& here = known[device % kMaxDevices];
  int value = here.load(std::memory_order_relaxed);
  if (value == 0) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, marker_kernel);
    if (error != cudaSuccess) return error;
    value = 2 * attributes.ptxVersion + (attributes.maxThreadsPerBlock == kWgmmaThreads);
    here.store(value, std::memory_order_relaxed);
  }
  code = {value / 2, value % 2 == 1};
  return cudaSuccess;
}

cudaError_t current_device(Device& device) {
  constexpr cudaDeviceAttr kWanted[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                        cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMinor,
                                        cudaDevAttrComputeCapabilityMajor};
  static std::atomic<int> known[kMaxDevices][5];  // the last, never 0, says that the others are there
  cudaError_t error = cudaGetDevice(&device.index);
  if (error != cudaSuccess) return error;
  std::array<int, 5> values;
  auto& here = known[device.index % kMaxDevices];
  if (here[4].load(std::memory_order_acquire) == 0) {
    for (int i = 0; i < 5; i++) {
      if ((error = cudaDeviceGetAttribute(&values[i], kWanted[i], device.index)) != cudaSuccess) return error;
      here[i].store(values[i], i == 4 ? std::memory_order_release : std::memory_order_relaxed);
    }
  }
  for (int i = 0; i < 5; i++) values[i] = here[i].load(std::memory_order_relaxed);
  LoadedCode code;
  if ((error = loaded_code(device.index, code)) != cudaSuccess) return error;
  static_cast<DeviceLimits&>(device) = usable_limits({values[4] * 10 + values[3], values[0], values[1], values[2]}, code);
  return cudaSuccess;
}

// Lets a kernel have that much dynamic shared memory on the current device, which `device` must be. Asked once, unless for more.
template <auto kKernel>
cudaError_t allow_shared(int device, int bytes) {
  static std::atomic<int> allowed[kMaxDevices];
  auto& here = allowed[device % kMaxDevices];
  if (here.load(std::memory_order_acquire) >= bytes) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) here.store(bytes, std::memory_order_release);
  return error;
}

}  // namespace
}  // namespace packops

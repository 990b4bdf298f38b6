// What a launcher asks about the current device, once per device and process.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "common/device.h"

namespace packops {

inline constexpr int kMaxDevices = 64;

struct Device : DeviceLimits {
  int index = 0;
  bool overlaps_launches() const { return architecture >= 90; }  // see launch_with
};

inline cudaError_t current_device(Device& device) {
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
  static_cast<DeviceLimits&>(device) = {values[4] * 10 + values[3], values[0], values[1], values[2]};
  return cudaSuccess;
}

inline int multiprocessors() {
  Device device;
  return current_device(device) == cudaSuccess ? device.multiprocessors : 1;
}

}  // namespace packops

// What a launcher asks about the current device, once per device and process.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace packops {

inline int multiprocessors() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < kMaxDevices && (count = known[device].load(std::memory_order_relaxed)) > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  if (device < kMaxDevices) known[device].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace packops

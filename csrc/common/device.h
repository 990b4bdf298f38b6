// What a launch is chosen by. Plain numbers, so that the choice is tested for GPUs that the machine does not have.
#pragma once

#include <algorithm>

namespace packops {

struct DeviceLimits {
  int architecture = 0;  // 80, 90, 100, ...: what both the device and the loaded code have
  int multiprocessors = 1;
  int shared_per_sm = 0;     // bytes
  int shared_per_block = 0;  // bytes, opt-in
  bool has_wgmma = false;

  constexpr bool has_clusters() const { return architecture >= 90; }       // and mbarriers and bulk copies
  constexpr bool overlaps_launches() const { return architecture >= 90; }  // programmatic dependent launch, see launch_with
};

// What a kernel was compiled for. It may be older than the device: PTX of 8.0 runs on Hopper, too, but its preprocessor left out
// everything that needs sm_90.
struct LoadedCode {
  int architecture = 0;  // __CUDA_ARCH__ / 10
  bool has_wgmma = false;
};

constexpr DeviceLimits usable_limits(DeviceLimits device, LoadedCode code) {
  device.has_wgmma = code.has_wgmma && device.architecture == 90;
  device.architecture = std::min(device.architecture, code.architecture);
  return device;
}

}  // namespace packops

// What a launch is chosen by. Plain numbers, so that the choice is tested for GPUs that the machine does not have.
#pragma once

namespace packops {

struct DeviceLimits {
  int architecture = 0;  // 80, 90, 100, ...
  int multiprocessors = 1;
  int shared_per_sm = 0;     // bytes
  int shared_per_block = 0;  // bytes, opt-in
};

}  // namespace packops

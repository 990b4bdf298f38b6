// How rms_norm.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// A row lies in the registers of a team of 1, 2, 4 or 8 warps, up to four 16-byte vectors per thread. Forward, a block is one team, but
// two of one warp, and takes one row per team. Backward, blocks are eight warps and persistent, two per SM, since each accumulates the
// weight's gradient.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/device.h"
#include "rms_norm.h"

namespace packops {

struct RmsNormLaunch {
  int team = 32, threads = 64;  // of a team; of a block
  int64_t blocks = 1;
};

inline constexpr int kRmsNormThreads = 256, kRmsNormVectors = 4;

inline constexpr int kRmsNormRowBytes = kRmsNormThreads * kRmsNormVectors * 16;  // of the longest row
constexpr int64_t rms_norm_most_columns(DType dtype) { return kRmsNormRowBytes / size_of(dtype); }
constexpr bool rms_norm_fits(int64_t columns, DType dtype) {
  return columns > 0 && columns % (16 / size_of(dtype)) == 0 && columns <= rms_norm_most_columns(dtype);
}

inline RmsNormLaunch choose_rms_norm_launch(const RmsNormParams& p, const DeviceLimits& device) {
  RmsNormLaunch launch;
  while (int64_t(launch.team) * kRmsNormVectors * (16 / size_of(p.dtype)) < p.columns) launch.team *= 2;
  launch.threads = p.backward() ? kRmsNormThreads : std::max(launch.team, 64);
  const int64_t teams = launch.threads / launch.team;
  launch.blocks = (p.rows + teams - 1) / teams;
  if (p.backward()) launch.blocks = std::min<int64_t>(launch.blocks, 2 * device.multiprocessors);
  return launch;
}

}  // namespace packops

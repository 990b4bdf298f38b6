// How rms_norm.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// A row lies in the registers of a team of one to eight warps, three or four 16-byte vectors per thread: of both what leaves fewer places
// empty, since these cost instructions, too. Forward, a block is one team, but two of one warp, and takes one row per team. Backward,
// blocks are persistent, since each accumulates the weight's gradient. An SM has as many teams as its registers hold, in two blocks or,
// where their number is odd, in one. (More would not fit: see team_sum.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/device.h"
#include "rms_norm.h"

namespace packops {

struct RmsNormLaunch {
  int team = 32, vectors = 4;  // threads of a team; vectors of a thread
  int threads = 64;            // of a block
  int64_t blocks = 1;
};

inline constexpr int kRmsNormTeam = 256, kRmsNormVectors = 4;  // at most
// Of a block forward, of an SM backward, at most. Backward, registers decide: 128 a thread, or 96 with three vectors.
constexpr int rms_norm_threads(int vectors, bool backward) { return !backward ? kRmsNormTeam : vectors == 3 ? 640 : 512; }

inline constexpr int kRmsNormRowBytes = kRmsNormTeam * kRmsNormVectors * 16;  // of the longest row
constexpr int64_t rms_norm_most_columns(DType dtype) { return kRmsNormRowBytes / size_of(dtype); }
constexpr bool rms_norm_fits(int64_t columns, DType dtype) {
  return columns > 0 && columns % (16 / size_of(dtype)) == 0 && columns <= rms_norm_most_columns(dtype);
}

inline RmsNormLaunch choose_rms_norm_launch(const RmsNormParams& p, const DeviceLimits& device) {
  RmsNormLaunch launch;
  const int64_t all = (p.columns * size_of(p.dtype) + 15) / 16;
  const auto team_of = [&](int vectors) { return int((all + 32 * vectors - 1) / (32 * vectors) * 32); };
  if (team_of(3) <= kRmsNormTeam && team_of(3) * 3 < team_of(4) * 4) launch.vectors = 3;
  launch.team = team_of(launch.vectors);
  int teams = std::max(64 / launch.team, 1), blocks_per_sm = 1;
  if (p.backward()) {
    teams = rms_norm_threads(launch.vectors, true) / launch.team;
    if (teams % 2 == 0) blocks_per_sm = 2, teams /= 2;
  }
  launch.threads = teams * launch.team;
  launch.blocks = (p.rows + teams - 1) / teams;
  if (p.backward()) launch.blocks = std::min<int64_t>(launch.blocks, int64_t(blocks_per_sm) * device.multiprocessors);
  return launch;
}

}  // namespace packops

// How qk_norm_rope.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without
// one.
//
// Narrow: a head is at most 32 lanes (see rope_launch.h). A `group` of threads of one warp normalises it in registers, with
// shuffles. Forward uses the grid of rope_launch.h; backward sums the weights' gradients, so its blocks are persistent.
// Wide (longer or misaligned heads, or a norm across heads): a block normalises one head, or all heads of a token, at a time. It
// reads them twice, the second time from the L1.
// Except in narrow forward, q and k are two jobs of one launch: the first `q_blocks` blocks take q, the others k.
#pragma once

#include <algorithm>
#include <cstdint>

#include "qk_norm_rope.h"
#include "rope_launch.h"

namespace packops {

// Persistent blocks per SM, which limits the registers per thread. Narrow backward, 128 threads: 96 registers, or 128 for fp32,
// whose vectors are wider. Wide, 256 threads: 80, or 128 for M-RoPE.
constexpr int qk_norm_narrow_blocks(int element_size) { return element_size == 4 ? 4 : 5; }
// Narrow backward: heads of a thread, which share what is done once a token. That is bound by instructions; fp32 is not.
constexpr int qk_norm_narrow_unroll(int element_size) { return element_size == 4 ? 2 : 4; }
constexpr int qk_norm_wide_blocks(bool mrope) { return mrope ? 2 : 3; }

struct QkNormRopeLaunch {
  int width = 1, lanes = 1;
  bool narrow = true;
  RopeLaunch forward;  // narrow
  int unroll = 1;      // narrow backward: heads per thread
  int group = 1;       // narrow backward: threads per head, a power of two
  int threads = 128;
  int64_t q_blocks = 0, k_blocks = 0;

  // narrow backward, of one job
  int slots(int64_t heads) const { return int((heads + unroll - 1) / unroll); }
  int slots_per_block(int64_t heads) const { return std::max(1, std::min(slots(heads), threads / group)); }
  int chunks(int64_t heads) const { return (slots(heads) + slots_per_block(heads) - 1) / slots_per_block(heads); }
  int tokens_per_block(int64_t heads) const { return threads / group / slots_per_block(heads); }
};

// Threads of a block of the narrow forward kernel: with 96 registers, an SM holds four such blocks. Rounding a head's lanes up to
// a power of two may double the number.
inline constexpr int kNormBlockThreads = 160;

// As choose_rope_launch, but with whole warps of whole heads.
inline RopeLaunch choose_norm_launch(const RopeParams& p, const DeviceLimits& device) {
  const int width = rope_vector_width(p);
  const int most = width * size_of(p.dtype) < 16 ? 1 : 4;  // narrow vectors are rare
  const int unroll = rope_heads_per_thread(p, rope_lanes(p, width), device, most);
  RopeLaunch launch = choose_rope_launch(p, device, unroll, kNormBlockThreads);
  const auto power_of_two = [](int x) { return (x & (x - 1)) == 0; };
  while (!power_of_two(launch.lanes_per_block)) launch.lanes_per_block++;
  while (!power_of_two(launch.tokens_per_block)) launch.tokens_per_block--;
  while (launch.threads() % 32) launch.slots_per_block++;
  launch.token_blocks = (p.tokens + launch.tokens_per_block - 1) / launch.tokens_per_block;
  launch.slot_chunks = (launch.slots + launch.slots_per_block - 1) / launch.slots_per_block;
  return launch;
}

inline QkNormRopeLaunch choose_qk_norm_rope_launch(const QkNormRopeParams& p, const DeviceLimits& device) {
  QkNormRopeLaunch launch;
  RopeParams rope = p.rope;
  launch.width = rope_vector_width(rope);
  if (p.backward()) {
    rope.q.in = p.q_grad.in, rope.q.in_batch = p.q_grad.in_batch, rope.q.in_token = p.q_grad.in_token,
    rope.q.in_head = p.q_grad.in_head;
    rope.k.in = p.k_grad.in, rope.k.in_batch = p.k_grad.in_batch, rope.k.in_token = p.k_grad.in_token,
    rope.k.in_head = p.k_grad.in_head;
    launch.width = std::min(launch.width, rope_vector_width(rope));
  }
  // Backward: four elements for every dtype. Cosines, sines, weights and their gradients are floats in registers, eight of each
  // per thread; with sixteen, too few threads would fit on an SM.
  launch.width = launch.width >= 4 ? 4 : 1;
  launch.lanes = rope.rotary_dim / 2 / launch.width + ((rope.head_dim - rope.rotary_dim) / launch.width + 1) / 2;
  launch.narrow = !p.across_heads && launch.lanes <= 32 && launch.width == 4;
  launch.threads = launch.narrow ? 128 : 256;
  while (launch.group < launch.lanes && launch.group < 32) launch.group *= 2;
  if (launch.narrow && p.backward()) launch.unroll = qk_norm_narrow_unroll(size_of(rope.dtype));
  if (launch.narrow && !p.backward()) launch.forward = choose_norm_launch(rope, device);

  const int64_t tokens = rope.batch * rope.tokens;
  auto blocks = [&](int64_t heads) -> int64_t {
    if (heads == 0 || tokens == 0) return 0;
    int64_t units = p.across_heads ? tokens : tokens * heads;
    if (launch.narrow) {
      const int64_t per_block = launch.tokens_per_block(heads);
      units = (tokens + per_block - 1) / per_block * launch.chunks(heads);
    }
    if (!p.backward()) return std::min<int64_t>(units, 0x3fffffff);
    // Every block writes a row of partial sums, so no more blocks than run at once.
    const int64_t resident = int64_t(device.multiprocessors) *
                             (launch.narrow ? qk_norm_narrow_blocks(size_of(rope.dtype)) : qk_norm_wide_blocks(rope.mrope));
    const int64_t share = std::max<int64_t>(1, resident * heads / std::max<int64_t>(1, rope.q.heads + rope.k.heads));
    return std::min(units, share);
  };
  launch.q_blocks = blocks(rope.q.heads);
  launch.k_blocks = blocks(rope.k.heads);
  return launch;
}

}  // namespace packops

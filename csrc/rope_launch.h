// How rope.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// A head is cut into `lanes` of two vectors of `width` elements. An item is one lane of `unroll` heads: one thread loads both
// vectors of all of them at once, and its sines and cosines once for all of them. Consecutive items take consecutive lanes, then
// consecutive heads. A block holds `items_per_block` items of each of `tokens_per_block` tokens; where one token needs more than
// a block, `chunks` blocks share it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rope.h"

namespace packops {

struct RopeLaunch {
  int width = 1;   // elements per vector: 16 bytes' worth, or what alignment and sizes allow
  int unroll = 1;  // heads per thread: 1, 2 or 4
  int lanes = 1;   // per head: pairs of vectors that turn, then pairs that only pass through
  int items_per_block = 1;
  int chunks = 1;
  int tokens_per_block = 1;
  bool token_inner = false;  // consecutive threads walk lanes, tokens, heads: where tokens lie closer together than heads
  int threads = 32;
  int64_t blocks = 0;
};

// The largest power of two, at most 16, that divides the address of every row of features.
inline int rope_alignment(const RopeHeads& heads, int element_size) {
  if (heads.heads == 0) return 16;
  const int64_t strides = heads.in_batch | heads.in_token | heads.in_head | heads.out_batch | heads.out_token | heads.out_head;
  const uint64_t bits = uint64_t(reinterpret_cast<uintptr_t>(heads.in) | reinterpret_cast<uintptr_t>(heads.out)) |
                        uint64_t(strides * element_size) | 16;
  return int(bits & (~bits + 1));
}

// The widest vector that the addresses and the cuts of a head allow.
inline int rope_vector_width(const RopeParams& p, int element_size) {
  const int alignment = std::min(rope_alignment(p.q, element_size), rope_alignment(p.k, element_size));
  const int cuts = p.rotary_dim / 2 | p.rotary_offset | (p.in_place ? 0 : p.head_dim);
  int width = std::max(alignment / element_size, 1);
  while (cuts % width) width /= 2;
  return width;
}

// Heads per thread the kernel is compiled for: fewer where vectors are narrow, which is rare.
constexpr int rope_max_unroll(int vector_bytes) { return vector_bytes == 16 ? 4 : vector_bytes == 8 ? 2 : 1; }

// unroll, block_threads: 0 lets the function choose. token_inner: -1 likewise.
inline RopeLaunch choose_rope_launch(const RopeParams& p, int element_size, int multiprocessors, int unroll = 0,
                                     int block_threads = 0, int token_inner = -1) {
  RopeLaunch launch;
  launch.width = rope_vector_width(p, element_size);
  const int passing = p.in_place ? 0 : (p.head_dim - p.rotary_dim) / launch.width;
  launch.lanes = p.rotary_dim / 2 / launch.width + (passing + 1) / 2;
  const int64_t heads = p.q.heads + p.k.heads, tokens = p.batch * p.tokens;

  // Two heads per thread keep enough bytes in flight; with little work, more threads count for more.
  const bool plenty = tokens * heads * launch.lanes >= int64_t(multiprocessors) * 2048 * 2;
  launch.unroll = std::min(unroll ? unroll : plenty ? 2 : 1, rope_max_unroll(launch.width * element_size));
  if (block_threads == 0) block_threads = 256;
  const int64_t slots = std::max<int64_t>((heads + launch.unroll - 1) / launch.unroll, 1);
  const int64_t items = slots * launch.lanes;

  launch.token_inner = token_inner < 0 ? p.tokens > 1 && p.q.heads > 1 && p.q.in_token < p.q.in_head : token_inner != 0;
  constexpr int kInnerTokens = 8;
  if (launch.token_inner && launch.lanes * kInnerTokens <= block_threads) {
    const int64_t slots_per_block = std::min<int64_t>(slots, block_threads / (launch.lanes * kInnerTokens));
    launch.chunks = int((slots + slots_per_block - 1) / slots_per_block);
    launch.items_per_block = int(slots_per_block) * launch.lanes;
  } else {
    launch.token_inner = false;
    launch.chunks = int((items + block_threads - 1) / block_threads);
    launch.items_per_block = int((items + launch.chunks - 1) / launch.chunks);
  }
  launch.tokens_per_block = int(std::clamp<int64_t>(tokens, 1, std::max(block_threads / launch.items_per_block, 1)));
  launch.threads = (launch.items_per_block * launch.tokens_per_block + 31) / 32 * 32;
  launch.blocks = (tokens + launch.tokens_per_block - 1) / launch.tokens_per_block * launch.chunks;
  return launch;
}

}  // namespace packops

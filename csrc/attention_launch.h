// How attention.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// All three kernels work on tiles of 64 tokens of one document. A warp has `blocks` x 16 rows of the tile. The other operand
// (keys and values; in the last kernel queries and gradients) is streamed in turns of `turn` tokens, of which `stages` are in
// shared memory at once.
//
//   forward    a block is 64 queries of a head            accumulates out: 16 x head_dim / 32 floats per thread and 16 rows
//   queries    the same                                   accumulates grad_q
//   keys       64 keys of a head of keys and values       accumulates grad_k and grad_v, or one of them if registers do not
//   suffice
//
// Occupancy decides: each block mostly waits for copies and products. Two query heads per block that share keys and values would
// halve the reads, and were slower (docs/design.md).
//
// In the last kernel the first keys of a long document meet every later token of all heads of the group. One block of eight warps
// fills an SM, so its warps form teams that take different heads. Of warpgroup blocks several fit.
#pragma once

#include <cstdint>

#include "attention.h"

namespace packops {

// wgmma (`group`) keeps the sums of 64 rows in the registers of four warps, and no operands.
struct AttentionShape {
  int blocks;  // of 16 rows per warp
  int turn, step, stages;
  int per_multiprocessor;  // blocks per SM that registers should suffice for
  constexpr int warps() const { return kAttentionRows / 16 / blocks; }
  constexpr int threads() const { return 32 * warps(); }
};

constexpr AttentionShape attention_forward_shape(int head_dim, bool group) {
  if (group) return {1, 64, 64, 1, head_dim <= 64 ? 5 : head_dim <= 128 ? 4 : 2};
  return head_dim <= 128 ? AttentionShape{2, 64, 64, 1, 4} : AttentionShape{1, 64, 64, 1, 2};
}
constexpr AttentionShape attention_queries_shape(int head_dim, bool group) {
  if (group)
    return head_dim <= 64    ? AttentionShape{1, 64, 64, 2, 4}
           : head_dim <= 128 ? AttentionShape{1, 64, 64, 1, 3}
                             : AttentionShape{1, 32, 32, 1, 2};
  return head_dim <= 64    ? AttentionShape{2, 64, 32, 2, 4}
         : head_dim <= 128 ? AttentionShape{2, 32, 32, 2, 3}
                           : AttentionShape{1, 32, 32, 1, 2};
}
constexpr AttentionShape attention_keys_shape(int head_dim, bool group) {
  if (group)
    return head_dim <= 64    ? AttentionShape{1, 64, 64, 2, 3}
           : head_dim <= 128 ? AttentionShape{1, 64, 64, 2, 2}
                             : AttentionShape{1, 32, 32, 1, 2};
  return head_dim <= 64    ? AttentionShape{2, 64, 32, 2, 1}
         : head_dim <= 128 ? AttentionShape{1, 32, 32, 2, 1}
                           : AttentionShape{1, 32, 32, 1, 2};
}
constexpr bool attention_keys_split(int head_dim) { return head_dim > 128; }  // grad_k and grad_v by different blocks

// Bytes of shared memory. A row is 2 head_dim bytes; per query there may be lse and delta.
constexpr int attention_forward_shared(int head_dim, bool group) {
  return 2 * head_dim * (kAttentionRows + 2 * attention_forward_shape(head_dim, group).turn);
}
constexpr int attention_queries_shared(int head_dim, bool group) {
  const AttentionShape shape = attention_queries_shape(head_dim, group);
  return 2 * head_dim * (2 * kAttentionRows + 2 * shape.turn * shape.stages) + 4 * kAttentionRows;
}
constexpr int attention_keys_shared(int head_dim, bool group, int teams) {
  const AttentionShape shape = attention_keys_shape(head_dim, group);
  return 2 * head_dim * 2 * kAttentionRows + teams * shape.stages * shape.turn * (2 * 2 * head_dim + 2 * 4);
}

// Teams of a block: at most 8 warps, at most one per head of the group, and as many as fit into shared memory.
constexpr int attention_teams(int head_dim, bool by_group, int group, int shared_per_block = 227 * 1024) {
  int teams = by_group || attention_keys_split(head_dim) ? 1 : 8 / attention_keys_shape(head_dim, false).warps();
  while (teams > 1 && (teams > group || attention_keys_shared(head_dim, by_group, teams) > shared_per_block)) teams /= 2;
  return teams;
}

}  // namespace packops

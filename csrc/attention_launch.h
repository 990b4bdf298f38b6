// How attention.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// All three kernels take tiles of 64 tokens of one document. A warp has `blocks` times 16 of their rows; what they meet (keys and
// values; in the last kernel queries and gradients) comes in turns of `turn` tokens, `stages` turns in shared memory at once.
//
//   forward       a block is 64 queries of a head         holds 16 x head_dim / 32 floats of the result per 16 rows and thread
//   queries       the same                                 holds grad_q
//   keys          64 keys of a head of keys and values     holds grad_k and grad_v, or, where registers do not suffice, one of them
//
// What counts is how many blocks a multiprocessor holds, since each waits for its copies and its products most of the time: sharing
// keys and values between two query heads of one block halves what is read and was slower (docs/design.md).
//
// In the last kernel a long document's first keys meet every later token of all heads of the group. Single warps therefore work in
// teams that take different heads, since one block of eight warps fills a multiprocessor; of warp groups several blocks fit.
#pragma once

#include <cstdint>

#include "attention.h"

namespace packops {

// Products by warp groups (sm_90) hold the sums of 64 rows in four warps and need none of their operands in registers.
struct AttentionShape {
  int blocks;  // of 16 rows per warp
  int turn, step, stages;
  int per_multiprocessor;  // thread blocks whose registers should fit
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

// Bytes of shared memory. Rows are 2 head_dim bytes; of each query there may be lse and delta.
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

// Teams of a block: 8 warps at most, no more than there are heads in a group, and as many as shared memory has room for.
constexpr int attention_teams(int head_dim, bool by_group, int group, int shared_per_block = 227 * 1024) {
  int teams = by_group || attention_keys_split(head_dim) ? 1 : 8 / attention_keys_shape(head_dim, false).warps();
  while (teams > 1 && (teams > group || attention_keys_shared(head_dim, by_group, teams) > shared_per_block)) teams /= 2;
  return teams;
}

}  // namespace packops

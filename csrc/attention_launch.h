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
#include "common/device.h"

namespace packops {

// Columns of the tiles for heads of so many features, and so the kernel that takes them: the shapes below are of columns. Where
// features are fewer, tiles are padded with zeros.
constexpr int attention_columns(int head_dim) {
  for (int columns : {64, 96, 128, 192})
    if (head_dim <= columns) return columns;
  return 256;
}
// Bytes of a tile's row in shared memory: whole panels of 64 columns.
constexpr int attention_row_bytes(int columns) { return (columns + 63) / 64 * 128; }

// wgmma (`group`) keeps the sums of 64 rows in the registers of four warps, and no operands.
struct AttentionShape {
  int blocks;  // of 16 rows per warp
  int turn, step, stages;
  int per_multiprocessor;  // blocks per SM that registers should suffice for
  constexpr int warps() const { return kAttentionRows / 16 / blocks; }
  constexpr int threads() const { return 32 * warps(); }
};

constexpr AttentionShape attention_forward_shape(int head_dim, bool group) {
  if (group) return {1, 64, 64, 1, head_dim <= 64 ? 5 : head_dim <= 128 ? 4 : head_dim <= 192 ? 3 : 2};
  return head_dim <= 128 ? AttentionShape{2, 64, 64, 1, 4} : AttentionShape{1, 64, 64, 1, 2};
}
constexpr AttentionShape attention_queries_shape(int head_dim, bool group) {
  if (group)
    return head_dim <= 64    ? AttentionShape{1, 64, 64, 2, 4}
           : head_dim <= 128 ? AttentionShape{1, 64, 64, 1, 3}
           : head_dim <= 192 ? AttentionShape{1, 32, 32, 1, 3}
                             : AttentionShape{1, 32, 32, 1, 2};
  return head_dim <= 64    ? AttentionShape{2, 64, 32, 2, 4}
         : head_dim <= 128 ? AttentionShape{2, 32, 32, 2, 3}
                           : AttentionShape{1, 32, 32, 1, 2};
}
constexpr AttentionShape attention_keys_shape(int head_dim, bool group) {
  if (group)
    return head_dim <= 64    ? AttentionShape{1, 64, 64, 2, 3}
           : head_dim <= 128 ? AttentionShape{1, 64, 64, 2, 2}
           : head_dim <= 192 ? AttentionShape{1, 64, 64, 1, 2}
                             : AttentionShape{1, 32, 32, 1, 2};
  return head_dim <= 64    ? AttentionShape{2, 64, 32, 2, 1}
         : head_dim <= 128 ? AttentionShape{1, 32, 32, 2, 1}
                           : AttentionShape{1, 32, 32, 1, 2};
}
constexpr bool attention_keys_split(int head_dim) { return head_dim > 128; }  // grad_k and grad_v by different blocks

// Bytes of shared memory. Per query there may be lse and delta.
constexpr int attention_forward_shared(int head_dim, bool group) {
  return attention_row_bytes(head_dim) * (kAttentionRows + 2 * attention_forward_shape(head_dim, group).turn);
}
constexpr int attention_queries_shared(int head_dim, bool group) {
  const AttentionShape shape = attention_queries_shape(head_dim, group);
  return attention_row_bytes(head_dim) * (2 * kAttentionRows + 2 * shape.turn * shape.stages) + 4 * kAttentionRows;
}
constexpr int attention_keys_shared(int head_dim, bool group, int teams) {
  const AttentionShape shape = attention_keys_shape(head_dim, group);
  const int row = attention_row_bytes(head_dim);
  return 2 * row * kAttentionRows + teams * shape.stages * shape.turn * (2 * row + 2 * 4);
}

// ---- Long documents

// Whether a document takes the kernels for long ones. The list of tiles is sorted by it where `from` is whole tiles.
constexpr bool attention_is_long(int64_t length, int64_t window, int64_t from) {
  return (window > 0 && window < length ? window : length) > from;
}
inline constexpr int32_t kNeverLong = 0x7fffffff;

// Forward (attention_long_forward.cuh): 64 queries for each of `groups` consumers of 128 threads, keys and values in turns of `turn`.
// in_turns: consumers issue their products one after the other. holds_queries: they stay in registers.
struct AttentionLongForwardShape {
  int groups, turn, stages;
  bool in_turns, holds_queries;
  constexpr int rows() const { return kAttentionRows * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
};
constexpr AttentionLongForwardShape attention_long_forward_shape(int head_dim) {
  return head_dim <= 64    ? AttentionLongForwardShape{3, 128, 2, true, false}
         : head_dim <= 96  ? AttentionLongForwardShape{2, 128, 2, false, true}
         : head_dim <= 128 ? AttentionLongForwardShape{2, 128, 2, true, true}
         : head_dim <= 192 ? AttentionLongForwardShape{2, 112, 2, false, false}
                           : AttentionLongForwardShape{2, 80, 2, false, false};
}
constexpr int attention_long_forward_shared(int head_dim) {  // tiles, and barriers
  const AttentionLongForwardShape shape = attention_long_forward_shape(head_dim);
  return attention_row_bytes(head_dim) * (shape.rows() + 2 * shape.stages * shape.turn) + 1024;
}

// Two consumers of 128 threads and a producer, which copies so many turns of queries and gradients ahead. For a third turn of 64 features
// there are 100 bytes of shared memory too few.
inline constexpr int kAttentionLongKeysThreads = 3 * 128;
constexpr int attention_long_turns(int head_dim) { return head_dim <= 64 || head_dim > 192 ? 2 : 3; }
// Keys of an item of the joint form, and queries of its turns: as many as registers hold scores of.
inline constexpr int kAttentionJointKeys = 128;
constexpr int attention_joint_queries(int head_dim) { return head_dim <= 64 ? 128 : 64; }
constexpr int attention_long_keys_shared(int head_dim) {
  const int row = attention_row_bytes(head_dim), tile = row * kAttentionRows, barriers = 1024;
  const int fp32_tile = 4 * kAttentionRows * kAttentionRows;
  const int rows = attention_keys_split(head_dim) ? kAttentionRows : attention_joint_queries(head_dim);
  const int turns = attention_long_turns(head_dim) * rows * (2 * row + 2 * 4);  // with lse and delta
  if (attention_keys_split(head_dim))  // keys, values, and what one consumer passes to the other
    return 2 * tile + turns + fp32_tile + barriers;
  return 4 * tile + turns + rows * (2 * 2 * kAttentionJointKeys) + 2 * fp32_tile + barriers;  // dS of two turns, parts of grad_q
}

// Numbers of sums of queries, for tiles of kAttentionRows.
constexpr int64_t attention_sums(int64_t tokens, int64_t documents, int64_t heads, int columns) {
  return attention_tiles(tokens, documents) * heads * kAttentionRows * columns;
}

// Registers of a thread, by groups of consumers. All together may have no more than the block was launched with: a multiprocessor's
// 65536 over its threads, in whole eights. Otherwise consumers wait for registers that nobody gives back.
constexpr int attention_producer_registers(int groups) { return groups == 2 ? 24 : 32; }
constexpr int attention_consumer_registers(int groups) { return groups == 2 ? 240 : 160; }

// Of the forward's two launches, that for long documents comes first: that for short ones fills the multiprocessors that it leaves.
inline constexpr bool kAttentionLongFirst = true;

// Tokens up to which the kernels for short documents are as fast (docs/design.md). The two forms do not have the same bits, so nothing
// but the document and the options of the call may decide.
constexpr int32_t attention_long_forward_from(int head_dim) { return head_dim <= 64 ? 2048 : head_dim <= 128 ? 768 : 576; }
constexpr int32_t attention_long_keys_from(int head_dim) { return attention_keys_split(head_dim) ? 1024 : 1280; }

// Which documents of a call are long: those of more tokens than this. kNeverLong where none can be, and nothing is launched for them. A
// window of `from` tokens or less makes all short, and a longer one changes nothing.
constexpr int32_t choose_attention_long_from(const AttentionParams& p, const DeviceLimits& device, int32_t from) {
  if (p.long_from) from = p.long_from;
  return device.has_wgmma && attention_is_long(p.tokens, p.window, from) ? from : kNeverLong;
}
constexpr int32_t choose_attention_long_forward_from(const AttentionParams& p, const DeviceLimits& device) {
  return choose_attention_long_from(p, device, attention_long_forward_from(p.head_dim));
}
// Of a call of the forward with that long_from: whether its kernel for long documents takes the keys of a long root for all that continues
// it. With a window it does not, since that is one of positions.
constexpr bool forwards_branches(const AttentionParams& p) { return p.prefixes && p.window == 0 && p.long_from != kNeverLong; }
// With shared prefixes, a window is one of positions, which the kernels for long documents do not know.
constexpr int32_t choose_attention_long_keys_from(const AttentionParams& p, const DeviceLimits& device) {
  return p.prefixes && p.window > 0 ? kNeverLong : choose_attention_long_from(p, device, attention_long_keys_from(p.head_dim));
}

// ---- Short prefixes with much behind them

// All that continues a prefix sees its keys. So a block that has 64 of them would have far more to do than others, and the queries are cut
// into slices: a block each (attention_slices.cuh).
struct AttentionSlices {
  int count = 1, queries = 0x7fffffff;  // queries of each but the last, in whole tiles
};
constexpr int attention_whole_tiles(int tokens) { return (tokens + kAttentionRows - 1) / kAttentionRows * kAttentionRows; }
// Queries of a slice, at least. Its block has all heads of a group, and leaves as many sums as for fewer.
constexpr int attention_slice(int group) { return attention_whole_tiles(2048 / group); }

// Of a root of so many keys, which so many queries see. Slices of all its tiles are no more than the tree has whole tiles, and the first
// holds the root. A document that nothing continues has one, so its bits do not depend on this.
constexpr AttentionSlices attention_slices(int keys, int queries, int group) {
  const int own = attention_whole_tiles(keys), slice = attention_slice(group), least = own > slice ? own : slice;
  if (keys <= 0 || queries / least < 2) return {};
  const int each = attention_whole_tiles((queries - 1) / (queries / least) + 1);
  return {(queries - 1) / each + 1, each};
}
constexpr bool may_have_slices(const AttentionParams& p) {
  return p.prefixes && p.tokens >= 2 * attention_slice(p.heads / p.kv_heads);
}

// Teams of a block: at most 8 warps, at most one per head of the group, and as many as fit into shared memory.
constexpr int attention_teams(int head_dim, bool by_group, int group, int shared_per_block = 227 * 1024) {
  int teams = by_group || attention_keys_split(head_dim) ? 1 : 8 / attention_keys_shape(head_dim, false).warps();
  while (teams > 1 && (teams > group || attention_keys_shared(head_dim, by_group, teams) > shared_per_block)) teams /= 2;
  return teams;
}

}  // namespace packops

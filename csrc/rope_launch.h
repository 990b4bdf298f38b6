// How rope.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// A head is split into `lanes` of two vectors of `width` elements. A slot is `unroll` neighbouring heads of q, or of k. One
// thread loads both vectors of one lane for all heads of a slot, and the cosines and sines (and the norm's weights) once for all
// of them. With 16-bit heads of 128 features, a warp reads four slots: each load covers four cache lines, all loads together one
// contiguous range.
//
// A block's dimensions are lanes, slots and tokens. The grid's are blocks of tokens of a batch row, chunks of a token that is too
// large for one block, and batch rows. A thread reads its place off these: computing it by divisions would delay every load.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/device.h"
#include "rope.h"

namespace packops {

struct RopeLaunch {
  int width = 1;               // elements per vector: 16 bytes' worth, or what alignment and sizes allow
  int unroll = 1;              // heads per thread: 1, 2 or 4
  int lanes = 1;               // per head: pairs of vectors that turn, then pairs that only pass through
  int slots = 1, q_slots = 1;  // per token, and of them q's, which come first
  int lanes_per_block = 1, lane_chunks = 1;
  int slots_per_block = 1, slot_chunks = 1;
  int tokens_per_block = 1;
  bool token_inner = false;  // thread order lanes, tokens, slots: for layouts with tokens closer together than heads
  int64_t token_blocks = 0;  // per batch row
  bool plain = false;        // see rope_is_plain

  PACKOPS_HOST_DEVICE int threads() const { return lanes_per_block * slots_per_block * tokens_per_block; }
};

inline constexpr int kRopeMostThreads = 512;
// The short kernel. Its bound is on registers, 56 for two heads per thread and 80 for four: seven or five blocks of 160 threads
// fit.
inline constexpr int kRopePlainThreads = 256, kRopePlainBlocks = 3;
constexpr int rope_bound_threads(bool plain, int unroll) {
  return !plain ? kRopeMostThreads : unroll == 4 ? kRopePlainThreads : 384;
}

// Shared memory of a block. M-RoPE: cosines, then sines, of all lanes of its tokens. cu_seqlens: each token's document start.
inline int rope_shared_bytes(const RopeParams& p, const RopeLaunch& launch) {
  const int tokens = launch.tokens_per_block, pairs = tokens * launch.lanes_per_block * launch.width;
  return (p.mrope ? 2 * pairs * int(sizeof(float)) : 0) + (p.axis.cu_seqlens ? tokens * int(sizeof(int64_t)) : 0);
}

// The largest power of two, at most 16, that divides the address of every row of features.
inline int rope_alignment(const RopeHeads& heads, int element_size) {
  if (heads.heads == 0) return 16;
  const int64_t strides = heads.in_batch | heads.in_token | heads.in_head | heads.out_batch | heads.out_token | heads.out_head;
  const uint64_t bits = uint64_t(reinterpret_cast<uintptr_t>(heads.in) | reinterpret_cast<uintptr_t>(heads.out)) |
                        uint64_t(strides * element_size) | 16;
  return int(bits & (~bits + 1));
}

// The widest vector that addresses and the parts of a head allow.
inline int rope_vector_width(const RopeParams& p) {
  const int element_size = size_of(p.dtype);
  const int alignment = std::min(rope_alignment(p.q, element_size), rope_alignment(p.k, element_size));
  const int cuts = p.rotary_dim / 2 | p.rotary_offset | (p.in_place ? 0 : p.head_dim);
  int width = std::max(alignment / element_size, 1);
  while (cuts % width) width /= 2;
  return width;
}

// The most heads per thread that the kernel is compiled for. Fewer for narrow vectors, which are rare.
constexpr int rope_max_unroll(int vector_bytes) { return vector_bytes == 16 ? 4 : vector_bytes == 8 ? 2 : 1; }

// What models nearly always have, and what a kernel with half the instructions takes: vectors of 16 bytes, every lane turns, rows of
// the table are aligned vectors, too, and strides fit into 31 bits.
inline bool rope_is_plain(const RopeParams& p, const RopeLaunch& launch) {
  const int run = p.interleaved ? launch.width / 2 : launch.width, number = size_of(p.table_dtype);
  const uint64_t table = uint64_t(reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin)) |
                         uint64_t((p.cos_batch | p.cos_row | p.sin_batch | p.sin_row) * number);
  const int64_t strides = p.q.in_token | p.q.in_head | p.q.out_token | p.q.out_head | p.k.in_token | p.k.in_head | p.k.out_token |
                          p.k.out_head | p.tokens;
  return launch.width * size_of(p.dtype) == 16 && launch.lanes * launch.width * 2 == p.rotary_dim && launch.lane_chunks == 1 &&
         launch.threads() <= kRopePlainThreads && !p.mrope && p.table_dtype != DType::f64 && p.table_step == 1 &&
         table % std::min(run * number, 16) == 0 && strides >> 31 == 0;
}

// Of a head: pairs of vectors that turn, then pairs that only pass through.
inline int rope_lanes(const RopeParams& p, int width) {
  const int passing = p.in_place ? 0 : (p.head_dim - p.rotary_dim) / width;
  return p.rotary_dim / 2 / width + (passing + 1) / 2;
}

// More heads per thread keep more bytes in flight and read the table less often. With little work, more threads are better: four
// heads only if each SM still gets 8 x 512 threads, two if 2 x 1024.
inline int rope_heads_per_thread(const RopeParams& p, int lanes, const DeviceLimits& device, int most) {
  const int64_t work = p.batch * p.tokens * (p.q.heads + p.k.heads) * lanes / device.multiprocessors;
  return std::min(work >= 8 * 512 * 4 ? 4 : work >= 2 * 1024 * 2 ? 2 : 1, most);
}

inline constexpr int kRopeBlockThreads = 160;

// The most heads per thread. Two: then an SM has many small blocks, whose loads, arithmetic and stores overlap. Four where a
// block holds a token of the short kernel only so: blocks that share a token all look its row up. With M-RoPE too: there the
// threads of a token look up its sines and cosines together.
inline int rope_most_heads_per_thread(const RopeParams& p, int width, int lanes) {
  const auto threads = [&](int heads) { return ((p.q.heads + heads - 1) / heads + (p.k.heads + heads - 1) / heads) * lanes; };
  const bool short_kernel = lanes * width * 2 == p.rotary_dim && width * size_of(p.dtype) == 16;
  return p.mrope || (short_kernel && threads(2) > kRopeBlockThreads && threads(4) <= kRopeBlockThreads) ? 4 : 2;
}

// unroll, block_threads: 0 lets the function choose. token_inner: -1 likewise.
inline RopeLaunch choose_rope_launch(const RopeParams& p, const DeviceLimits& device, int unroll = 0, int block_threads = 0,
                                     int token_inner = -1) {
  const auto parts = [](int64_t all, int64_t part) { return int((all + part - 1) / part); };
  RopeLaunch launch;
  launch.width = rope_vector_width(p);
  launch.lanes = rope_lanes(p, launch.width);
  const int most_heads = rope_most_heads_per_thread(p, launch.width, launch.lanes);
  launch.unroll = std::min(unroll ? unroll : rope_heads_per_thread(p, launch.lanes, device, most_heads),
                           rope_max_unroll(launch.width * size_of(p.dtype)));
  launch.q_slots = parts(p.q.heads, launch.unroll);
  launch.slots = std::max(launch.q_slots + parts(p.k.heads, launch.unroll), 1);
  launch.token_inner = token_inner < 0 ? p.tokens > 1 && p.q.heads > 1 && p.q.in_token < p.q.in_head : token_inner != 0;
  const int most = block_threads ? block_threads : launch.token_inner || p.mrope ? 256 : kRopeBlockThreads;

  launch.lane_chunks = parts(launch.lanes, most);
  launch.lanes_per_block = parts(launch.lanes, launch.lane_chunks);
  constexpr int kInnerTokens = 8;
  launch.token_inner &= launch.lanes_per_block * kInnerTokens <= most;
  const int tokens = launch.token_inner ? kInnerTokens : 1;
  // Slots are a block's second or third dimension, and the third is limited to 64.
  const int slots = std::clamp(most / (launch.lanes_per_block * tokens), 1, 64);
  launch.slot_chunks = parts(launch.slots, slots);
  launch.slots_per_block = parts(launch.slots, launch.slot_chunks);
  // Of the token counts that fit, the one with the fewest warps per token. At least one warp, which the document search needs.
  const int threads = launch.lanes_per_block * launch.slots_per_block;
  const int fit = int(std::min<int64_t>(std::min(most / threads, 64), p.tokens));
  for (int n = 2; n <= fit; n++)
    if (parts(n * threads, 32) * launch.tokens_per_block <= parts(launch.tokens_per_block * threads, 32) * n)
      launch.tokens_per_block = n;
  launch.tokens_per_block = std::max(launch.tokens_per_block, parts(32, threads));
  launch.token_blocks = (p.tokens + launch.tokens_per_block - 1) / launch.tokens_per_block;
  launch.plain = rope_is_plain(p, launch);
  return launch;
}

#ifdef PACKOPS_WITH_CUDA
// For tests: every launch gives the same bits.
cudaError_t rope_cuda_as(const RopeParams& params, const RopeLaunch& launch, cudaStream_t stream);
#endif

}  // namespace packops

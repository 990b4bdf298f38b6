// What the kernels for long documents share: the items of work that blocks draw, and the turns of their warp groups.
#pragma once

#include "attention_launch.h"
#include "attention_tiles.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace packops {
namespace {

// Tokens of a tile's document. With shared prefixes, of its segment, if that continues no other: else 0.
template <bool kForest>
__device__ __forceinline__ int own_length(const AttentionParams& p, const AttentionTile& tile) {
  if constexpr (kForest) {
    if (tile.document >= p.axis.documents) return 0;
    const ForestSegment segment = p.prefixes.segments[tile.document];
    return segment.parent < 0 ? segment.end - segment.begin : 0;
  } else {
    return tile.document_end - tile.document_begin;
  }
}
template <bool kForest>
__device__ __forceinline__ bool is_long(const AttentionParams& p, const AttentionTile& tile) {
  return attention_is_long(own_length<kForest>(p, tile), p.window, p.long_from);
}

// The list of tiles is sorted by this: the first tile of which it is false ends what is long.
__device__ __forceinline__ bool may_be_long(const AttentionParams& p, const AttentionTile& tile) {
  return attention_is_long(tile.document_end - tile.document_begin, p.window, p.long_from);
}

// Items of work are numbers of a tile, the first of `groups` neighbours in a long document, times `heads`, plus a head. -1: there are
// no more.
template <int kGroups, bool kForest>
__device__ __forceinline__ int draw_item(const AttentionParams& p, unsigned* next, unsigned heads, unsigned end) {
  for (;;) {
    const unsigned item = atomicAdd(next, 1u);
    if (item >= end) return -1;
    const AttentionTile tile = p.tiles[item / heads];
    if (!may_be_long(p, tile)) return -1;
    if ((tile.begin - tile.document_begin) / kAttentionRows % kGroups == 0 && is_long<kForest>(p, tile)) return int(item);
  }
}

// Barriers of the block by number: 2 + i the turn of consumer i.
constexpr int kConsumersBarrier = 1, kTurnBarrier = 2;

// Consumers issue their products one after the other.
template <bool kOn, int kGroups>
class ProductTurns {
 public:
  __device__ __forceinline__ explicit ProductTurns(int group) : group_(group) {
    if (kOn && group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kOn) bar_sync(kTurnBarrier + group_, 256);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (kOn) bar_arrive(kTurnBarrier + (group_ + 1) % kGroups, 256);
  }
  __device__ __forceinline__ void finish() const {
    if (group_ == 0) wait();
  }

 private:
  int group_;
};

// Registers of a thread. A multiprocessor has 512 for the four threads of a block that share a lane.
constexpr int long_producer_registers(int groups) { return groups == 2 ? 24 : 32; }
constexpr int long_consumer_registers(int groups) { return groups == 2 ? 240 : 160; }

// ---- Launches

constexpr int32_t kNeverLong = 0x7fffffff;

template <typename... P>
cudaError_t launch_large(LaunchOptions options, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                         cudaStream_t stream, const std::type_identity_t<P>&... arguments) {
  if (blocks == 0) return cudaSuccess;  // no heads
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_with(options, kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream,
                     arguments...);
}

}  // namespace
}  // namespace packops

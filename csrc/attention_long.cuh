// What the kernels for long documents share: the items of work that blocks draw, and the turns of their warp groups.
#pragma once

#include <type_traits>

#include "attention_launch.h"
#include "attention_scores.cuh"
#include "attention_tiles.cuh"
#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace packops {
namespace {

// With shared prefixes, a tile is of a segment, and these are a root's alone: 0 and false for what continues another.
__device__ __forceinline__ int length_of(const ForestSegment& segment) { return segment.end - segment.begin; }
template <bool kForest>
__device__ __forceinline__ int own_length(const AttentionParams& p, const AttentionTile& tile) {
  if constexpr (kForest) {
    if (tile.document >= p.axis.documents) return 0;
    const ForestSegment segment = p.prefixes.segments[tile.document];
    return segment.parent < 0 ? length_of(segment) : 0;
  } else {
    return tile.document_end - tile.document_begin;
  }
}
template <bool kForest>
__device__ __forceinline__ bool is_long(const AttentionParams& p, const AttentionTile& tile) {
  return own_length<kForest>(p, tile) > p.long_from;
}

// The list of tiles is sorted by this: the first tile of which it is false ends what is long.
template <bool kForest>
__device__ __forceinline__ bool may_be_long(const AttentionParams& p, const AttentionTile& tile) {
  return first_position<kForest>(p, tile) + tile.document_end - tile.document_begin > p.long_from;
}

// Items of work are numbers of a tile, the first of `groups` neighbours in what is long, times `heads`, plus a head. -1: there are
// no more.
template <int kGroups, bool kForest, typename F>
__device__ __forceinline__ int draw_item(const AttentionParams& p, unsigned heads, unsigned end, F&& takes) {
  for (;;) {
    const unsigned item = atomicAdd(p.drawn, 1u);
    if (item >= end) return -1;
    const AttentionTile tile = p.tiles[item / heads];
    if (!may_be_long<kForest>(p, tile)) return -1;
    if ((tile.begin - tile.document_begin) / kAttentionRows % kGroups == 0 && takes(tile)) return int(item);
  }
}
// Of the backward, where kernels are the same with and without shared prefixes.
template <int kGroups>
__device__ __forceinline__ int draw_keys(const AttentionParams& p, unsigned end) {
  const auto draw = [&](auto forest) {
    return draw_item<kGroups, forest>(p, unsigned(p.kv_heads), end,
                                      [&](const AttentionTile& tile) { return is_long<forest>(p, tile); });
  };
  return p.prefixes.segments ? draw(std::true_type{}) : draw(std::false_type{});
}

#ifdef PACKOPS_SM90A

// Which slot of a ring, and the parity of its phase.
template <int kSlots>
struct RingPlace {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// An item in shared memory: one thread puts it there, and every warp of the block takes it.
struct ItemBox {
  MBarrier full, empty;
  int item;

  __device__ __forceinline__ void init(int warps) { mbarrier_init(&full, 1), mbarrier_init(&empty, warps); }
  // number: how many have been put there, or taken by this warp, before.
  __device__ __forceinline__ void put(unsigned number, int value) {
    if (number > 0) mbarrier_wait_parity(&empty, (number - 1) % 2);
    item = value;
    mbarrier_arrive(&full);
  }
  __device__ __forceinline__ int take(unsigned number, int lane) {
    int value = 0;
    if (lane == 0) {  // alone: another lane that waited might come when the box is two items further on
      mbarrier_wait_parity(&full, number % 2);
      value = item;
      mbarrier_arrive(&empty);
    }
    return __shfl_sync(kWarp, value, 0);
  }
};

#endif

// Queries of a turn of the backward.
constexpr int kLongTurn = kAttentionRows;

// The queries that see any of `rows` keys of a document from `key` on.
__device__ __forceinline__ Interval queries_of_block(const Scores& scores, int key, int rows, int length) {
  return {scores.causal ? key : 0, (scores.window ? min(length, key + rows - 1 + scores.window) : length) - 1};
}

// Barriers of the block by number: 2 + i the turn of consumer i, 8 + i its own.
constexpr int kConsumersBarrier = 1, kTurnBarrier = 2, kGroupBarrier = 8;

// Consumers issue their products one after the other.
template <int kGroups, bool kOn = true>
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

// ---- Launches
//
// Launches of a pass overlap, so that one which finds nothing to do hardly costs time, and one begins where the one before it leaves
// multiprocessors idle: forward tiles, long, short; backward queries, long split or joint, keys, queries of a joint one's sums. The second
// waits for the first. The third runs beside the second, and does not end before it. The fourth waits for the third.

// Of a kernel that may begin before the launch before it has ended. beside: it reads nothing that that one writes, but what the launch
// before that wrote, for which that one waited before it let this one begin.
__device__ __forceinline__ void begin_overlapping(bool beside) {
  if (!beside) griddepcontrol_wait();
  griddepcontrol_launch_dependents();
}
// At its end, so that what comes after it comes after both.
__device__ __forceinline__ void end_overlapping(bool beside) {
  if (beside && blockIdx.x == 0) griddepcontrol_wait();
}

// On the current device, which `device` must be.
template <auto kKernel, typename... Arguments>
cudaError_t launch_large(LaunchOptions options, const Device& device, int64_t blocks, int threads, int shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;  // no heads
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const cudaError_t error = allow_shared<kKernel>(device.index, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_with(options, kKernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream,
                     arguments...);
}

}  // namespace
}  // namespace packops

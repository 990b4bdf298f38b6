// What the kernels for long documents share: which documents are long, the items of work that blocks draw, sums of queries in memory, and the
// turns of warp groups.
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

__device__ __forceinline__ int length_of(const ForestSegment& segment) { return segment.end - segment.begin; }

// Tokens of a tile's document. With shared prefixes, of its segment, if that continues no other: else 0.
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

template <bool kForest>
__device__ __forceinline__ bool is_any_long(const AttentionParams& p) {
  if constexpr (kForest) return *p.longest > p.long_from;
  else return may_be_long<false>(p, p.tiles[0]);
}

// Items of work are numbers of a tile that draws one, times `heads`, plus a head. -1: there are no more.
template <bool kForest, typename F>
__device__ __forceinline__ int draw_item(const AttentionParams& p, unsigned heads, unsigned end, F&& draws) {
  while (!kForest || is_any_long<kForest>(p)) {
    const unsigned item = atomicAdd(p.drawn, 1u);
    if (item >= end) break;
    const AttentionTile tile = p.tiles[item / heads];
    if (!may_be_long<kForest>(p, tile)) break;
    if (draws(tile)) return int(item);
  }
  return -1;
}
// Of the backward, where kernels are the same with and without shared prefixes: the first of so many neighbours in what is long.
template <int kTiles>
__device__ __forceinline__ int draw_keys(const AttentionParams& p, unsigned end) {
  const auto draw = [&](auto forest) {
    return draw_item<forest>(p, unsigned(p.kv_heads), end, [&](const AttentionTile& tile) {
      return (tile.begin - tile.document_begin) / kAttentionRows % kTiles == 0 && is_long<forest>(p, tile);
    });
  };
  return p.prefixes.segments ? draw(std::true_type{}) : draw(std::false_type{});
}

// ---- Sums of queries in memory, fp32: of grad_q, and in the forward of results so far
//
// They are of tiles of 64 queries, counted from the document's first token, as threads hold them: vectors of four numbers, those of 128
// threads after one another: (tiles, heads, 64, columns). Behind those of the forward are its states, (tiles, heads, 64). With shared
// prefixes, a document here is a root and all that continues it, which are neighbours: segments begin anywhere in a tile.

// The number of a document's first tile among all: no two documents have the same, wherever they stand in the list of tiles.
__device__ __forceinline__ unsigned first_sums(int begin, int document) { return unsigned(begin / kAttentionRows + document); }

// The document that a tile belongs to, if it is long; with shared prefixes the root. Otherwise -1.
template <bool kForest>
__device__ __forceinline__ int long_root(const AttentionParams& p, const AttentionTile& tile) {
  if constexpr (kForest) {
    int root = tile.document;
    if (root >= p.axis.documents) return -1;
    while (p.prefixes.segments[root].parent >= 0) root = p.prefixes.segments[root].parent;
    const bool is_within = tile.begin < p.prefixes.subtree_ends[root];  // not where parents are malformed
    return is_within && length_of(p.prefixes.segments[root]) > p.long_from ? root : -1;
  } else {
    return is_long<false>(p, tile) ? tile.document : -1;
  }
}

// The sums of a head of queries [first, first + there) of a document that begins at a token. The calling threads are a warp group.
// kAnywhere: they need not be those of one tile, and others' are left alone.
template <int D, bool kAnywhere>
class QuerySums {
 public:
  __device__ __forceinline__ QuerySums(const AttentionParams& p, int begin, int document, int head, int first, int there)
      : tile_(int64_t(first_sums(begin, document)) * p.heads + head),
        heads_(p.heads),
        first_(first),
        there_(there),
        sums_(p.parts),
        states_(reinterpret_cast<float2*>(p.parts + attention_sums(p.tokens, p.axis.documents, p.heads, D))) {}
  static __device__ __forceinline__ QuerySums of(const AttentionParams& p, const AttentionTile& tile, int root, int head) {
    const int begin = kAnywhere ? p.prefixes.segments[root].begin : tile.document_begin;
    return {p, begin, root, head, tile.begin - begin, tile.end - tile.begin};
  }

  __device__ __forceinline__ void store(const Sums<1, D>& sums, int thread) const {
    if constexpr (kAnywhere) for_each_pair(thread, [&](float2& two, int n, int i) { two = {sums[0][n][i], sums[0][n][i + 1]}; });
    else for_each_four(thread, [&](float4& four, int n) { four = {sums[0][n][0], sums[0][n][1], sums[0][n][2], sums[0][n][3]}; });
  }
  __device__ __forceinline__ void load(Sums<1, D>& sums, int thread) const {
    if constexpr (kAnywhere)
      for_each_pair(thread, [&](float2& two, int n, int i) { sums[0][n][i] = two.x, sums[0][n][i + 1] = two.y; });
    else
      for_each_four(thread, [&](float4& four, int n) {
        sums[0][n][0] = four.x, sums[0][n][1] = four.y, sums[0][n][2] = four.z, sums[0][n][3] = four.w;
      });
  }
  __device__ __forceinline__ void clear(int thread) const {
    if constexpr (kAnywhere) for_each_pair(thread, [](float2& two, int, int) { two = {0, 0}; });
    else for_each_four(thread, [](float4& four, int) { four = {0, 0, 0, 0}; });
  }
  // Of the forward: the greatest score of a query, and the sum of its exponentials relative to that.
  __device__ __forceinline__ float2& state(int row) const {
    return states_[place(first_ + row) * kAttentionRows + (first_ + row) % kAttentionRows];
  }

 private:
  int64_t tile_;
  int heads_, first_, there_;
  float* sums_;
  float2* states_;

  __device__ __forceinline__ int64_t place(int query) const { return tile_ + int64_t(query / kAttentionRows) * heads_; }
  template <typename F>
  __device__ __forceinline__ void for_each_four(int thread, F&& f) const {
    float4* of = reinterpret_cast<float4*>(sums_ + place(first_) * (kAttentionRows * D)) + thread;
#pragma unroll
    for (int n = 0; n < D / 8; n++) f(of[n * 128], n);
  }
  template <typename F>
  __device__ __forceinline__ void for_each_pair(int thread, F&& f) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = thread / 32 * 16 + 8 * half + thread % 32 / 4, in_tile = (first_ + row) % kAttentionRows;
      if (row >= there_) continue;
      float2* of = reinterpret_cast<float2*>(sums_ + place(first_ + row) * (kAttentionRows * D)) +
                   2 * (in_tile / 16 * 32 + in_tile % 8 * 4 + thread % 4) + in_tile % 16 / 8;
#pragma unroll
      for (int n = 0; n < D / 8; n++) f(of[n * 256], n, 2 * half);
    }
  }
};

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
// multiprocessors idle: forward tiles, long, short (of which branches of a long root wait for it); backward queries, long split or joint,
// keys, queries of a joint one's sums. The second waits for the first. The third runs beside the second, and does not end before it. The
// fourth waits for the third.

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
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const cudaError_t error = allow_shared<kKernel>(device.index, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch_with(options, kKernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream,
                     arguments...);
}

}  // namespace
}  // namespace packops

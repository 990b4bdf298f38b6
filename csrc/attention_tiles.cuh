// Attention on CUDA: the first kernel, cu_seqlens -> tiles of tokens of one document, and the keys that a tile sees.
#pragma once

#include "attention.h"
#include "common/ptx.cuh"
#include "packed_forest.h"

namespace packops {
namespace {

constexpr unsigned kWarp = 0xffffffffu;

constexpr int kClasses = 1024;  // documents are sorted by the tiles that see them, most first: a thread per class

template <typename Index>
__global__ void __launch_bounds__(kClasses) tiles_kernel(const __grid_constant__ AttentionParams p, int64_t capacity) {
  using Count = unsigned;
  __shared__ Count next[kClasses];  // the place of the next document of a class
  __shared__ Count sums[33], overlaps;
  __shared__ int32_t longest;
  const Index* cu_seqlens = static_cast<const Index*>(p.axis.cu_seqlens);
  const auto bound = [&](int64_t i) { return int32_t(max(int64_t(0), min(p.tokens, int64_t(cu_seqlens[i])))); };
  const auto tiles_of = [](int32_t tokens) { return (tokens + kAttentionRows - 1) / kAttentionRows; };
  // Where all that sees its keys ends. A short prefix of many branches is as much work for the backward as a long document.
  const auto seen_until = [&](int64_t i) {
    return p.prefixes.segments ? max(bound(i + 1), p.prefixes.subtree_ends[i]) : bound(i + 1);
  };
  // What its queries see, too: a branch of a long prefix is long.
  const auto class_of = [&](int64_t i) {
    const int32_t before = p.prefixes.segments ? p.prefixes.segments[i].position : 0;
    return kClasses - min(tiles_of(before + seen_until(i) - bound(i)), kClasses);
  };
  const auto put = [&](Count place, int32_t begin, int32_t end, int32_t document_begin, int32_t document_end, int64_t document) {
    if (place < Count(capacity))
      p.tiles[place] = {begin, min(end, begin + kAttentionRows), document_begin, document_end, int32_t(document)};
  };
  const int me = int(threadIdx.x), lane = me % 32, warp = me / 32;
  griddepcontrol_launch_dependents();
  if (me == 0) *p.drawn = overlaps = 0, longest = 0;
  next[me] = 0;
  __syncthreads();
  for (int64_t i = me; i < p.axis.documents; i += kClasses) {
    const int32_t tokens = bound(i + 1) - bound(i);
    if (tokens > 0) atomicAdd(&next[class_of(i)], Count(tiles_of(tokens)));
    if (tokens < 0) atomicAdd(&overlaps, 1u);
    if (p.prefixes.segments && p.prefixes.segments[i].parent < 0) atomicMax(&longest, tokens);
  }
  __syncthreads();
  // Documents that overlap may need more tiles than there is room for, and blocks wait for those of other tiles. So all is padding.
  const int64_t documents = overlaps ? 0 : p.axis.documents;
  if (me == 0 && p.prefixes.segments) *p.longest = longest;

  Count before = next[me];
  const Count mine = before;
  for (int by = 1; by < 32; by *= 2) {
    const Count other = __shfl_up_sync(kWarp, before, by);
    if (lane >= by) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  if (me == 0) {
    Count sum = 0;
    for (int w = 0; w < 32; w++) {
      const Count here = sums[w];
      sums[w] = sum;
      sum += here;
    }
    sums[32] = sum;
  }
  __syncthreads();
  next[me] = sums[warp] + before - mine;
  __syncthreads();

  for (int64_t i = me; i < documents; i += kClasses) {
    const int32_t begin = bound(i), end = bound(i + 1);
    const int tiles = tiles_of(end - begin);
    if (tiles <= 0) continue;
    // The order of documents within a class varies between runs; no result depends on it.
    const Count place = atomicAdd(&next[class_of(i)], Count(tiles));
    for (int t = 0; t < tiles; t++) put(place + Count(t), begin + t * kAttentionRows, end, begin, seen_until(i), i);
  }
  const int32_t padding = overlaps ? 0 : bound(documents);
  const Count used = overlaps ? 0 : sums[32];
  for (Count place = used + Count(me); place < Count(capacity); place += kClasses) {
    const int64_t begin = padding + int64_t(place - used) * kAttentionRows;
    if (begin < p.tokens) put(place, int32_t(begin), int32_t(p.tokens), int32_t(begin), int32_t(begin), p.axis.documents);
    else put(place, 0, 0, 0, 0, p.axis.documents);
  }
}

// The keys that a tile's queries see, a turn at a time, by position: those of their document. With shared prefixes those of their
// own segment, then those of the segment that it continues, and so on up to the root, or up to the segment before it.
template <bool kForest, int kKeys>
struct KeyTurns {
  int key, end;    // positions: the turn's first key, and where the keys of its segment end
  int row;         // of position 0, counted from first_row()
  int number = 0;  // of the turn

  __device__ __forceinline__ KeyTurns(const AttentionParams& p, const AttentionTile& tile, int query, int window,
                                      bool without_root = false)
      : segments_(p.prefixes.segments), without_root_(without_root), seen_from_(window ? max(0, query - window + 1) : 0) {
    if constexpr (kForest) {
      if (tile.document < p.axis.documents) {
        enter(tile.document);
        end = min(end, query + kAttentionRows);
        climb();
      } else {
        key = end = 0;
      }
    } else {
      const int length = tile.document_end - tile.document_begin;
      key = seen_from_ / kKeys * kKeys;
      end = p.causal ? min(length, query + kAttentionRows) : length;
      row = 0;
    }
  }
  static __device__ __forceinline__ int first_row(const AttentionTile& tile) { return kForest ? 0 : tile.document_begin; }
  __device__ __forceinline__ bool is_there() const { return key < end; }
  __device__ __forceinline__ KeyTurns next() const {
    KeyTurns turn = *this;
    turn.key += kKeys;
    if constexpr (kForest) turn.number++, turn.climb();
    return turn;
  }
  // Without shared prefixes it follows from the key, and costs no register.
  __device__ __forceinline__ int buffer(int buffers) const { return (kForest ? number : key / kKeys) % buffers; }

 private:
  const ForestSegment* segments_;
  bool without_root_;
  int seen_from_, begin_, parent_;

  __device__ __forceinline__ void enter(int segment) {
    const ForestSegment of = segments_[segment];
    begin_ = of.position, parent_ = of.parent;
    if (without_root_ && parent_ >= 0 && segments_[parent_].parent < 0) parent_ = -1;
    key = begin_ + max(0, seen_from_ - begin_) / kKeys * kKeys;
    end = begin_ + of.end - of.begin;
    row = of.begin - begin_;
  }
  __device__ __forceinline__ void climb() {
    while (key >= end && parent_ >= 0 && seen_from_ < begin_) enter(parent_);
  }
};

// The position of the first token of a tile's document, or segment.
template <bool kForest>
__device__ __forceinline__ int first_position(const AttentionParams& p, const AttentionTile& tile) {
  if constexpr (kForest) return tile.document < p.axis.documents ? p.prefixes.segments[tile.document].position : 0;
  else return 0;
}
// The position of a tile's first token in its document.
template <bool kForest>
__device__ __forceinline__ int position_of(const AttentionParams& p, const AttentionTile& tile) {
  return first_position<kForest>(p, tile) + tile.begin - tile.document_begin;
}

}  // namespace
}  // namespace packops

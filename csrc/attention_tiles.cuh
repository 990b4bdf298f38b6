// Attention on CUDA, its first kernel: cu_seqlens -> tiles of tokens of one document.
#pragma once

#include "attention.h"

namespace packops {
namespace {

constexpr unsigned kWarp = 0xffffffffu;

constexpr int kClasses = 1024;  // documents are sorted by their number of tiles, largest first: a thread per class

template <typename Index>
__global__ void __launch_bounds__(kClasses) tiles_kernel(const __grid_constant__ AttentionParams p, int64_t capacity) {
  using Count = unsigned;           // may overflow if malformed documents overlap, which never gives an address outside
  __shared__ Count next[kClasses];  // the place of the next document of a class
  __shared__ Count sums[33];
  const Index* cu_seqlens = static_cast<const Index*>(p.axis.cu_seqlens);
  const auto bound = [&](int64_t i) { return int32_t(max(int64_t(0), min(p.tokens, int64_t(cu_seqlens[i])))); };
  const auto tiles_of = [](int32_t tokens) { return (tokens + kAttentionRows - 1) / kAttentionRows; };
  const auto class_of = [](int tiles) { return kClasses - min(tiles, kClasses); };
  const auto put = [&](Count place, int32_t begin, int32_t end, int32_t document, int32_t document_end) {
    if (place < Count(capacity)) p.tiles[place] = {begin, min(end, begin + kAttentionRows), document, document_end};
  };
  const int me = int(threadIdx.x), lane = me % 32, warp = me / 32;
  next[me] = 0;
  __syncthreads();
  for (int64_t i = me; i < p.axis.documents; i += kClasses)
    if (const int tiles = tiles_of(bound(i + 1) - bound(i)); tiles > 0) atomicAdd(&next[class_of(tiles)], Count(tiles));
  __syncthreads();

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

  for (int64_t i = me; i < p.axis.documents; i += kClasses) {
    const int32_t begin = bound(i), end = bound(i + 1);
    const int tiles = tiles_of(end - begin);
    if (tiles <= 0) continue;
    // The order of documents within a class varies between runs; no result depends on it.
    const Count place = atomicAdd(&next[class_of(tiles)], Count(tiles));
    for (int t = 0; t < tiles; t++) put(place + Count(t), begin + t * kAttentionRows, end, begin, end);
  }
  const int32_t padding = bound(p.axis.documents);
  const Count used = sums[32];
  for (Count place = used + Count(me); place < Count(capacity); place += kClasses) {
    const int64_t begin = padding + int64_t(place - used) * kAttentionRows;
    if (begin < p.tokens) put(place, int32_t(begin), int32_t(p.tokens), int32_t(begin), int32_t(begin));
    else put(place, 0, 0, 0, 0);
  }
}

}  // namespace
}  // namespace packops

// Slices of the queries that see the keys of a short prefix, for the kernel for keys. Part of attention.cu.
//
// A slice's block leaves its sums in memory, in fp32. Whichever block of a tile of keys comes last adds all of them up, in the order of the
// queries, so the same bits come out at every run. No block waits for another.
//
// The first slice is that of the list's tile. The others belong to blocks behind those of the list, one for every 64 tokens of the row: a
// tree has at least as many of these as its root has further slices.
#pragma once

#include "attention_launch.h"
#include "attention_long.cuh"
#include "attention_products.cuh"
#include "common/documents.h"
#include "packed_forest.h"

namespace packops {
namespace {

// What a block of the kernel for keys has to do: a tile of keys, and a slice of the queries that see them.
template <bool kForest>
class KeysWork {
 public:
  AttentionTile tile;
  AttentionSlices slices;
  int slice = 0;

  // place: in the list of tiles, or behind it.
  __device__ __forceinline__ KeysWork(const AttentionParams& p, unsigned place) {
    if constexpr (kForest) {
      const unsigned listed = unsigned(attention_tiles(p.tokens, p.axis.documents));
      if (place >= listed) {
        take_further(p, int(place - listed) * kAttentionRows);
      } else {
        tile = p.tiles[place];
        slices = attention_slices(own_length<true>(p, tile), tile.document_end - tile.document_begin, p.heads / p.kv_heads);
      }
    } else {
      tile = p.tiles[place];
    }
  }

  // Adds up the sums of all slices: for_each_sums(f) calls f(the block's sums, 0 or 1: which of two gradients). `holds`: this thread has
  // some, one of kThreads. False where that is left to another block.
  template <int D, int kThreads, typename F>
  __device__ __forceinline__ bool add_up(const AttentionParams& p, int kv_head, int counter, bool holds, int thread,
                                         F&& for_each_sums) const {
    const int tiles = attention_whole_tiles(length_of(p.prefixes.segments[tile.document])) / kAttentionRows;
    // Behind the sums of queries, where there are any.
    float* parts = p.parts;
    if (p.long_from != kNeverLong && !attention_keys_split(D)) parts += attention_sums(p.tokens, p.axis.documents, p.heads, D);
    const unsigned first = first_sums(tile.begin, tile.document);
    const auto for_each_four = [&](int of_slice, auto&& f) {
      const int64_t place = int64_t(first + unsigned(of_slice * tiles)) * p.kv_heads + kv_head;
      for_each_sums([&](auto& sums, int which) {
        float4* at = reinterpret_cast<float4*>(parts + (2 * place + which) * (kAttentionRows * D)) + thread;
#pragma unroll
        for (auto& row : sums)
#pragma unroll
          for (auto& four : row) f(four, *at), at += kThreads;
      });
    };
    if (holds) for_each_four(slice, [](float (&x)[4], float4& at) { at = {x[0], x[1], x[2], x[3]}; });
    __threadfence();
    __syncthreads();
    const bool is_last =
        threadIdx.x == 0 && atomicAdd(p.added + 2 * (int64_t(first) * p.heads + kv_head) + counter, 1) == slices.count - 1;
    if (!__syncthreads_or(is_last)) return false;
    __threadfence();
    if (!holds) return true;
    for (int i = 0; i < slices.count; i++)
      for_each_four(i, [&](float (&x)[4], float4& at) {
        const float4 part = __ldcg(&at);
        if (i == 0) x[0] = x[1] = x[2] = x[3] = 0;
        x[0] += part.x, x[1] += part.y, x[2] += part.z, x[3] += part.w;
      });
    return true;
  }

 private:
  // A slice of the tree that a token is in, unless there are no more.
  __device__ __forceinline__ void take_further(const AttentionParams& p, int token) {
    PackedAxis trees;
    trees.cu_seqlens = p.prefixes.trees, trees.documents = p.axis.documents;
    const int root = int(Documents<int32_t>(trees).find(token));
    if (root >= p.axis.documents) return;
    const ForestSegment of = p.prefixes.segments[root];
    const int end = p.prefixes.subtree_ends[root], tiles = attention_whole_tiles(length_of(of)) / kAttentionRows;
    slices = attention_slices(length_of(of), end - of.begin, p.heads / p.kv_heads);
    if (slices.count == 1 || of.parent >= 0 || token < of.begin) return;
    const int number = (token - of.begin) / kAttentionRows;
    slice = 1 + number / tiles;
    if (slice >= slices.count) return;
    const int begin = of.begin + number % tiles * kAttentionRows;
    tile = {begin, min(begin + kAttentionRows, of.end), of.begin, end, root};
  }
};

}  // namespace
}  // namespace packops

// What both forms of the backward of long documents share (attention_long_joint.cuh, attention_long_split.cuh): turns of 64 queries and
// their gradients, which one warp copies into a ring of shared memory, for two consumers, warp groups.
//
// Tensor maps copy whole tiles. They do not know where a document ends, and rows past its end must be zeros, since the next document
// may hold NaN: so threads of the warp copy its last tile.
#pragma once

#include "attention_long.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "common/hopper.cuh"
#include "common/tensor_map.cuh"

namespace packops {
namespace {

// Queries of a turn.
constexpr int kLongTurn = kAttentionRows;

// The queries that see any of `rows` keys of a document from `key` on.
__device__ __forceinline__ Interval queries_of_block(const Scores& scores, int key, int rows, int length) {
  return {scores.causal ? key : 0, (scores.window ? min(length, key + rows - 1 + scores.window) : length) - 1};
}

struct QueryMaps {
  CUtensorMap queries, grads;
};
template <int D>
bool encode_query_maps(QueryMaps* maps, const AttentionParams& p) {
  const auto encode = [&](CUtensorMap* map, const Heads& x) {
    return encode_tensor_map(map, p.dtype, x.data, {D, p.heads, p.tokens}, {x.head, x.token}, kLongTurn);
  };
  return p.heads == 0 || (encode(&maps->queries, p.q) && encode(&maps->grads, p.grad_out));
}

#ifdef PACKOPS_SM90A

// A turn is full when its copies have arrived, and empty when all warps of the consumers have released it.
template <int D, int kTurns>
struct QueryRing {
  static constexpr int kTile = 2 * D * kLongTurn;
  using Place = RingPlace<kTurns>;
  char tiles[kTurns][2][kTile];  // queries, gradients; whoever has a ring puts it at a multiple of 1024 bytes
  float lse[kTurns][kLongTurn], delta[kTurns][kLongTurn];
  MBarrier full[kTurns], empty[kTurns];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kTurns; i++) mbarrier_init(&full[i], 1 + 32), mbarrier_init(&empty[i], 2 * 4);
  }
  // Of the consumers. `there`: rows of the tiles that are the document's.
  __device__ __forceinline__ void wait_full(const Place& at, int there) {
    mbarrier_wait_parity(&full[at.slot], uint32_t(at.parity));
    if (there < kLongTurn) fence_proxy_async();  // threads have written them
  }
  __device__ __forceinline__ void release(const Place& at, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[at.slot]);
  }
  // Of the warp that copies: the next turn, of the queries of a head from `query` on in a document of `length` tokens.
  template <typename T>
  __device__ __forceinline__ void fill(Place& at, const QueryMaps& maps, const AttentionParams& p, int document_begin, int head,
                                       int query, int length, int lane) {
    const int token = document_begin + query, there = length - query;
    const bool whole = there >= kLongTurn;
    MBarrier* barrier = &full[at.slot];
    if (lane == 0) {  // alone: another lane that waited might come when the turn is full and empty again
      mbarrier_wait_parity(&empty[at.slot], uint32_t(at.parity ^ 1));
      mbarrier_arrive_expect_tx(barrier, whole ? 2 * kTile : 0);
    }
    __syncwarp();
    const auto copy = [&](char* tile, const CUtensorMap& map, const Heads& heads) {
      if (whole) {
        if (lane > 0) return;
#pragma unroll
        for (int panel = 0; panel < D / 64; panel++)
          hopper::tma_load_3d(tile + panel * (128 * kLongTurn), map, 64 * panel, head, token, barrier);
      } else {
        const T* rows = head_of<T>(heads, token, head);
#pragma unroll 1  // the warp has few registers
        for (int i = lane; i < kLongTurn * (D / 8); i += 32) {
          const int row = i / (D / 8), chunk = i % (D / 8);
          const bool is_there = row < there;
          cp_async_16_zfill(place<kLongTurn>(tile, row, chunk), rows + (is_there ? row * heads.token : 0) + chunk * 8, is_there);
        }
      }
    };
    copy(tiles[at.slot][0], maps.queries, p.q);
    copy(tiles[at.slot][1], maps.grads, p.grad_out);
    const int64_t row = head * p.tokens + token;
#pragma unroll
    for (int i = lane; i < kLongTurn; i += 32) {
      const int64_t from = row + (i < there ? i : 0);
      cp_async_4_zfill(&lse[at.slot][i], static_cast<const float*>(p.lse) + from, i < there);
      cp_async_4_zfill(&delta[at.slot][i], p.delta + from, i < there);
    }
    cp_async_mbarrier_arrive(barrier);
    at.advance();
  }
};

#endif

}  // namespace
}  // namespace packops

// grad_k and grad_v of long documents of 256 features, on Hopper. Part of attention.cu, and with the same bits as its keys_kernel.
//
// A block has a multiprocessor to itself and takes one item of work after another, 64 keys of a document and a head of keys and values.
// Of two consumers, the first makes grad_v and passes the weights on to the second, which makes grad_k: there are no registers for both
// in one.
//
// What bounds attention.cu's kernels on long documents is shared memory: every warp group copies what it multiplies there for
// itself, and reads both operands of 64 x 64 products, at 128 bytes a cycle as fast as the tensor cores can multiply them. Here a
// copy serves both groups, and while one multiplies, the other has its exponentials.
#pragma once

#include <algorithm>

#include "attention_launch.h"
#include "attention_long_backward.cuh"
#include "attention_products.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "common/launch.cuh"

namespace packops {
namespace {

#ifdef PACKOPS_SM90A

template <int D>
struct LongSplitShared {
  static constexpr int kTile = 2 * D * kAttentionRows;
  alignas(1024) char keys_values[2][kTile];
  QueryRing<D, attention_long_turns(D)> ring;
  float4 passed[kLongTurn / 8][128];  // weights of a turn
  MBarrier written, read;
  ItemBox box;
};

template <typename T, int D>
__device__ __forceinline__ void copy_queries_by_head(const QueryMaps& maps, const AttentionParams& p, const Scores& scores,
                                                     LongSplitShared<D>& s, unsigned end, int lane) {
  const unsigned heads = unsigned(p.kv_heads);
  const int group = p.heads / p.kv_heads;
  typename decltype(s.ring)::Place at;
  for (unsigned items = 0;; items++) {
    if (lane == 0) s.box.put(items, draw_item<1, false>(p, heads, end));
    const int item = s.box.take(items, lane);
    if (item < 0) break;
    const AttentionTile tile = p.tiles[unsigned(item) / heads];
    const int kv_head = int(unsigned(item) % heads), length = tile.document_end - tile.document_begin;
    const Interval queries = queries_of_block(scores, tile.begin - tile.document_begin, kAttentionRows, length);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int query = queries.first; query <= queries.last; query += kLongTurn)
        s.ring.template fill<T>(at, maps, p, tile.document_begin, head, query, length, lane);
  }
  cp_async_wait_all();
}

#endif

// The first consumer makes grad_v, the second grad_k. One exponential for both: the first passes its weights, times the slope of a
// softcap, on in fp32. The two are half a turn apart, since the second waits for them, and so one multiplies while the other does
// not.
template <typename T, int D>
__global__ void __launch_bounds__(kAttentionLongKeysThreads, 1)
    long_split_kernel(const __grid_constant__ QueryMaps maps, const __grid_constant__ AttentionParams p,
                      const __grid_constant__ Scores scores, unsigned end) {
#ifdef PACKOPS_SM90A
  begin_overlapping(false);
  using Product = Products<T, D, true>;
  using Shared = LongSplitShared<D>;
  static_assert(sizeof(Shared) <= attention_long_keys_shared(D));
  Shared& s = *dynamic_shared<Shared>();
  auto& ring = s.ring;
  const int role = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, lane = thread % 32;
  const unsigned heads = unsigned(p.kv_heads);
  if (threadIdx.x == 0) {
    ring.init();
    mbarrier_init(&s.written, 128), mbarrier_init(&s.read, 128);
    s.box.init(8 + 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (role == 2) {
    setmaxnreg_dec<attention_producer_registers(2)>();
    if (thread < 32) copy_queries_by_head<T, D>(maps, p, scores, s, end, lane);
  } else {
    setmaxnreg_inc<attention_consumer_registers(2)>();
    const int first_row = thread / 32 * 16, group = p.heads / p.kv_heads;
    char* mine = s.keys_values[role];
    typename decltype(s.ring)::Place at;
    unsigned turns = 0;  // of all items
    for (unsigned items = 0;; items++) {
      const int item = s.box.take(items, lane);
      if (item < 0) break;
      const AttentionTile tile = p.tiles[unsigned(item) / heads];
      const int kv_head = int(unsigned(item) % heads), there = tile.end - tile.begin;
      const int length = tile.document_end - tile.document_begin, key = tile.begin - tile.document_begin;
      const Interval queries = queries_of_block(scores, key, kAttentionRows, length);
      const int count = (queries.last - queries.first + kLongTurn) / kLongTurn * group;
      Rows<T, D, kAttentionRows, 128>(role == 0 ? p.k : p.v, tile.begin, kv_head, thread).load(mine, 0, there);
      cp_async_commit_group();
      cp_async_wait_all();
      fence_proxy_async();
      bar_sync(kGroupBarrier + role, 128);

      // Role 0: products of keys and queries, then grad_v. Role 1: of values and gradients, then grad_k.
      Sums<1, D> grad;
      Sums<1, kLongTurn> x;
      for_each(grad, [](float& x, int, int, int) { x = 0; });
      const auto multiply = [&](int slot) {
        Product::template multiply_rows<kAttentionRows, kLongTurn>(x, mine, 0, ring.tiles[slot][role], 0, lane);
        Product::commit();
      };
      int query = queries.first;
      ring.wait_full(at, length - query);
      wgmma_fence_operand(grad[0]);
      Product::begin();
      multiply(at.slot);
      auto last = at;
      const auto add = [&](int turn, auto next_follows) {
        constexpr bool kNext = decltype(next_follows)::value;
        const float *lse = ring.lse[at.slot], *delta = ring.delta[at.slot];
        const unsigned parity = turns % 2;
        const bool masked = !scores.all_see(query, query + kLongTurn, key, key + kAttentionRows, length);
        const auto seen = [&](int row) { return scores.queries_of(key + first_row + row); };
        Product::wait(x, grad);
        if (turn > 0) ring.release(last, lane);
        if (role == 0) {
          mbarrier_wait_parity(&s.read, parity ^ 1);
#pragma unroll
          for (int n = 0; n < kLongTurn / 8; n++) {
            float slope[4] = {1, 1, 1, 1};
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float& weight = x[0][n][i];
              if (scores.capped) weight = scores.cap(weight), slope[i] = 1.f - weight * weight;
              weight = ex2_approx(fmaf(weight, scores.scale, -lse[8 * n + 2 * (lane % 4) + i % 2]));
            }
            s.passed[n][thread] = {x[0][n][0] * slope[0], x[0][n][1] * slope[1], x[0][n][2] * slope[2], x[0][n][3] * slope[3]};
          }
          mbarrier_arrive(&s.written);
        } else {
          mbarrier_wait_parity(&s.written, parity);
#pragma unroll
          for (int n = 0; n < kLongTurn / 8; n++) {
            const float4 w = s.passed[n][thread];
            const float even = delta[8 * n + 2 * (lane % 4)], odd = delta[8 * n + 2 * (lane % 4) + 1];
            x[0][n][0] = w.x * (x[0][n][0] - even);
            x[0][n][1] = w.y * (x[0][n][1] - odd);
            x[0][n][2] = w.z * (x[0][n][2] - even);
            x[0][n][3] = w.w * (x[0][n][3] - odd);
          }
          mbarrier_arrive(&s.read);
        }
        if (masked) mask(x, query, lane, 0.f, seen);
        const typename Product::template Left<1, kLongTurn / 8> left(x);
        query += kLongTurn;
        if (query > queries.last) query = queries.first;  // the next head
        last = at;
        at.advance();
        if constexpr (kNext) ring.wait_full(at, length - query);
        wgmma_fence_operand(grad[0]);
        wgmma_fence_operand(x[0]);
        Product::begin();
        Product::template add_weighted_rows<kLongTurn>(grad, left, ring.tiles[last.slot][1 - role], 0, lane);
        Product::commit();
        if constexpr (kNext) multiply(at.slot);
        turns++;
      };
      int turn = 0;
      for (; turn + 1 < count; turn++) add(turn, std::true_type{});
      add(turn, std::false_type{});
      Product::wait(grad);
      ring.release(last, lane);
      const int64_t stride = int64_t(p.kv_heads) * D, first = tile.begin * stride + kv_head * D;
      const float scale = role ? scores.product_scale : 1.f;
      const float factor[1][2] = {{scale, scale}};
      store_rows<T, D, kAttentionRows, 1>(static_cast<T*>(role ? p.grad_k : p.grad_v) + first, stride, there, mine, first_row,
                                          lane, grad, factor);
      bar_sync(kGroupBarrier + role, 128);  // all have stored what lies where the next keys and values come
    }
  }
#endif
}

template <typename T, int D>
cudaError_t launch_long_split(const AttentionParams& p, int64_t tiles, const Device& device, cudaStream_t stream) {
  const int64_t items = tiles * p.kv_heads;
  QueryMaps maps;
  if (items > 0x7fffffff || !encode_query_maps<D>(&maps, p)) return cudaErrorInvalidValue;
  return launch_large<long_split_kernel<T, D>>({.follows = true}, device, std::min<int64_t>(device.multiprocessors, items),
                                               kAttentionLongKeysThreads, attention_long_keys_shared(D), stream, maps, p, Scores(p),
                                               unsigned(items));
}

}  // namespace
}  // namespace packops

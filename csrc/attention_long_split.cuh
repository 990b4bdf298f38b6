// grad_k and grad_v of long documents of more than 128 features, on Hopper. Part of attention.cu, and with the same bits as its keys_kernel.
//
// A block has a multiprocessor to itself and takes one item of work after another, 64 keys of a document and a head of keys and values. A
// producer, one warp group, streams tiles of 64 queries and gradients through a ring of shared memory. Of two consumers, the first makes
// grad_v and passes the weights on to the second, which makes grad_k: there are no registers for both in one.
//
// What bounds attention.cu's kernels on long documents is shared memory: every warp group copies what it multiplies there for
// itself, and reads both operands of 64 x 64 products, at 128 bytes a cycle as fast as the tensor cores can multiply them. Here a
// copy serves both groups, and while one multiplies, the other has its exponentials.
//
// Copies are cp.async of a warp group. Tensor maps, as in attention_long_joint.cuh, took 1.04 times as long here.
#pragma once

#include <algorithm>

#include "attention_launch.h"
#include "attention_long.cuh"
#include "attention_products.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "common/launch.cuh"

namespace packops {
namespace {

// ---- Shared memory

#ifdef PACKOPS_SM90A

// Slots of a tile of 64 rows each, numbered on and on as they are used. A slot is full when the copies of all threads of the
// producer have arrived, and empty when all warps of the consumers have released it.
template <int D, int kSlots>
class SlotRing {
 public:
  static constexpr int kTileBytes = kRowBytes<D> * kAttentionRows;
  __device__ __forceinline__ SlotRing(char* tiles, MBarrier* barriers) : tiles_(tiles), barriers_(barriers) {}
  __device__ __forceinline__ void init(int consumer_warps) const {
    for (int i = 0; i < kSlots; i++) mbarrier_init(full(unsigned(i)), 128), mbarrier_init(empty(unsigned(i)), consumer_warps);
  }
  __device__ __forceinline__ char* tile(unsigned slot) const { return tiles_ + slot % kSlots * kTileBytes; }
  // Of the producer
  __device__ __forceinline__ void wait_empty(unsigned slot) const { mbarrier_wait_parity(empty(slot), slot / kSlots % 2 ^ 1); }
  __device__ __forceinline__ void commit(unsigned slot) const { cp_async_mbarrier_arrive(full(slot)); }
  // Of the consumers
  __device__ __forceinline__ void wait_full(unsigned slot) const {
    mbarrier_wait_parity(full(slot), slot / kSlots % 2);
    fence_proxy_async();
  }
  __device__ __forceinline__ void release(unsigned slot, int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty(slot));
  }

 private:
  char* tiles_;
  MBarrier* barriers_;
  __device__ __forceinline__ MBarrier* full(unsigned slot) const { return barriers_ + slot % kSlots; }
  __device__ __forceinline__ MBarrier* empty(unsigned slot) const { return barriers_ + kSlots + slot % kSlots; }
};

// ---- Kernels

// The producer: queries and gradients of all heads of a group. lse and delta of a turn come with its
// queries, into `numbers`.
template <typename T, int D, bool kPadded, int kSlots>
__device__ __forceinline__ void produce_queries(const AttentionParams& p, const Scores& scores, const SlotRing<D, kSlots>& ring,
                                                float* numbers, ItemBox& box, unsigned end, int thread) {
  const unsigned heads = unsigned(p.kv_heads);
  const int group = p.heads / p.kv_heads;
  const Columns<D, kPadded> columns(p.head_dim);
  unsigned slot = 0;
  for (unsigned items = 0;; items++) {
    if (thread == 0) box.put(items, draw_keys<1>(p, end));
    const int item = box.take(items, thread % 32);
    if (item < 0) break;
    const AttentionTile tile = p.tiles[unsigned(item) / heads];
    const int kv_head = int(unsigned(item) % heads), length = tile.document_end - tile.document_begin;
    const Interval queries = queries_of_block(scores, tile.begin - tile.document_begin, kAttentionRows, length);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
      const Rows<T, D, kLongTurn, 128, kPadded> from_q(p.q, tile.document_begin, head, thread, columns),
          from_grad(p.grad_out, tile.document_begin, head, thread, columns);
      const float* from = (thread < 64 ? static_cast<const float*>(p.lse) : p.delta) + head * p.tokens + tile.document_begin;
      for (int query = queries.first; query <= queries.last; query += kLongTurn) {
        ring.wait_empty(slot);
        from_q.load(ring.tile(slot), query, length - query);
        const int i = query + thread % 64;
        cp_async_4_zfill(numbers + slot / 2 % (kSlots / 2) * 128 + thread, from + (i < length ? i : 0), i < length);
        ring.commit(slot++);
        ring.wait_empty(slot);
        from_grad.load(ring.tile(slot), query, length - query);
        ring.commit(slot++);
      }
    }
  }
  cp_async_wait_all();
}

#endif

// The first consumer makes grad_v, the second grad_k. One exponential for both: the first passes its weights, times the slope of a
// softcap, on in fp32. The two are half a turn apart, since the second waits for them, and so one multiplies while the other does
// not.
template <typename T, int D, bool kPadded>
__global__ void __launch_bounds__(kAttentionLongKeysThreads, 1)
    long_split_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Scores scores, unsigned end) {
#ifdef PACKOPS_SM90A
  begin_overlapping(false);
  constexpr int kSlots = 2 * attention_long_turns(D);
  using Product = Products<T, D, true>;
  using Ring = SlotRing<D, kSlots>;
  char* fixed = dynamic_shared<char>();  // keys, values
  char* slots = fixed + 2 * Ring::kTileBytes;
  float4* passed = reinterpret_cast<float4*>(slots + kSlots * Ring::kTileBytes);  // of a turn: 8 x 128
  float* numbers = reinterpret_cast<float*>(passed + 8 * 128);
  MBarrier *barriers = reinterpret_cast<MBarrier*>(numbers + kSlots / 2 * 128), *written = barriers + 2 * kSlots,
           *read = written + 1;
  ItemBox& box = *reinterpret_cast<ItemBox*>(read + 1);
  const Ring ring(slots, barriers);
  const int role = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, lane = thread % 32;
  const unsigned heads = unsigned(p.kv_heads);
  if (threadIdx.x == 0) {
    ring.init(8);
    mbarrier_init(written, 128), mbarrier_init(read, 128);
    box.init(12);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (role == 2) {
    setmaxnreg_dec<attention_producer_registers(2)>();
    produce_queries<T, D, kPadded>(p, scores, ring, numbers, box, end, thread);
  } else {
    setmaxnreg_inc<attention_consumer_registers(2)>();
    const int first_row = thread / 32 * 16, group = p.heads / p.kv_heads;
    const Columns<D, kPadded> columns(p.head_dim);
    char* mine = fixed + role * Ring::kTileBytes;
    unsigned slot = 0, turns = 0;  // of all items
    for (unsigned items = 0;; items++) {
      const int item = box.take(items, lane);
      if (item < 0) break;
      const AttentionTile tile = p.tiles[unsigned(item) / heads];
      const int kv_head = int(unsigned(item) % heads), there = tile.end - tile.begin;
      const int length = tile.document_end - tile.document_begin, key = tile.begin - tile.document_begin;
      const Interval queries = queries_of_block(scores, key, kAttentionRows, length);
      const int count = (queries.last - queries.first + kLongTurn) / kLongTurn * group;
      Rows<T, D, kAttentionRows, 128, kPadded>(role == 0 ? p.k : p.v, tile.begin, kv_head, thread, columns).load(mine, 0, there);
      cp_async_commit_group();
      cp_async_wait_all();
      fence_proxy_async();
      bar_sync(kGroupBarrier + role, 128);

      // Role 0: products of keys and queries, then grad_v. Role 1: of values and gradients, then grad_k.
      Sums<1, D> grad;
      Sums<1, kLongTurn> s;
      for_each(grad, [](float& x, int, int, int) { x = 0; });
      const auto multiply = [&](unsigned slot) {
        Product::template multiply_rows<kAttentionRows, kLongTurn>(s, mine, 0, ring.tile(slot + role), 0, lane);
        Product::commit();
      };
      ring.wait_full(slot + role);
      wgmma_fence_operand(grad[0]);
      Product::begin();
      multiply(slot);
      int query = queries.first;
      const auto add = [&](int turn, auto next_follows) {
        constexpr bool kNext = decltype(next_follows)::value;
        const float* lse = numbers + slot / 2 % (kSlots / 2) * 128;
        const unsigned parity = turns % 2;
        float4* weights = passed + thread;
        const bool masked = !scores.all_see(query, query + kLongTurn, key, key + kAttentionRows, length);
        const auto seen = [&](int row) { return scores.queries_of(key + first_row + row); };
        ring.wait_full(slot + 1 - role);
        Product::wait(s, grad);
        if (turn > 0) ring.release(slot - 1 - role, lane);
        if (role == 0) {
          mbarrier_wait_parity(read, parity ^ 1);
#pragma unroll
          for (int n = 0; n < kLongTurn / 8; n++) {
            float slope[4] = {1, 1, 1, 1};
#pragma unroll
            for (int i = 0; i < 4; i++) {
              float& x = s[0][n][i];
              if (scores.capped) x = scores.cap(x), slope[i] = 1.f - x * x;
              x = ex2_approx(fmaf(x, scores.scale, -lse[8 * n + 2 * (lane % 4) + i % 2]));
            }
            weights[n * 128] = {s[0][n][0] * slope[0], s[0][n][1] * slope[1], s[0][n][2] * slope[2], s[0][n][3] * slope[3]};
          }
          mbarrier_arrive(written);
        } else {
          mbarrier_wait_parity(written, parity);
          const float* delta = lse + 64;
#pragma unroll
          for (int n = 0; n < kLongTurn / 8; n++) {
            const float4 w = weights[n * 128];
            const float even = delta[8 * n + 2 * (lane % 4)], odd = delta[8 * n + 2 * (lane % 4) + 1];
            s[0][n][0] = w.x * (s[0][n][0] - even);
            s[0][n][1] = w.y * (s[0][n][1] - odd);
            s[0][n][2] = w.z * (s[0][n][2] - even);
            s[0][n][3] = w.w * (s[0][n][3] - odd);
          }
          mbarrier_arrive(read);
        }
        if (masked) mask(s, query, lane, 0.f, seen);
        ring.release(slot + role, lane);
        const typename Product::template Left<1, kLongTurn / 8> left(s);
        query += kLongTurn;
        if (query > queries.last) query = queries.first;  // the next head
        if constexpr (kNext) ring.wait_full(slot + 2 + role);
        wgmma_fence_operand(grad[0]);
        wgmma_fence_operand(s[0]);
        Product::begin();
        Product::template add_weighted_rows<kLongTurn>(grad, left, ring.tile(slot + 1 - role), 0, lane);
        Product::commit();
        if constexpr (kNext) multiply(slot + 2);
        slot += 2;
        turns++;
      };
      int turn = 0;
      for (; turn + 1 < count; turn++) add(turn, std::true_type{});
      add(turn, std::false_type{});
      Product::wait(grad);
      ring.release(slot - 1 - role, lane);
      const int64_t stride = int64_t(p.kv_heads) * columns.count, first = tile.begin * stride + kv_head * columns.count;
      const float scale = role ? scores.product_scale : 1.f;
      const float factor[1][2] = {{scale, scale}};
      store_rows<T, D, kAttentionRows, 1>(static_cast<T*>(role ? p.grad_k : p.grad_v) + first, stride, there, mine, first_row,
                                          lane, grad, factor, columns);
      bar_sync(kGroupBarrier + role, 128);  // all have stored what lies where the next keys and values come
    }
  }
#endif
}

template <typename T, int D, bool kPadded>
cudaError_t launch_long_split(const AttentionParams& p, int64_t tiles, const Device& device, cudaStream_t stream) {
  const int64_t items = tiles * p.kv_heads;
  if (items > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_large<long_split_kernel<T, D, kPadded>>(
      {.follows = true}, device, std::min<int64_t>(device.multiprocessors, items), kAttentionLongKeysThreads,
      attention_long_keys_shared(D), stream, p, Scores(p), unsigned(items));
}

}  // namespace
}  // namespace packops

// All gradients of long documents of 128 features, on Hopper, with five products. Part of attention.cu.
//
//   S = K Q^T, dP = V dO^T    64 keys for each of two consumers, 64 queries a turn; P and dS of them, in registers
//   dV += P dO, dK += dS Q    in registers, over all turns of an item
//   dQ += dS^T K              of all 128 keys: dS goes through shared memory, each consumer makes half of the features
//
// An item of work is 128 keys of a document and a head of keys and values. Its parts of dQ are added to sums in memory, in fp32, by bulk
// copies from shared memory. For a tile of queries that happens in one order, from the last keys that they see to the first: a
// counter says how many blocks of keys have added. The first stores, so nothing is cleared before. The last takes the sum into its
// registers and writes grad_q. Hence the same bits at every run.
//
// Items are drawn from the last keys of a document to the first, so an item waits for such alone as were drawn before it. Under a causal
// mask the keys after those of an item meet their first queries 128 tokens later, and so are ahead of it.
//
// Sums lie in memory as a thread holds them: 8 vectors of four numbers, 128 threads after one another.
#pragma once

#include <algorithm>

#include "attention_long_backward.cuh"

namespace packops {
namespace {

#ifdef PACKOPS_SM90A

// Tiles of 64 queries of a document, and the blocks of 128 keys that they see.
struct KeyBlocks {
  int length, window;
  bool causal;
  __device__ __forceinline__ int last(int tile) const { return causal ? tile / 2 : (length - 1) / 128; }
  __device__ __forceinline__ int first(int tile) const { return window ? max(0, tile * 64 - window + 1) / 128 : 0; }
};

// The tile that an item begins with. Items are numbered from the first keys of a document on, and taken from the last.
__device__ __forceinline__ unsigned tile_of_item(const AttentionParams& p, unsigned item) {
  const unsigned number = item / unsigned(p.kv_heads);
  const AttentionTile tile = p.tiles[number];
  const int blocks = (tile.document_end - tile.document_begin + 127) / 128;
  const int block = (tile.begin - tile.document_begin) / 128;
  return number - unsigned(2 * block) + unsigned(2 * (blocks - 1 - block));
}

// One consumer's parts of dQ on their way to memory.
template <typename T>
class QueryGradients {
 public:
  static constexpr int kNumbers = 64 * 64;  // of a part

  __device__ __forceinline__ QueryGradients(const AttentionParams& p, const Scores& scores, float* staged, int role, int thread)
      : p_(p), factor_(scores.product_scale), staged_(staged), role_(role), thread_(thread) {}

  // Of queries from `query` on, which see this item's keys, block `block` of the document's. tile: their number in the list of tiles.
  __device__ __forceinline__ void add(Sums<1, 64>& part, const AttentionTile& document, const KeyBlocks& blocks, int block,
                                      int query, unsigned tile, int head) {
    const int64_t place = (int64_t(tile) * p_.heads + head) * 2 + role_;
    const int before = blocks.last(query / 64) - block;
    const bool is_last = block == blocks.first(query / 64);
    publish();
    bar_sync(kGroupBarrier + role_, 128);  // what was staged last is in memory
    if (!is_last) {
      float4* to = reinterpret_cast<float4*>(staged_) + thread_;
#pragma unroll
      for (int n = 0; n < 8; n++) to[n * 128] = {part[0][n][0], part[0][n][1], part[0][n][2], part[0][n][3]};
      fence_proxy_async();
      bar_sync(kGroupBarrier + role_, 128);
      if (thread_ == 0) {
        float* sums = p_.parts + place * kNumbers;
        if (before > 0) {
          wait_acquire(p_.added + place, before);
          cp_reduce_async_bulk_add(sums, staged_, 4 * kNumbers);
        } else {
          cp_async_bulk_store(sums, staged_, 4 * kNumbers);
        }
        cp_async_bulk_commit_group();
        pending_ = p_.added + place;
      }
      return;
    }
    if (before > 0) {
      if (thread_ == 0) wait_acquire(p_.added + place, before);
      bar_sync(kGroupBarrier + role_, 128);
      const float4* sums = reinterpret_cast<const float4*>(p_.parts + place * kNumbers) + thread_;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const float4 sum = sums[n * 128];
        part[0][n][0] += sum.x, part[0][n][1] += sum.y, part[0][n][2] += sum.z, part[0][n][3] += sum.w;
      }
    }
    const int64_t stride = int64_t(p_.heads) * 128;
    const float factor[1][2] = {{factor_, factor_}};
    store_rows<T, 64, 64, 1>(static_cast<T*>(p_.grad_q) + (document.document_begin + query) * stride + head * 128 + role_ * 64,
                             stride, blocks.length - query, reinterpret_cast<char*>(staged_), thread_ / 32 * 16, thread_ % 32,
                             part, factor);
  }
  // Says that the last part has been added, once it has.
  __device__ __forceinline__ void publish() {
    if (!pending_) return;
    cp_async_bulk_wait_group();
    red_release_add(pending_, 1);
    pending_ = nullptr;
  }

 private:
  const AttentionParams& p_;
  float factor_;
  float* staged_;
  int role_, thread_;
  int32_t* pending_ = nullptr;  // of thread 0
};

#endif

template <typename T>
__global__ void __launch_bounds__(attention_long_keys_shape(128).threads(), 1)
    long_joint_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Scores scores, unsigned end) {
#ifdef PACKOPS_SM90A
  begin_overlapping(false);
  constexpr int D = 128, kSlots = attention_joint_slots();
  using Product = Products<T, D, true>;
  using Ring = SlotRing<D, kSlots>;
  char* fixed = dynamic_shared<char>();  // keys and values of the first consumer, then of the second
  char* slots = fixed + 4 * Ring::kTileBytes;
  char* changes = slots + kSlots * Ring::kTileBytes;  // dS of 128 keys and 64 queries, of two turns
  float* staged = reinterpret_cast<float*>(changes + 2 * 128 * 128);
  float* numbers = staged + 2 * QueryGradients<T>::kNumbers;
  MBarrier* barriers = reinterpret_cast<MBarrier*>(numbers + kSlots / 2 * 128);
  ItemBox& box = *reinterpret_cast<ItemBox*>(barriers + 2 * kSlots);
  const Ring ring(slots, barriers);
  const int role = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, lane = thread % 32;
  const unsigned heads = unsigned(p.kv_heads);
  if (threadIdx.x == 0) {
    ring.init(8);
    box.init(12);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (role == 2) {
    setmaxnreg_dec<attention_producer_registers(2)>();
    produce_queries<T, D, 2>(p, scores, ring, numbers, box, end, thread, [&](unsigned item) { return tile_of_item(p, item); });
  } else {
    setmaxnreg_inc<attention_consumer_registers(2)>();
    const int first_row = thread / 32 * 16, group = p.heads / p.kv_heads;
    const ProductTurns<2> turns(role);
    char *keys = fixed + role * 2 * Ring::kTileBytes, *values = keys + Ring::kTileBytes;
    QueryGradients<T> query_gradients(p, scores, staged + role * QueryGradients<T>::kNumbers, role, thread);
    unsigned slot = 0;
    for (unsigned items = 0;; items++) {
      const int item = box.take(items, lane);
      if (item < 0) break;
      const unsigned number = tile_of_item(p, unsigned(item));
      const AttentionTile tile = p.tiles[number];
      const int kv_head = int(unsigned(item) % heads);
      const int length = tile.document_end - tile.document_begin, begin = tile.begin - tile.document_begin;
      const int key = begin + kAttentionRows * role, token = tile.begin + kAttentionRows * role;
      const int there = min(kAttentionRows, tile.document_end - token);  // not positive: this group has none, but takes part
      const Interval queries_of_all = queries_of_block(scores, begin, 2 * kAttentionRows, length);
      const int count = (queries_of_all.last - queries_of_all.first + kLongTurn) / kLongTurn * group;
      const KeyBlocks blocks{length, scores.window, scores.causal};
      Rows<T, D, kAttentionRows, 128>(p.k, token, kv_head, thread).load(keys, 0, there);
      Rows<T, D, kAttentionRows, 128>(p.v, token, kv_head, thread).load(values, 0, there);
      cp_async_commit_group();
      cp_async_wait_all();
      fence_proxy_async();
      bar_sync(kConsumersBarrier, 256);  // each multiplies the keys of both

      Sums<1, D> grad_k, grad_v;
      for_each(grad_k, [](float& x, int, int, int) { x = 0; });
      for_each(grad_v, [](float& x, int, int, int) { x = 0; });
      wgmma_fence_operand(grad_k[0]);
      wgmma_fence_operand(grad_v[0]);
      int query = queries_of_all.first, head = kv_head * group;
      for (int turn = 0; turn < count; turn++, slot += 2) {
        char *queries = ring.tile(slot), *grads = ring.tile(slot + 1), *change = changes + turn % 2 * (128 * 128);
        const float *lse = numbers + slot / 2 % (kSlots / 2) * 128, *delta = lse + 64;
        Sums<1, kLongTurn> s, g;
        ring.wait_full(slot);
        ring.wait_full(slot + 1);
        turns.wait();
        Product::begin();
        Product::template multiply_rows<kAttentionRows, kLongTurn>(s, keys, 0, queries, 0, lane);
        Product::commit();
        Product::template multiply_rows<kAttentionRows, kLongTurn>(g, values, 0, grads, 0, lane);
        Product::commit();
        turns.pass();
        weigh<Product>(
            s, g, scores, [&](int, int n, int i) { return lse[8 * n + 2 * (lane % 4) + i % 2]; },
            [&](int, int n, int i) { return delta[8 * n + 2 * (lane % 4) + i % 2]; });
        if (!scores.all_see(query, query + kLongTurn, key, key + kAttentionRows, length)) {
          const auto seen = [&](int row) { return scores.queries_of(key + first_row + row); };
          mask(s, query, lane, 0.f, seen);
          mask(g, query, lane, 0.f, seen);
        }
        using Left = typename Product::template Left<1, kLongTurn / 8>;
        const Left weights(s), of_scores(g);
#pragma unroll
        for (int k = 0; k < kLongTurn / 16; k++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int row = kAttentionRows * role + first_row + lane / 4 + 8 * (i % 2);
            *reinterpret_cast<uint32_t*>(place<128>(change, row, 2 * k + i / 2) + 4 * (lane % 4)) = of_scores.words[k][0][i];
          }
        turns.wait();
        wgmma_fence_operand(grad_k[0]);
        wgmma_fence_operand(grad_v[0]);
        Product::begin();
        Product::template add_weighted_rows<kLongTurn>(grad_v, weights, grads, 0, lane);
        Product::template add_weighted_rows<kLongTurn>(grad_k, of_scores, queries, 0, lane);
        Product::commit();
        turns.pass();
        bar_sync(kConsumersBarrier, 256);   // dS is whole
        Product::wait(grad_v, grad_k);      // frees the registers of P and dS
        uint32_t of_queries[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++)
          ldmatrix_x4_trans(of_queries[k], place<128>(change, 16 * k + lane / 16 * 8 + lane % 8, first_row / 8 + lane / 8 % 2));
        Sums<1, 64> part;
        Product::begin();
#pragma unroll
        for (int k = 0; k < 8; k++)
          wgmma_rs(part[0], of_queries[k],
                   WgmmaDescriptor(fixed + k / 4 * 2 * Ring::kTileBytes)
                       .at(role * (128 * kAttentionRows) + k % 4 * 16 * 128),
                   k > 0, T{});
        Product::commit();
        Product::wait(part);
        ring.release(slot, lane);
        ring.release(slot + 1, lane);
        query_gradients.add(part, tile, blocks, begin / 128, query, number - unsigned(begin / 64) + unsigned(query / 64), head);
        query += kLongTurn;
        if (query > queries_of_all.last) query = queries_of_all.first, head++;
      }
      query_gradients.publish();
      const int64_t stride = int64_t(p.kv_heads) * D, first = token * stride + kv_head * D;
      const float one[1][2] = {{1.f, 1.f}}, scale[1][2] = {{scores.product_scale, scores.product_scale}};
      bar_sync(kConsumersBarrier, 256);  // neither multiplies these keys any more
      if (there > 0) {
        store_rows<T, D, kAttentionRows, 1>(static_cast<T*>(p.grad_v) + first, stride, there, values, first_row, lane, grad_v,
                                            one);
        store_rows<T, D, kAttentionRows, 1>(static_cast<T*>(p.grad_k) + first, stride, there, keys, first_row, lane, grad_k,
                                            scale);
      }
      bar_sync(kGroupBarrier + role, 128);  // all have stored what lies where the next keys and values come
    }
    turns.finish();
  }
#endif
}

template <typename T>
cudaError_t launch_long_joint(const AttentionParams& p, int64_t tiles, const Device& device, cudaStream_t stream) {
  const int64_t items = tiles * p.kv_heads;
  if (items > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_large<long_joint_kernel<T>>({.follows = true}, device, std::min<int64_t>(device.multiprocessors, items),
                                            attention_long_keys_shape(128).threads(), attention_joint_shared(), stream, p,
                                            Scores(p), unsigned(items));
}

}  // namespace
}  // namespace packops

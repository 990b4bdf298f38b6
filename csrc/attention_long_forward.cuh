// The forward pass of attention for long documents, on Hopper. Part of attention.cu.
//
// A block has a multiprocessor to itself and takes one item of work, a tile of 64 queries per consumer and a head, after another.
//
//   producer (1 thread)     copies queries (whole tiles) and turns of keys and values, by tensor maps, into a ring
//   consumers (2 or 3       make the scores of a turn while the product of the weights and values before it runs, and issue their
//   warp groups)            products one after the other: while one multiplies, another has its exponentials. With 96, 192 and 256
//                           features each goes at its own pace
//
// With 96 and 128 features queries stay in registers: a third less is read for a product of queries and keys, and that power goes to the clock.
//
// What bounds the other form on long documents is shared memory, where every 64 queries copy all keys and values for themselves
// and read both operands of 64 x 64 products, at 128 bytes a cycle as fast as the tensor cores can multiply them. Here a copy
// serves two or three warp groups, and products are up to 256 columns wide.
//
// Bound: the tensor cores (2 x 2 x 64 x turn x head_dim FLOPs a consumer and turn at 4096 a cycle), and for 64 features as much the
// exponentials, 16 a cycle.
//
// Turns go from the last keys to the first, so that those that need a mask come first. A tensor map does not know where a document
// ends: scores past it are masked, and the rows of values there, which may be NaN, are overwritten with zeros. It does know where a
// head ends: columns past it arrive as zeros, and count among the bytes that a barrier expects.
//
// With shared prefixes, the keys of a long root are taken here for all that continues it, whatever segments a tile of queries is of, since
// they all see the same. What comes out for those goes to memory in fp32, and forward_kernel goes on from it with the keys that are left.
#pragma once

#include <algorithm>

#include "attention_launch.h"
#include "attention_long.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "common/hopper.cuh"
#include "common/tensor_map.cuh"

namespace packops {
namespace {

#ifdef PACKOPS_SM90A

// The shared memory of a block.
template <int D>
struct LongForwardShared {
  static constexpr AttentionLongForwardShape kShape = attention_long_forward_shape(D);
  static constexpr int kTurnBytes = kRowBytes<D> * kShape.turn, kItems = 2;
  alignas(1024) char queries[kRowBytes<D> * kShape.rows()];
  char keys[kShape.stages][kTurnBytes], values[kShape.stages][kTurnBytes];
  MBarrier full_keys[kShape.stages], empty_keys[kShape.stages], full_values[kShape.stages], empty_values[kShape.stages];
  MBarrier full_queries, empty_queries, full_item[kItems], empty_item[kItems];
  int item[kItems];

  __device__ __forceinline__ void init() {
    constexpr uint32_t kConsumers = 4 * kShape.groups;  // a warp arrives once, and so does the thread that copies
    for (int i = 0; i < kShape.stages; i++) {
      mbarrier_init(&full_keys[i], 1), mbarrier_init(&full_values[i], 1);
      mbarrier_init(&empty_keys[i], kConsumers), mbarrier_init(&empty_values[i], kConsumers);
    }
    for (int i = 0; i < kItems; i++) mbarrier_init(&full_item[i], 1), mbarrier_init(&empty_item[i], kConsumers + 1);
    mbarrier_init(&full_queries, 1), mbarrier_init(&empty_queries, kConsumers);
    fence_mbarrier_init();
  }
};

// A tile of queries of one head, and its turns of keys, in the document. With shared prefixes and no window, keys are a root's, and queries
// those of the root and of all that continues it.
template <int kRows, int kTurn, bool kForest>
struct LongForwardItem {
  int head, document, begin;  // begin: the document's first token
  int length, keys;           // of the document: how many queries and keys
  int query, first, last;     // the tile's first query in the document; turns, both inclusive

  __device__ __forceinline__ LongForwardItem(const AttentionParams& p, const Scores& scores, int item) : head(item % p.heads) {
    const AttentionTile tile = p.tiles[item / p.heads];
    document = tile.document, begin = tile.document_begin;
    length = keys = own_length<kForest>(p, tile);
    if constexpr (kForest)
      if (forwards_branches(p)) {
        document = long_root<true>(p, tile);
        const ForestSegment root = p.prefixes.segments[document];
        begin = root.begin, length = p.prefixes.subtree_ends[document] - begin, keys = length_of(root);
      }
    // The list has documents from their first tile on; the last has the most keys.
    query = ((length - 1) / kRows - number_of(tile, begin)) * kRows;
    first = (scores.window ? max(0, query - scores.window + 1) : 0) / kTurn;
    last = ((p.causal ? min(keys, query + kRows) : keys) - 1) / kTurn;
  }
  // Whether a tile of the list draws an item: the first token of a tile of kRows lies in it.
  static __device__ __forceinline__ bool draws(const AttentionParams& p, const AttentionTile& tile) {
    int begin = tile.document_begin;
    if (kForest && forwards_branches(p)) {
      const int root = long_root<kForest>(p, tile);
      if (root < 0) return false;
      begin = p.prefixes.segments[root].begin;
    } else if (!is_long<kForest>(p, tile)) {
      return false;
    }
    return begin + number_of(tile, begin) * kRows < tile.end;
  }

 private:
  // Of the first tile of kRows that begins in this one of the list or behind it.
  static __device__ __forceinline__ int number_of(const AttentionTile& tile, int begin) {
    return (tile.begin - begin + kRows - 1) / kRows;
  }
};

// The next item, -1 after the last. `warp`: all of a warp take it.
template <int D>
__device__ __forceinline__ int take_item(LongForwardShared<D>& s, RingPlace<LongForwardShared<D>::kItems>& place, bool warp) {
  int item = 0;
  if (!warp || threadIdx.x % 32 == 0) {
    mbarrier_wait_parity(&s.full_item[place.slot], uint32_t(place.parity));
    item = s.item[place.slot];
    mbarrier_arrive(&s.empty_item[place.slot]);
  }
  place.advance();
  return warp ? __shfl_sync(kWarp, item, 0) : item;
}

// Results and lse of a warp's 16 rows.
template <typename T, int D, bool kPadded, typename Item>
__device__ __forceinline__ void store_results(const AttentionParams& p, const Item& item, int first_row, int lane,
                                              const Scores& scores, const Sums<1, D>& out, const float (&greatest)[2],
                                              const float (&sum)[2]) {
  const Columns<D, kPadded> columns(p.head_dim);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int query = item.query + first_row + 8 * half + lane / 4, token = item.begin + query;
    const bool there = query < item.keys;
    if (lane % 4 == 0 && there) store_lse(p, scores, item.head, token, greatest[half], sum[half]);
    store_row<T, D>(static_cast<T*>(p.out) + (token * int64_t(p.heads) + item.head) * columns.count, there, half, lane, out,
                    sum[half] == 0 ? 0.f : 1.f / sum[half], columns);
  }
}

// Of a consumer's queries that continue the root: what forward_kernel goes on from.
template <int D, typename Item>
__device__ __forceinline__ void store_states(const AttentionParams& p, const Item& item, int group, const Sums<1, D>& out,
                                             const float (&greatest)[2], const float (&sum)[2]) {
  const int first = item.query + kAttentionRows * group, thread = int(threadIdx.x) % 128;
  if (item.length == item.keys || first + kAttentionRows <= item.keys || first >= item.length) return;
  const QuerySums<D, false> sums(p, item.begin, item.document, item.head, first, kAttentionRows);
  sums.store(out, thread);
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (thread % 4 == 0) sums.state(thread / 32 * 16 + 8 * half + thread % 32 / 4) = {greatest[half], sum[half]};
}

#endif

template <typename T, int D, bool kPadded, bool kForest>
__global__ void __launch_bounds__(attention_long_forward_shape(D).threads(), 1)
    long_forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap v_map, const __grid_constant__ AttentionParams p,
                        const __grid_constant__ Scores scores, unsigned end, bool beside) {
#ifdef PACKOPS_SM90A
  using namespace hopper;
  using Shared = LongForwardShared<D>;
  constexpr AttentionLongForwardShape kShape = Shared::kShape;
  constexpr int kGroups = kShape.groups, kTurn = kShape.turn, kRows = kShape.rows();
  constexpr bool kHoldsQueries = kShape.holds_queries;
  using Item = LongForwardItem<kRows, kTurn, kForest>;
  static_assert(sizeof(Shared) <= attention_long_forward_shared(D));
  Shared& s = *dynamic_shared<Shared>();
  begin_overlapping(beside);
  if (!is_any_long<kForest>(p)) return end_overlapping(beside);
  if (threadIdx.x == 0) s.init();
  __syncthreads();

  if (threadIdx.x >= 128 * kGroups) {
    setmaxnreg_dec<attention_producer_registers(kGroups)>();
    if (threadIdx.x == 128 * kGroups) {  // copies
      RingPlace<kShape.stages> place;
      RingPlace<Shared::kItems> items;
      for (int number, parity = 1; (number = take_item<D>(s, items, false)) >= 0; parity ^= 1) {
        const Item item(p, scores, number);
        const int kv_head = item.head / (p.heads / p.kv_heads);
        const auto copy = [&](char* to, const CUtensorMap& map, MBarrier* full, int rows, int head, int token) {
          mbarrier_arrive_expect_tx(full, uint32_t(kRowBytes<D> * rows));
#pragma unroll
          for (int panel = 0; panel < kPanels<D>; panel++)
            tma_load_3d(to + panel * (128 * rows), map, 64 * panel, head, token, full);
        };
        for (int turn = item.last; turn >= item.first; turn--) {
          const int token = item.begin + turn * kTurn;
          mbarrier_wait_parity(&s.empty_keys[place.slot], uint32_t(place.parity ^ 1));
          copy(s.keys[place.slot], k_map, &s.full_keys[place.slot], kTurn, kv_head, token);
          if (turn == item.last) {
            mbarrier_wait_parity(&s.empty_queries, uint32_t(parity));
            copy(s.queries, q_map, &s.full_queries, kRows, item.head, item.begin + item.query);
          }
          mbarrier_wait_parity(&s.empty_values[place.slot], uint32_t(place.parity ^ 1));
          copy(s.values[place.slot], v_map, &s.full_values[place.slot], kTurn, kv_head, token);
          place.advance();
        }
      }
    } else if (threadIdx.x == 128 * kGroups + 32) {  // draws items ahead
      RingPlace<Shared::kItems> items;
      for (int number = 0; number >= 0; items.advance()) {
        number = draw_item<kForest>(p, unsigned(p.heads), end, [&](const AttentionTile& tile) { return Item::draws(p, tile); });
        mbarrier_wait_parity(&s.empty_item[items.slot], uint32_t(items.parity ^ 1));
        s.item[items.slot] = number;
        mbarrier_arrive(&s.full_item[items.slot]);
      }
    }
  } else {
    setmaxnreg_inc<attention_consumer_registers(kGroups)>();
    const int group = int(threadIdx.x) / 128, lane = int(threadIdx.x) % 32, first_row = int(threadIdx.x) / 32 * 16;
    const ProductTurns<kGroups, kShape.in_turns> turns(group);
    RingPlace<kShape.stages> at_keys, at_values;
    RingPlace<Shared::kItems> items;
    const auto release = [&](MBarrier* barrier) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barrier);
    };
    for (int number, parity = 0; (number = take_item<D>(s, items, true)) >= 0; parity ^= 1) {
      const Item item(p, scores, number);
      Sums<1, D> out;
      Sums<1, kTurn> x;
      uint32_t weights[kTurn / 16][4], held[D / 16][4];
      float greatest[1][2] = {{-INFINITY, -INFINITY}}, sum[2] = {0, 0}, correction[1][2];
      const auto multiply = [&] {
        mbarrier_wait_parity(&s.full_keys[at_keys.slot], uint32_t(at_keys.parity));
        turns.wait();
        const WgmmaDescriptor keys(s.keys[at_keys.slot]);
        const auto keys_at = [&](int k) { return keys.at(k / 4 * (128 * kTurn) + k % 4 * 32); };
        wgmma_fence();
        if constexpr (kHoldsQueries) {
#pragma unroll
          for (int k = 0; k < D / 16; k++) wgmma_rs_rows(x[0], held[k], keys_at(k), k > 0, T{});
        } else {
          const WgmmaDescriptor rows(s.queries + group * (64 * 128));
#pragma unroll
          for (int k = 0; k < D / 16; k++) wgmma_ss(x[0], rows.at(k / 4 * (128 * kRows) + k % 4 * 32), keys_at(k), k > 0, T{});
        }
        wgmma_commit_group();
      };
      const auto add_values = [&](bool first) {
        mbarrier_wait_parity(&s.full_values[at_values.slot], uint32_t(at_values.parity));
        const WgmmaDescriptor values(s.values[at_values.slot], 128 * kTurn);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTurn / 16; k++) wgmma_rs(out[0], weights[k], values.at(16 * k * 128), !first || k > 0, T{});
        wgmma_commit_group();
      };
      const auto weigh = [&](int turn) {  // scores become exponentials; correction: the factor for what is summed so far
        const int key = turn * kTurn, query = item.query + 64 * group;
        wgmma_fence_operand(x[0]);
        if (scores.capped) for_each(x, [&](float& score, int, int, int) { score = scores.cap(score); });
        if (!scores.all_see(query, query + 64, key, key + kTurn, item.keys))
          mask(x, key, lane, -INFINITY, [&](int row) { return scores.keys_of(item.query + first_row + row, item.keys); });
        float shift[1][2], now[1][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float most = greatest[0][half];
#pragma unroll
          for (int n = 0; n < kTurn / 8; n++) most = fmaxf(most, fmaxf(x[0][n][2 * half], x[0][n][2 * half + 1]));
          now[0][half] = max_of_quad(most);
        }
        scores.relate(x, greatest, now, shift, correction);
#pragma unroll
        for (int half = 0; half < 2; half++) greatest[0][half] = now[0][half], sum[half] *= correction[0][half];
        for_each(x, [&](float& score, int, int, int i) {
          score = ex2_approx(fmaf(score, scores.scale, -shift[0][i / 2]));
          sum[i / 2] += score;
        });
      };
      const auto convert = [&] {
#pragma unroll
        for (int k = 0; k < kTurn / 16; k++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            weights[k][i] = pack2(x[0][2 * k + i / 2][2 * (i % 2)], x[0][2 * k + i / 2][2 * (i % 2) + 1], T{});
      };
      const auto keys_read = [&](int turn) {
        release(&s.empty_keys[at_keys.slot]);
        at_keys.advance();
        // Queries for registers have left shared memory when a product has read them there. An arrival before that may overtake the
        // loads, and the next item's queries then arrive among these.
        if (turn == (kHoldsQueries ? item.last : item.first)) release(&s.empty_queries);
      };
      const auto values_read = [&] {
        wgmma_fence_operand(out[0]);
        release(&s.empty_values[at_values.slot]);
        at_values.advance();
      };

      const int past = item.keys - item.last * kTurn;
      mbarrier_wait_parity(&s.full_queries, uint32_t(parity));
      if constexpr (kHoldsQueries)
#pragma unroll
        for (int k = 0; k < D / 16; k++) ldmatrix_x4(held[k], place<kRows>(s.queries, first_row + lane % 16, 2 * k + lane / 16));
      multiply();
      turns.pass();
      if (past < kTurn) {
        mbarrier_wait_parity(&s.full_values[at_values.slot], uint32_t(at_values.parity));
        for (int i = int(threadIdx.x); i < (kTurn - past) * (D / 8); i += 128 * kGroups)
          *reinterpret_cast<uint4*>(place<kTurn>(s.values[at_values.slot], past + i / (D / 8), i % (D / 8))) = uint4{0, 0, 0, 0};
        fence_proxy_async();
        bar_sync(kConsumersBarrier, 128 * kGroups);
      }
      wgmma_wait_group<0>();
      keys_read(item.last);
      weigh(item.last);
      convert();
      for (int turn = item.last - 1; turn >= item.first; turn--) {
        multiply();
        add_values(turn == item.last - 1);
        turns.pass();
        wgmma_wait_group<1>();
        keys_read(turn);
        weigh(turn);
        wgmma_wait_group<0>();
        values_read();
        convert();
        if (__any_sync(kWarp, correction[0][0] != 1.f || correction[0][1] != 1.f))
          for_each(out, [&](float& value, int, int, int i) { value *= correction[0][i / 2]; });
      }
      add_values(item.last == item.first);
      wgmma_wait_group<0>();
      values_read();
      sum[0] = sum_of_quad(sum[0]), sum[1] = sum_of_quad(sum[1]);
      if constexpr (kForest) store_states<D>(p, item, group, out, greatest[0], sum);
      store_results<T, D, kPadded>(p, item, first_row, lane, scores, out, greatest[0], sum);
    }
    turns.finish();
  }
  end_overlapping(beside);
#endif
}

template <typename T, int D, bool kPadded, bool kForest>
cudaError_t launch_long_forward(const AttentionParams& p, int64_t tiles, const Device& device, cudaStream_t stream, bool beside) {
  constexpr AttentionLongForwardShape kShape = attention_long_forward_shape(D);
  if (tiles * p.heads > 0x7fffffff) return cudaErrorInvalidValue;
  CUtensorMap q, k, v;
  const auto encode = [&](CUtensorMap* map, const Heads& x, int heads, int rows) {
    return encode_tensor_map(map, p.dtype, x.data, {p.head_dim, heads, p.tokens}, {x.head, x.token}, rows);
  };
  if (!encode(&q, p.q, p.heads, kShape.rows()) || !encode(&k, p.k, p.kv_heads, kShape.turn) ||
      !encode(&v, p.v, p.kv_heads, kShape.turn))
    return cudaErrorInvalidValue;
  return launch_large<long_forward_kernel<T, D, kPadded, kForest>>(
      {.follows = true}, device, std::min<int64_t>(device.multiprocessors, tiles * p.heads), kShape.threads(),
      attention_long_forward_shared(D), stream, q, k, v, p, Scores(p), unsigned(tiles * p.heads), beside);
}

}  // namespace
}  // namespace packops

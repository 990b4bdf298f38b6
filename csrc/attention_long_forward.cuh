// The forward pass of attention for long documents, on Hopper. Part of attention.cu.
//
// A block has a multiprocessor to itself and takes one item of work, a tile of 64 queries per consumer and a head, after another.
//
//   producer (1 thread)     copies queries (whole tiles) and turns of keys and values, by tensor maps, into a ring
//   consumers (2 or 3       make the scores of a turn while the product of the weights and values before it runs, and issue their
//   warp groups)            products one after the other: while one multiplies, another has its exponentials
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

// Whether the kernel here takes a tile. With shared prefixes it takes long roots and, of the segments that continue a root, those whose
// path is long. One tile that would be alone in a block of several is left to the other kernel.
template <int D, bool kForest>
__device__ __forceinline__ bool takes_long_forward(const AttentionParams& p, const AttentionTile& tile) {
  constexpr AttentionLongForwardShape kShape = attention_long_forward_shape(D);
  if constexpr (kForest) {
    if (tile.document >= p.axis.documents) return false;
    const ForestSegment segment = p.prefixes.segments[tile.document];
    if (segment.parent >= 0) {
      const ForestSegment root = p.prefixes.segments[segment.parent];
      const int before = (tile.begin - segment.begin) / kShape.rows() * kShape.rows();
      return root.parent < 0 && length_of(root) >= kShape.turn && !p.window &&
             segment.position + length_of(segment) > p.long_from && length_of(segment) - before > kAttentionRows;
    }
  }
  return is_long<kForest>(p, tile);
}

#ifdef PACKOPS_SM90A

// The shared memory of a block.
template <int D>
struct LongForwardShared {
  static constexpr AttentionLongForwardShape kShape = attention_long_forward_shape(D);
  static constexpr int kTurnBytes = 2 * D * kShape.turn, kItems = 2;
  alignas(1024) char queries[2 * D * kShape.rows()];
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

// A tile of queries of one head, and its turns of keys, in the document. In a segment that continues a root, turns of the root's keys come
// before those of its own.
template <int kRows, int kTurn, bool kForest>
struct LongForwardItem {
  AttentionTile tile;
  int head, length, query, first, last;  // turns, both inclusive
  int root_turns = 0, root_begin = 0;
  int again = 0;  // the root's last turn is as long as any, so that it has no other rows, and begins with so many keys of the one before

  __device__ __forceinline__ LongForwardItem(const AttentionParams& p, const Scores& scores, int item)
      : tile(p.tiles[item / p.heads]), head(item % p.heads) {
    length = own_length<kForest>(p, tile);
    // The list has documents from their first tile on; the last has the most keys.
    query = (length - 1) / kRows * kRows - (tile.begin - tile.document_begin);
    if constexpr (kForest)
      if (length == 0) {
        const ForestSegment segment = p.prefixes.segments[tile.document], root = p.prefixes.segments[segment.parent];
        length = length_of(segment), query = tile.begin - segment.begin;
        root_begin = root.begin, root_turns = (length_of(root) + kTurn - 1) / kTurn;
        again = root_turns * kTurn - length_of(root);
      }
    tile.begin = tile.document_begin + query;
    tile.end = min(tile.document_begin + length, tile.begin + kRows);
    first = (scores.window ? max(0, query - scores.window + 1) : 0) / kTurn;
    last = root_turns + ((p.causal ? min(length, query + kRows) : length) - 1) / kTurn;
  }
  __device__ __forceinline__ bool is_own(int turn) const { return !kForest || turn >= root_turns; }
  __device__ __forceinline__ int own_key(int turn) const { return (turn - root_turns) * kTurn; }
  // The columns of a root's turn that count.
  __device__ __forceinline__ Interval root_keys(int turn) const { return {turn == root_turns - 1 ? again : 0, kTurn - 1}; }
  __device__ __forceinline__ int first_key(int turn) const {  // token
    return is_own(turn) ? tile.document_begin + own_key(turn) : root_begin + turn * kTurn - root_keys(turn).first;
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
template <typename T, int D, bool kPadded>
__device__ __forceinline__ void store_results(const AttentionParams& p, const AttentionTile& tile, int head, int first_row,
                                              int lane, const Scores& scores, const Sums<1, D>& out, const float (&greatest)[2],
                                              const float (&sum)[2]) {
  const Columns<D, kPadded> columns(p.head_dim);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float total = sum_of_quad(sum[half]);
    const int token = tile.begin + first_row + 8 * half + lane / 4;
    if (lane % 4 == 0 && token < tile.end) store_lse(p, scores, head, token, greatest[half], total);
    store_row<T, D>(static_cast<T*>(p.out) + (token * int64_t(p.heads) + head) * columns.count, token < tile.end, half, lane, out,
                    total == 0 ? 0.f : 1.f / total, columns);
  }
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
  using Item = LongForwardItem<kRows, kTurn, kForest>;
  static_assert(sizeof(Shared) <= attention_long_forward_shared(D));
  Shared& s = *dynamic_shared<Shared>();
  begin_overlapping(beside);
  if (!may_be_long<kForest>(p, p.tiles[0])) return end_overlapping(beside);  // nor is any other
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
          mbarrier_arrive_expect_tx(full, uint32_t(2 * D * rows));
#pragma unroll
          for (int panel = 0; panel < D / 64; panel++) tma_load_3d(to + panel * (128 * rows), map, 64 * panel, head, token, full);
        };
        for (int turn = item.last; turn >= item.first; turn--) {
          const int token = item.first_key(turn);
          mbarrier_wait_parity(&s.empty_keys[place.slot], uint32_t(place.parity ^ 1));
          copy(s.keys[place.slot], k_map, &s.full_keys[place.slot], kTurn, kv_head, token);
          if (turn == item.last) {
            mbarrier_wait_parity(&s.empty_queries, uint32_t(parity));
            copy(s.queries, q_map, &s.full_queries, kRows, item.head, item.tile.begin);
          }
          mbarrier_wait_parity(&s.empty_values[place.slot], uint32_t(place.parity ^ 1));
          copy(s.values[place.slot], v_map, &s.full_values[place.slot], kTurn, kv_head, token);
          place.advance();
        }
      }
    } else if (threadIdx.x == 128 * kGroups + 32) {  // draws items ahead
      RingPlace<Shared::kItems> items;
      for (int number = 0; number >= 0; items.advance()) {
        number = draw_item<kGroups, kForest>(
            p, unsigned(p.heads), end, [&](const AttentionTile& tile) { return takes_long_forward<D, kForest>(p, tile); });
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
      uint32_t weights[kTurn / 16][4];
      float greatest[1][2] = {{-INFINITY, -INFINITY}}, sum[2] = {0, 0}, correction[1][2];
      const auto multiply = [&] {
        mbarrier_wait_parity(&s.full_keys[at_keys.slot], uint32_t(at_keys.parity));
        turns.wait();
        const WgmmaDescriptor rows(s.queries + group * (64 * 128)), keys(s.keys[at_keys.slot]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
          wgmma_ss(x[0], rows.at(k / 4 * (128 * kRows) + k % 4 * 32), keys.at(k / 4 * (128 * kTurn) + k % 4 * 32), k > 0, T{});
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
        const bool own = item.is_own(turn);
        const int key = own ? item.own_key(turn) : 0, query = item.query + 64 * group;
        wgmma_fence_operand(x[0]);
        if (scores.capped) for_each(x, [&](float& score, int, int, int) { score = scores.cap(score); });
        if (own ? !scores.all_see(query, query + 64, key, key + kTurn, item.length) : item.root_keys(turn).first > 0)
          mask(x, key, lane, -INFINITY, [&](int row) {
            return own ? scores.keys_of(item.query + first_row + row, item.length) : item.root_keys(turn);
          });
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
        if (turn == item.first) release(&s.empty_queries);
      };
      const auto values_read = [&] {
        wgmma_fence_operand(out[0]);
        release(&s.empty_values[at_values.slot]);
        at_values.advance();
      };

      const int past = item.length - item.own_key(item.last);
      mbarrier_wait_parity(&s.full_queries, uint32_t(parity));
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
      store_results<T, D, kPadded>(p, item.tile, item.head, first_row, lane, scores, out, greatest[0], sum);
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
  if (p.heads > 0 && !(encode(&q, p.q, p.heads, kShape.rows()) && encode(&k, p.k, p.kv_heads, kShape.turn) &&
                       encode(&v, p.v, p.kv_heads, kShape.turn)))
    return cudaErrorInvalidValue;
  return launch_large<long_forward_kernel<T, D, kPadded, kForest>>(
      {.follows = true}, device, std::min<int64_t>(device.multiprocessors, tiles * p.heads), kShape.threads(),
      attention_long_forward_shared(D), stream, q, k, v, p, Scores(p), unsigned(tiles * p.heads), beside);
}

}  // namespace
}  // namespace packops

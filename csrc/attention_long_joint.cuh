// All gradients of long documents of up to 128 features, on Hopper, with five products. Part of attention.cu.
//
//   S = K Q^T, dP = V dO^T    64 keys for each of two consumers, 64 queries a turn (128 with 64 features); P and dS, in registers
//   dV += P dO, dK += dS Q    in registers, over all turns of an item
//   dQ += dS^T K              of all 128 keys, in the next turn: dS goes through shared memory, each consumer makes 64 of the features,
//                             or of the queries where there are 128
//
// Consumers take turns to issue products, all that they have until they need their next exponentials: dV and dK of a turn, dQ of the one
// before it, S and dP of the one after it. While one multiplies, the other has its exponentials.
//
// An item of work is 128 keys of a document and a head of keys and values. Its parts of dQ are added to sums in memory, in fp32, by
// threads of the producer's and bulk copies. For a tile of queries that happens in one order, from the first keys to the last, so the same
// bits come out at every run: a counter says how many blocks of keys have added. queries_kernel clears them before, and
// joint_queries_kernel makes grad_q of them.
//
// Items are drawn in the order of their keys, so an item waits for such alone as were drawn before it. All go through their queries from
// the last to the first, and through the heads of each tile, so those that began earlier stay ahead.
//
// Bound: the tensor cores, 5 x 2 x 64 x 128 x head_dim FLOPs per 64 queries at 4096 a cycle, and shared memory: S, dP and dQ read both operands
// there, at 128 bytes a cycle.
//
// With shared prefixes, a document here is a root and all that continues it, which are neighbours: its keys are the root's alone, and its
// queries all of them. What queries see beside the root's keys has been added to their sums by queries_kernel, and grad_k and grad_v of
// that are keys_kernel's. Segments begin anywhere in a tile of sums.
#pragma once

#include <algorithm>

#include "attention_long.cuh"
#include "attention_products.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/tensor_map.cuh"

namespace packops {
namespace {

// ---- Queries and their gradients, in turns: one warp copies them into a ring of shared memory
//
// Tensor maps copy whole tiles. They do not know where a document ends, and rows past its end must be zeros, since the next document may
// hold NaN: so threads of the warp copy its last tiles.

struct QueryMaps {
  CUtensorMap queries, grads;
};
template <int D>
bool encode_query_maps(QueryMaps* maps, const AttentionParams& p) {
  const auto encode = [&](CUtensorMap* map, const Heads& x) {
    return encode_tensor_map(map, p.dtype, x.data, {p.head_dim, p.heads, p.tokens}, {x.head, x.token},
                             attention_joint_queries(D));
  };
  return encode(&maps->queries, p.q) && encode(&maps->grads, p.grad_out);
}

#ifdef PACKOPS_SM90A

// A turn is full when its copies have arrived, and empty when all warps of the consumers have released it.
template <int D, int kTurns>
struct QueryRing {
  static constexpr int kTurn = attention_joint_queries(D), kTile = kRowBytes<D> * kTurn;
  using Place = RingPlace<kTurns>;
  char tiles[kTurns][2][kTile];  // queries, gradients; whoever has a ring puts it at a multiple of 1024 bytes
  float lse[kTurns][kTurn], delta[kTurns][kTurn];
  MBarrier full[kTurns], empty[kTurns];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kTurns; i++) mbarrier_init(&full[i], 1 + 32), mbarrier_init(&empty[i], 2 * 4);
  }
  // Of the consumers. `there`: rows of the tiles that are the document's.
  __device__ __forceinline__ void wait_full(const Place& at, int there) {
    mbarrier_wait_parity(&full[at.slot], uint32_t(at.parity));
    if (there < kTurn) fence_proxy_async();  // threads have written them
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
    const bool whole = there >= kTurn;
    MBarrier* barrier = &full[at.slot];
    if (lane == 0) {
      mbarrier_wait_parity(&empty[at.slot], uint32_t(at.parity ^ 1));
      mbarrier_arrive_expect_tx(barrier, whole ? 2 * kTile : 0);
    }
    __syncwarp();
    const auto copy = [&](char* tile, const CUtensorMap& map, const Heads& heads) {
      if (whole) {
        if (lane > 0) return;
#pragma unroll
        for (int panel = 0; panel < kPanels<D>; panel++)
          hopper::tma_load_3d(tile + panel * (128 * kTurn), map, 64 * panel, head, token, barrier);
      } else {
        const T* rows = head_of<T>(heads, token, head);
#pragma unroll 1  // the warp has few registers
        for (int i = lane; i < kTurn * (D / 8); i += 32) {
          const int row = i / (D / 8), chunk = i % (D / 8);
          const bool is_there = row < there && 8 * chunk < p.head_dim;
          cp_async_16_zfill(place<kTurn>(tile, row, chunk), rows + (is_there ? row * heads.token + chunk * 8 : 0), is_there);
        }
      }
    };
    copy(tiles[at.slot][0], maps.queries, p.q);
    copy(tiles[at.slot][1], maps.grads, p.grad_out);
    const int64_t row = head * p.tokens + token;
#pragma unroll
    for (int i = lane; i < kTurn; i += 32) {
      const int64_t from = row + (i < there ? i : 0);
      cp_async_4_zfill(&lse[at.slot][i], static_cast<const float*>(p.lse) + from, i < there);
      cp_async_4_zfill(&delta[at.slot][i], p.delta + from, i < there);
    }
    cp_async_mbarrier_arrive(barrier);
    at.advance();
  }
};

// ---- The kernels

// 128 keys of a document, and the turns of so many queries and a head that see them.
template <int kTurn>
struct LongJointItem {
  static constexpr int kKeys = kAttentionJointKeys;
  AttentionTile tile;
  int kv_head, length, key, first, last, group, heads, window;
  unsigned number;  // of the sums of the document's first tile

  __device__ __forceinline__ LongJointItem(const AttentionParams& p, const Scores& scores, unsigned item)
      : tile(p.tiles[item / unsigned(p.kv_heads)]),
        kv_head(int(item % unsigned(p.kv_heads))),
        length(tile.document_end - tile.document_begin),
        key(tile.begin - tile.document_begin),
        group(p.heads / p.kv_heads),
        heads(p.heads),
        window(scores.window),
        number(first_sums(tile.document_begin, tile.document)) {
    const Interval queries = queries_of_block(scores, key, kKeys, length);
    first = queries.first;
    last = first + (queries.last - first) / kTurn * kTurn;
  }
  // Of the document's keys. With shared prefixes, of the root's; queries are those of all that continues it.
  __device__ __forceinline__ int keys(const AttentionParams& p) const {
    return p.prefixes.segments ? length_of(p.prefixes.segments[tile.document]) : length;
  }
  // Blocks of keys that add to these queries before this one.
  __device__ __forceinline__ int before(int query) const {
    return key / kKeys - (window ? max(0, query - window + 1) / kKeys : 0);
  }
  // Of the sums of a head of the tile of this query, among those of all tiles.
  __device__ __forceinline__ int64_t place(int query, int head) const {
    return int64_t(number + unsigned(query / kAttentionRows)) * heads + head;
  }
  __device__ __forceinline__ int turns() const { return ((last - first) / kTurn + 1) * group; }
  template <typename F>
  __device__ __forceinline__ void for_each_turn(F&& f) const {
    for (int query = last; query >= first; query -= kTurn)
      for (int head = kv_head * group; head < (kv_head + 1) * group; head++) f(query, head);
  }
};

template <int D>
struct LongJointShared {
  static constexpr int kTurn = attention_joint_queries(D), kTile = kRowBytes<D> * kAttentionRows;
  // Of dQ, a consumer makes 64 queries, or a panel of features of 64. In the second of two panels there may be fewer.
  static constexpr bool kByTile = kTurn > kAttentionRows;
  static constexpr int kPart = kAttentionRows * 64;
  using Item = LongJointItem<kTurn>;
  alignas(1024) char keys_values[2][2][kTile];       // of each consumer: keys, values
  char changes[2][2 * kAttentionJointKeys * kTurn];  // dS of two turns
  float part[2][kPart];                              // of dQ
  QueryRing<D, attention_long_turns(D)> ring;
  MBarrier full_part[2], empty_part[2];
  ItemBox box;
};

template <typename T, int D>
__device__ __forceinline__ void copy_queries_by_tile(const QueryMaps& maps, const AttentionParams& p, const Scores& scores,
                                                     LongJointShared<D>& s, unsigned end, int lane) {
  typename decltype(s.ring)::Place at;
  for (unsigned items = 0;; items++) {
    if (lane == 0) s.box.put(items, draw_keys<2>(p, end));
    const int drawn = s.box.take(items, lane);
    if (drawn < 0) break;
    const typename LongJointShared<D>::Item item(p, scores, unsigned(drawn));
    item.for_each_turn([&](int query, int head) {
      s.ring.template fill<T>(at, maps, p, item.tile.document_begin, head, query, item.length, lane);
    });
  }
  cp_async_wait_all();
}

// Adds one consumer's parts of dQ to the sums. A part is counted when it has arrived, by which time the next one may be on its way.
template <int D>
__device__ __forceinline__ void add_parts(const AttentionParams& p, const Scores& scores, LongJointShared<D>& s, int role,
                                          int lane) {
  unsigned parts = 0;
  for (unsigned items = 0;; items++) {
    const int drawn = s.box.take(items, lane);
    if (drawn < 0) break;
    if (lane > 0) continue;  // one thread alone: another that waits might come when its phase is long over
    const typename LongJointShared<D>::Item item(p, scores, unsigned(drawn));
    int32_t* arriving = nullptr;
    const auto count = [&] {
      if (!arriving) return;
      cp_async_bulk_wait_group();
      red_release_add(arriving, 1);
      arriving = nullptr;
    };
    item.for_each_turn([&](int query, int head) {
      const int before = item.before(query), mine = query + (s.kByTile ? kAttentionRows * role : 0);
      const bool is_one = mine < item.length;
      const int64_t place = 2 * item.place(mine, head) + (s.kByTile ? 0 : role);
      int32_t* counter = p.added + place;
      const bool all_there = before == 0 || !is_one || load_acquire(counter) == before;
      count();
      if (!all_there) wait_acquire(counter, before);
      mbarrier_wait_parity(&s.full_part[role], parts++ % 2);
      if (is_one) {
        const int columns = s.kByTile || role == 0 ? 64 : D - 64;
        const int uneven = s.kByTile ? 0 : role * (64 - D / 2);  // columns: the first panel may have more than half of them
        cp_reduce_async_bulk_add(p.parts + (place * (D / 2) + uneven) * kAttentionRows, s.part[role],
                                 columns * kAttentionRows * sizeof(float));
        cp_async_bulk_commit_group();
        cp_async_bulk_wait_group_read<0>();
        arriving = counter;
      }
      mbarrier_arrive(&s.empty_part[role]);
    });
    count();
  }
}

#endif

template <typename T, int D>
__global__ void __launch_bounds__(kAttentionLongKeysThreads, 1)
    long_joint_kernel(const __grid_constant__ QueryMaps maps, const __grid_constant__ AttentionParams p,
                      const __grid_constant__ Scores scores, unsigned end) {
#ifdef PACKOPS_SM90A
  begin_overlapping(false);
  using Product = Products<T, D, true>;
  using Shared = LongJointShared<D>;
  static_assert(sizeof(Shared) <= attention_long_keys_shared(D));
  Shared& s = *dynamic_shared<Shared>();
  const int role = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, lane = thread % 32;
  if (threadIdx.x == 0) {
    s.ring.init();
    for (int i = 0; i < 2; i++) mbarrier_init(&s.full_part[i], 4), mbarrier_init(&s.empty_part[i], 1);
    s.box.init(8 + 3);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (role == 2) {
    setmaxnreg_dec<attention_producer_registers(2)>();
    if (thread < 32) copy_queries_by_tile<T, D>(maps, p, scores, s, end, lane);
    else if (thread < 96) add_parts<D>(p, scores, s, thread / 32 - 1, lane);
  } else {
    setmaxnreg_inc<attention_consumer_registers(2)>();
    constexpr int kTurn = Shared::kTurn;
    const int first_row = thread / 32 * 16;
    using Left = typename Product::template Left<1, kTurn / 8>;
    const auto add_rows = [](Sums<1, D>& sums, const Left& left, char* tile) {
      const WgmmaDescriptor rows(tile, kTurn * 128);
#pragma unroll
      for (int k = 0; k < kTurn / 16; k++) wgmma_rs(sums[0], left.words[k][0], rows.at(16 * k * 128), true, T{});
    };
    const ProductTurns<2> turns(role);
    char *keys = s.keys_values[role][0], *values = s.keys_values[role][1];
    typename decltype(s.ring)::Place at;
    unsigned turn = 0, parts = 0;  // of all items
    for (unsigned items = 0;; items++) {
      const int drawn = s.box.take(items, lane);
      if (drawn < 0) break;
      const typename Shared::Item item(p, scores, unsigned(drawn));
      const int key = item.key + kAttentionRows * role, token = item.tile.begin + kAttentionRows * role;
      const int there = min(kAttentionRows, item.keys(p) - key);  // not positive: this group has none, but takes part
      const Columns<D, true> columns(p.head_dim);
      Rows<T, D, kAttentionRows, 128, true>(p.k, token, item.kv_head, thread, columns).load(keys, 0, there);
      Rows<T, D, kAttentionRows, 128, true>(p.v, token, item.kv_head, thread, columns).load(values, 0, there);
      cp_async_commit_group();
      cp_async_wait_all();
      fence_proxy_async();
      bar_sync(kConsumersBarrier, 256);  // each multiplies the keys of both

      Sums<1, D> grad_k, grad_v;
      for_each(grad_k, [](float& x, int, int, int) { x = 0; });
      for_each(grad_v, [](float& x, int, int, int) { x = 0; });
      wgmma_fence_operand(grad_k[0]);
      wgmma_fence_operand(grad_v[0]);
      // By the order of products, both consumers have written dS of a turn when either multiplies it in the next one, and both have
      // multiplied it when either writes to the same place again.
      int query = item.last, head = item.kv_head * item.group;
      Sums<1, kTurn> x, g;  // scores, then P; dP, then dS
      Sums<1, Shared::kPart / kAttentionRows> part;
      const auto multiply = [&](Sums<1, kTurn>& sums, char* mine, int which) {
        Product::begin();
        Product::template multiply_rows<kAttentionRows, kTurn>(sums, mine, 0, s.ring.tiles[at.slot][which], 0, lane);
        Product::commit();
      };
      const auto multiply_changes = [&](unsigned turn) {
        const WgmmaDescriptor changes(s.changes[turn % 2] + (Shared::kByTile ? role * (128 * kAttentionJointKeys) : 0));
        const int mine = Shared::kByTile ? 0 : role * (128 * kAttentionRows);  // features
        Product::begin();
#pragma unroll
        for (int k = 0; k < kAttentionJointKeys / 16; k++)
          wgmma_ss_trans(part[0], changes.at(16 * k * 128), WgmmaDescriptor(s.keys_values[k / 4][0]).at(mine + k % 4 * 16 * 128),
                         k > 0, T{});
        Product::commit();
      };
      // One fence for the part and for dS: it waits for all that the thread has stored.
      const auto pass_part = [&](bool is_one) {
        if (is_one) {
          if (parts > 0) mbarrier_wait_parity(&s.empty_part[role], (parts - 1) % 2);
          parts++;
          float4* to = reinterpret_cast<float4*>(s.part[role]) + thread;
#pragma unroll
          for (int n = 0; n < Shared::kPart / 512; n++)
            to[n * 128] = {part[0][n][0], part[0][n][1], part[0][n][2], part[0][n][3]};
        }
        fence_proxy_async();
        __syncwarp();
        if (is_one && lane == 0) mbarrier_arrive(&s.full_part[role]);
      };
      s.ring.wait_full(at, item.length - query);
      turns.wait();
      multiply(x, keys, 0);
      multiply(g, values, 1);
      turns.pass();
      const auto add = [&](int number, auto next_follows) {
        constexpr bool kNext = decltype(next_follows)::value;
        const float *lse = s.ring.lse[at.slot], *delta = s.ring.delta[at.slot];
        char* change = s.changes[turn % 2];
        const auto column = [&](int n, int i) { return 8 * n + 2 * (lane % 4) + i % 2; };
        weigh<Product>(
            x, g, scores, [&](int, int n, int i) { return lse[column(n, i)]; },
            [&](int, int n, int i) { return delta[column(n, i)]; });
        if (!scores.all_see(query, query + kTurn, key, key + kAttentionRows, key + there)) {
          const auto seen = [&](int row) {
            const int mine = first_row + row;  // past the end, keys are zeros, but their weights need not be finite
            return mine < there ? scores.queries_of(key + mine) : Interval{0, -1};
          };
          mask(x, query, lane, 0.f, seen);
          mask(g, query, lane, 0.f, seen);
        }
        const Left weights(x), change_words(g);
        const auto last = at;
        at.advance();
        if (++head == (item.kv_head + 1) * item.group) head = item.kv_head * item.group, query -= kTurn;
        if constexpr (kNext) s.ring.wait_full(at, item.length - query);
        turns.wait();
        wgmma_fence_operand(grad_k[0]);
        wgmma_fence_operand(grad_v[0]);
        Product::begin();
        add_rows(grad_v, weights, s.ring.tiles[last.slot][1]);
        add_rows(grad_k, change_words, s.ring.tiles[last.slot][0]);
        Product::commit();
        multiply_changes(turn - 1);  // in the first turn, of nobody
#pragma unroll
        for (int k = 0; k < kTurn / 16; k++)
          stmatrix_x4(place<128>(change, kAttentionRows * role + first_row + lane % 16, 2 * k + lane / 16),
                      change_words.words[k][0]);
        Product::template wait<1>(grad_k, grad_v);
        s.ring.release(last, lane);
        if constexpr (kNext) multiply(x, keys, 0);
        Product::template wait<kNext>(part);
        pass_part(number > 0);  // before dP: there are no registers for both
        if constexpr (kNext) multiply(g, values, 1);
        turns.pass();
        turn++;
      };
      const int count = item.turns();
      int number = 0;
      for (; number + 1 < count; number++) add(number, std::true_type{});
      add(number, std::false_type{});
      bar_sync(kConsumersBarrier, 256);  // both have written dS of the last turn
      multiply_changes(turn - 1);
      Product::wait(part);
      pass_part(true);
      const int64_t stride = int64_t(p.kv_heads) * columns.count, first = token * stride + item.kv_head * columns.count;
      const float one[1][2] = {{1.f, 1.f}}, scale[1][2] = {{scores.product_scale, scores.product_scale}};
      bar_sync(kConsumersBarrier, 256);  // neither multiplies these keys any more
      if (there > 0) {
        store_rows<T, D, kAttentionRows, 1>(static_cast<T*>(p.grad_v) + first, stride, there, values, first_row, lane, grad_v,
                                            one, columns);
        store_rows<T, D, kAttentionRows, 1>(static_cast<T*>(p.grad_k) + first, stride, there, keys, first_row, lane, grad_k,
                                            scale, columns);
      }
      bar_sync(kGroupBarrier + role, 128);  // all have stored what lies where the next keys and values come
    }
    turns.finish();
  }
#endif
}

// grad_q from its sums.
template <typename T, int D, bool kForest>
__global__ void __launch_bounds__(128) joint_queries_kernel(const __grid_constant__ AttentionParams p, unsigned end) {
#ifdef PACKOPS_SM90A
  begin_overlapping(false);
  const int thread = int(threadIdx.x), lane = thread % 32;
  for (unsigned i = blockIdx.x; i < end; i += gridDim.x) {
    const AttentionTile tile = p.tiles[i / unsigned(p.heads)];
    if (!may_be_long<kForest>(p, tile)) break;
    const int root = long_root<kForest>(p, tile);
    if (root < 0) continue;
    const int head = int(i % unsigned(p.heads));
    Sums<1, D> sums;
    QuerySums<D, kForest>::of(p, tile, root, head).load(sums, thread);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = tile.begin + thread / 32 * 16 + 8 * half + lane / 4;
      store_row<T, D>(static_cast<T*>(p.grad_q) + (token * int64_t(p.heads) + head) * p.head_dim, token < tile.end, half, lane,
                      sums, float(p.scale), Columns<D, true>(p.head_dim));
    }
  }
#endif
}

template <typename T, int D>
cudaError_t launch_long_joint(const AttentionParams& p, int64_t tiles, const Device& device, cudaStream_t stream) {
  const int64_t items = tiles * p.kv_heads;
  QueryMaps maps;
  if (items > 0x7fffffff || !encode_query_maps<D>(&maps, p)) return cudaErrorInvalidValue;
  return launch_large<long_joint_kernel<T, D>>({.follows = true}, device, std::min<int64_t>(device.multiprocessors, items),
                                               kAttentionLongKeysThreads, attention_long_keys_shared(D), stream, maps, p,
                                               Scores(p), unsigned(items));
}
template <typename T, int D, bool kForest>
cudaError_t launch_joint_queries(const AttentionParams& p, int64_t tiles, const Device& device, cudaStream_t stream) {
  const int64_t all = tiles * p.heads;
  if (all > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_large<joint_queries_kernel<T, D, kForest>>(
      {.follows = true}, device, std::min<int64_t>(16 * device.multiprocessors, all), 128, 0, stream, p, unsigned(all));
}

}  // namespace
}  // namespace packops

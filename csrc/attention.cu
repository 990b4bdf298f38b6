// Attention within documents on CUDA. Formulas: attention.h. Work distribution: attention_launch.h.
//
//   tiles         cu_seqlens -> tiles of 64 tokens, those of long documents first (attention_tiles.cuh)
//   forward       out and lse, with an online softmax                                  2 products per pair of tiles
//   long forward  the same of long documents, on Hopper (attention_long_forward.cuh)
//   queries       delta and grad_q, scores recomputed                                  3 products
//   keys          grad_k and grad_v, scores recomputed, summed over a group's heads    4 products (attention_slices.cuh)
//   long split    the same of long documents of more than 128 features, on Hopper (attention_long_split.cuh)
//   long joint    all gradients of long documents of up to 128 features, on Hopper (attention_long_joint.cuh): 5 products
//
// Bound: the tensor cores from a few hundred tokens per document on (forward: 4 tokens keys_seen head_dim FLOPs per head); memory
// below that (q, k, v and out once). The backward pass recomputes the scores twice. A single kernel saves two products, but
// adds to grad_q in memory, and blocks have to take turns there if the same bits shall come out. For long documents that pays.
//
// Products: attention_products.cuh. The result of one product becomes an operand of the next without leaving its registers. Rows
// past the end of a document are zeros.
//
// Shared prefixes: a tile is of one segment. Its queries all see the same keys, those of the segments from theirs up to the root,
// which are taken one segment after the other, by position. Its keys are seen by a range of tokens, those of their subtree. So no
// product has rows of a sibling, and even NaN stays within a document. The keys of a long root are left to the kernels for long documents,
// to which it and all that continues it are one document whose later tokens are queries alone. Those of a short one are shared out, where
// many queries see them (attention_slices.cuh).
#include "attention.h"

#include <bit>

#include "attention_launch.h"
#include "attention_long_forward.cuh"
#include "attention_long_joint.cuh"
#include "attention_long_split.cuh"
#include "attention_products.cuh"
#include "attention_rows.cuh"
#include "attention_scores.cuh"
#include "attention_slices.cuh"
#include "attention_tiles.cuh"
#include "common/device.cuh"
#include "common/launch.cuh"

namespace packops {
namespace {

// ---- Forward

template <typename T, int D, bool kPadded, bool kGroup, bool kForest>
__global__ void __launch_bounds__(attention_forward_shape(D, kGroup).threads(),
                                  attention_forward_shape(D, kGroup).per_multiprocessor)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Scores scores, bool beside) {
  if constexpr (kNeverRuns<kGroup>) return;
  constexpr AttentionShape kShape = attention_forward_shape(D, kGroup);
  constexpr int kBlocks = kShape.blocks, kThreads = kShape.threads(), kKeys = kShape.turn;
  using Product = Products<T, D, kGroup>;
  const Columns<D, kPadded> columns(p.head_dim);
  begin_overlapping(beside);
  const AttentionTile tile = p.tiles[blockIdx.x / unsigned(p.heads)];
  if (tile.begin == tile.end || is_long<kForest>(p, tile)) return end_overlapping(beside);
  constexpr bool kBranches =
      kForest && kGroup;  // which may go on from what the kernel for long documents makes of their root's keys
  const int root = kBranches && forwards_branches(p) && is_any_long<kForest>(p) ? long_root<kForest>(p, tile) : -1;
  const int head = int(blockIdx.x % unsigned(p.heads)), kv_head = head / (p.heads / p.kv_heads);
  const int thread = int(threadIdx.x), lane = thread % 32, first_row = thread / 32 * 16 * kBlocks;
  char* queries = dynamic_shared<char>();
  char *keys = queries + kRowBytes<D> * kAttentionRows, *values = keys + kRowBytes<D> * kKeys;

  const int query = position_of<kForest>(p, tile);
  using Turns = KeyTurns<kForest, kKeys>;
  const Rows<T, D, kKeys, kThreads, kPadded> from_k(p.k, Turns::first_row(tile), kv_head, thread, columns),
      from_v(p.v, Turns::first_row(tile), kv_head, thread, columns);
  const auto load = [&](char* to, const auto& from, const Turns& turn) {
    if (turn.is_there()) from.load(to, turn.row + turn.key, turn.end - turn.key);
    cp_async_commit_group();
  };
  const auto wait_for_older = [] {  // of two groups of copies
    cp_async_wait_group<1>();
    if constexpr (kGroup) fence_proxy_async();
    __syncthreads();
  };
  Rows<T, D, kAttentionRows, kThreads, kPadded>(p.q, tile.begin, head, thread, columns).load(queries, 0, tile.end - tile.begin);
  Turns turn(p, tile, query, scores.window, root >= 0);
  load(keys, from_k, turn);
  load(values, from_v, turn);

  Sums<kBlocks, D> out;
  float greatest[kBlocks][2], sum[kBlocks][2];
  for_each(out, [](float& x, int, int, int) { x = 0; });
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) greatest[m][half] = -INFINITY, sum[m][half] = 0;
  if constexpr (kBranches)
    if (root >= 0) {
      griddepcontrol_wait();
      const auto sums = QuerySums<D, true>::of(p, tile, root, head);
      sums.load(out, thread);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = first_row + 8 * half + lane / 4;
        if (row >= tile.end - tile.begin) continue;
        const float2 state = sums.state(row);
        greatest[0][half] = state.x, sum[0][half] = lane % 4 == 0 ? state.y : 0.f;
      }
    }

  while (turn.is_there()) {
    const Turns next = turn.next();
    wait_for_older();
    Sums<kBlocks, kKeys> s;
    Product::begin();
    Product::template multiply_rows<kAttentionRows, kKeys>(s, queries, first_row, keys, 0, lane);
    Product::commit();
    Product::wait(s);
    __syncthreads();  // all warps have read these keys
    load(keys, from_k, next);

    if (scores.capped) for_each(s, [&](float& x, int, int, int) { x = scores.cap(x); });
    if (!scores.all_see(query, query + kAttentionRows, turn.key, turn.key + kKeys, turn.end))
      mask(s, turn.key, lane, -INFINITY, [&](int row) { return scores.keys_of(query + first_row + row, turn.end); });
    float shift[kBlocks][2];       // the maximum, as an exponent of 2
    float correction[kBlocks][2];  // the factor for what is summed so far
    float now[kBlocks][2];
#pragma unroll
    for (int m = 0; m < kBlocks; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float most = greatest[m][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        now[m][half] = max_of_quad(most);
      }
    scores.relate(s, greatest, now, shift, correction);
    bool rises = false;
#pragma unroll
    for (int m = 0; m < kBlocks; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        greatest[m][half] = now[m][half];
        rises |= correction[m][half] != 1.f;
      }
    if (__any_sync(kWarp, rises)) {
#pragma unroll
      for (int m = 0; m < kBlocks; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) sum[m][half] *= correction[m][half];
      for_each(out, [&](float& x, int m, int, int i) { x *= correction[m][i / 2]; });
    }
    for_each(s, [&](float& x, int m, int, int i) {
      x = ex2_approx(fmaf(x, scores.scale, -shift[m][i / 2]));
      sum[m][i / 2] += x;
    });
    const typename Product::template Left<kBlocks, kKeys / 8> weights(s);

    wait_for_older();
    Product::begin();
    Product::template add_weighted_rows<kKeys>(out, weights, values, 0, lane);
    Product::commit();
    Product::wait(out);
    __syncthreads();  // all warps have read these values
    load(values, from_v, next);
    turn = next;
  }
  cp_async_wait_all();
  __syncthreads();

  float factor[kBlocks][2];
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float total = sum_of_quad(sum[m][half]);
      factor[m][half] = total == 0 ? 0.f : 1.f / total;
      const int row = first_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && row < tile.end - tile.begin) store_lse(p, scores, head, tile.begin + row, greatest[m][half], total);
    }
  const int64_t stride = int64_t(p.heads) * columns.count;
  store_rows<T, D, kAttentionRows, kBlocks>(static_cast<T*>(p.out) + tile.begin * stride + head * columns.count, stride,
                                            tile.end - tile.begin, queries, first_row, lane, out, factor, columns);
  end_overlapping(beside);
}

// ---- Backward

template <typename T, int D, bool kPadded, bool kGroup, bool kForest>
__global__ void __launch_bounds__(attention_queries_shape(D, kGroup).threads(),
                                  attention_queries_shape(D, kGroup).per_multiprocessor)
    queries_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Scores scores) {
  if constexpr (kNeverRuns<kGroup>) return;
  constexpr AttentionShape kShape = attention_queries_shape(D, kGroup);
  constexpr int kBlocks = kShape.blocks, kThreads = kShape.threads(), kKeys = kShape.turn, kStep = kShape.step;
  using Product = Products<T, D, kGroup>;
  const Columns<D, kPadded> columns(p.head_dim);
  griddepcontrol_launch_dependents();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.drawn = 0;
  constexpr bool kJoint = kGroup && !attention_keys_split(D);
  if (p.added && threadIdx.x < 2) p.added[2 * blockIdx.x + threadIdx.x] = 0;
  const AttentionTile tile = p.tiles[blockIdx.x / unsigned(p.heads)];
  if (tile.begin == tile.end) return;
  const int head = int(blockIdx.x % unsigned(p.heads)), kv_head = head / (p.heads / p.kv_heads);
  const int thread = int(threadIdx.x), lane = thread % 32, first_row = thread / 32 * 16 * kBlocks;
  const int root = kJoint && p.long_from != kNeverLong && is_any_long<kForest>(p) ? long_root<kForest>(p, tile) : -1;
  if constexpr (kJoint)
    if (root == tile.document) {  // the rest is done with grad_k and grad_v
      QuerySums<D, kForest>::of(p, tile, root, head).clear(thread);
      return compute_deltas<T, D, kThreads>(p, tile.begin, tile.end - tile.begin, head, dynamic_shared<float>(), thread, columns);
    }
  char* queries = dynamic_shared<char>();
  char *grads = queries + kRowBytes<D> * kAttentionRows, *turns = grads + kRowBytes<D> * kAttentionRows;
  float* deltas = reinterpret_cast<float*>(turns + kShape.stages * 2 * kRowBytes<D> * kKeys);

  const int query = position_of<kForest>(p, tile), there = tile.end - tile.begin;
  using Turns = KeyTurns<kForest, kKeys>;
  const Rows<T, D, kKeys, kThreads, kPadded> from_k(p.k, Turns::first_row(tile), kv_head, thread, columns),
      from_v(p.v, Turns::first_row(tile), kv_head, thread, columns);
  const auto buffer_of = [&](const Turns& turn) { return turns + turn.buffer(kShape.stages) * (2 * kRowBytes<D> * kKeys); };
  const auto load = [&](const Turns& turn) {
    if (!turn.is_there()) return;
    char* to = buffer_of(turn);
    from_k.load(to, turn.row + turn.key, turn.end - turn.key);
    from_v.load(to + kRowBytes<D> * kKeys, turn.row + turn.key, turn.end - turn.key);
  };
  Turns turn(p, tile, query, scores.window, kJoint && root >= 0);
  Rows<T, D, kAttentionRows, kThreads, kPadded>(p.q, tile.begin, head, thread, columns).load(queries, 0, there);
  Rows<T, D, kAttentionRows, kThreads, kPadded>(p.grad_out, tile.begin, head, thread, columns).load(grads, 0, there);
  load(turn);
  cp_async_commit_group();

  compute_deltas<T, D, kThreads>(p, tile.begin, there, head, deltas, thread, columns);
  float lse[kBlocks][2], delta[kBlocks][2];
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first_row + 16 * m + 8 * half + lane / 4;
      lse[m][half] = row < there ? static_cast<const float*>(p.lse)[head * p.tokens + tile.begin + row] : 0.f;
    }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) delta[m][half] = deltas[first_row + 16 * m + 8 * half + lane / 4];

  Sums<kBlocks, D> grad;
  for_each(grad, [](float& x, int, int, int) { x = 0; });
  while (turn.is_there()) {
    const Turns next = turn.next();
    if constexpr (kShape.stages == 2) {
      load(next);
      cp_async_commit_group();
    }
    cp_async_wait_group<kShape.stages - 1>();
    if constexpr (kGroup) fence_proxy_async();
    __syncthreads();
    char *keys = buffer_of(turn), *values = keys + kRowBytes<D> * kKeys;
#pragma unroll 1
    for (int step = 0; step < kKeys && turn.key + step < turn.end; step += kStep) {
      Sums<kBlocks, kStep> s, g;
      Product::begin();
      Product::template multiply_rows<kAttentionRows, kKeys>(s, queries, first_row, keys, step, lane);
      Product::commit();
      Product::template multiply_rows<kAttentionRows, kKeys>(g, grads, first_row, values, step, lane);
      Product::commit();
      weigh<Product>(
          s, g, scores, [&](int m, int, int i) { return lse[m][i / 2]; }, [&](int m, int, int i) { return delta[m][i / 2]; });
      const int key = turn.key + step;
      if (!scores.all_see(query, query + kAttentionRows, key, key + kStep, turn.end))
        mask(g, key, lane, 0.f, [&](int row) { return scores.keys_of(query + first_row + row, turn.end); });
      const typename Product::template Left<kBlocks, kStep / 8> weights(g);
      Product::begin();
      Product::template add_weighted_rows<kKeys>(grad, weights, keys, step, lane);
      Product::commit();
      Product::wait(grad);
    }
    __syncthreads();
    if constexpr (kShape.stages == 1) {
      load(next);
      cp_async_commit_group();
    }
    turn = next;
  }
  cp_async_wait_all();
  __syncthreads();

  if constexpr (kJoint && kForest)
    if (root >= 0)  // the root's keys are still to come
      return QuerySums<D, true>::of(p, tile, root, head).store(grad, thread);
  const int64_t stride = int64_t(p.heads) * columns.count;
  float factor[kBlocks][2];
#pragma unroll
  for (int m = 0; m < kBlocks; m++) factor[m][0] = factor[m][1] = scores.product_scale;
  store_rows<T, D, kAttentionRows, kBlocks>(static_cast<T*>(p.grad_q) + tile.begin * stride + head * columns.count, stride, there,
                                            queries, first_row, lane, grad, factor, columns);
}

// Adds the sums of a block's teams to those of the first team, in order.
template <int kTeams, int kTeamThreads, int kBlocks, int kColumns>
__device__ __forceinline__ void add_teams(float (&sums)[kBlocks][kColumns][4], char* buffers, int buffer_bytes, int team,
                                          int thread) {
  if constexpr (kTeams > 1) {
    __syncthreads();
    const auto at = [&](int of, int m, int n, int i) -> float& {
      return reinterpret_cast<float*>(buffers + of * buffer_bytes)[((m * kColumns + n) * 4 + i) * kTeamThreads + thread];
    };
    if (team > 0) for_each(sums, [&](float& x, int m, int n, int i) { at(team, m, n, i) = x; });
    __syncthreads();
    if (team == 0)
      for (int other = 1; other < kTeams; other++)
        for_each(sums, [&](float& x, int m, int n, int i) { x += at(other, m, n, i); });
  }
}

enum class Half { both, keys, values };  // which gradients a kernel computes

template <typename T, int D, bool kPadded, bool kGroup, bool kForest, int kTeams, Half kHalf>
__global__ void __launch_bounds__(attention_keys_shape(D, kGroup).threads() * kTeams,
                                  attention_keys_shape(D, kGroup).per_multiprocessor)
    keys_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Scores scores, bool beside) {
  if constexpr (kNeverRuns<kGroup>) return;
  constexpr AttentionShape kShape = attention_keys_shape(D, kGroup);
  constexpr int kBlocks = kShape.blocks, kThreads = kShape.threads(), kQueries = kShape.turn, kStep = kShape.step;
  constexpr int kTurnBytes = 2 * kRowBytes<D> * kQueries;
  using Product = Products<T, D, kGroup>;
  const Columns<D, kPadded> columns(p.head_dim);
  constexpr bool kForKeys = kHalf != Half::values, kForValues = kHalf != Half::keys;
  begin_overlapping(beside);
  const KeysWork<kForest> work(p, blockIdx.x / unsigned(p.kv_heads));
  const AttentionTile& tile = work.tile;
  if (tile.begin == tile.end || is_long<kForest>(p, tile)) return end_overlapping(beside);
  const int kv_head = int(blockIdx.x % unsigned(p.kv_heads)), group = p.heads / p.kv_heads;
  const int team = int(threadIdx.x) / kThreads, thread = int(threadIdx.x) % kThreads, lane = thread % 32;
  const int first_row = thread / 32 * 16 * kBlocks;
  char* keys = dynamic_shared<char>();
  char *values = keys + kRowBytes<D> * kAttentionRows, *buffers = values + kRowBytes<D> * kAttentionRows;
  char* turns = buffers + team * (kShape.stages * kTurnBytes);
  float* numbers =
      reinterpret_cast<float*>(buffers + kTeams * (kShape.stages * kTurnBytes)) + team * (kShape.stages * 2 * kQueries);

  const int length = tile.document_end - tile.document_begin, key = tile.begin - tile.document_begin;
  const int there = tile.end - tile.begin;
  // Blocks of queries that see any of these keys, for each head of the team.
  int query_begin = p.causal ? key : 0;
  int query_end = length == 0 ? query_begin : scores.window ? min(length, key + kAttentionRows - 1 + scores.window) : length;
  if constexpr (kForest)
    if (work.slices.count > 1) {
      query_begin = max(query_begin, work.slice * work.slices.queries);
      query_end = min(query_end, (work.slice + 1) * work.slices.queries);
    }
  const int turns_per_head = (query_end - query_begin + kQueries - 1) / kQueries;
  const int count = turns_per_head * ((group - team + kTeams - 1) / kTeams);
  const auto head_of_turn = [&](int turn) { return kv_head * group + team + kTeams * (turn / turns_per_head); };
  const auto query_of = [&](int turn) { return query_begin + turn % turns_per_head * kQueries; };
  // With shared prefixes, a window is one of positions, which begin anew at every branch.
  const int32_t* positions = kForest && p.window && length > 0 ? p.prefixes.positions : nullptr;
  const auto position = [&](int i) { return positions[tile.document_begin + min(i, length - 1)]; };
  // The first turn from this one on that sees any key. The same for all warps of a team.
  const auto next_turn = [&](int turn) {
    if constexpr (kForest) {
      if (!positions) return turn;
      const int reach = position(key + there - 1) + int(p.window);
      for (; turn < count; turn++) {
        int least = 0x7fffffff;
        for (int i = lane; i < kQueries; i += 32) least = min(least, position(query_of(turn) + i));
        if (__any_sync(kWarp, least < reach)) break;
      }
    }
    return turn;
  };
  const auto load = [&](int turn, int number) {
    const int head = head_of_turn(turn);
    const int query = query_of(turn), token = tile.document_begin + query;
    char* to = turns + number % kShape.stages * kTurnBytes;
    using QueryRows = Rows<T, D, kQueries, kThreads, kPadded>;
    QueryRows(p.q, token, head, thread, columns).load(to, 0, length - query);
    QueryRows(p.grad_out, token, head, thread, columns).load(to + kRowBytes<D> * kQueries, 0, length - query);
    float* lse = numbers + number % kShape.stages * (2 * kQueries);
    if (thread < kQueries) {
      const bool is_there = query + thread < length;
      const int64_t row = head * p.tokens + (is_there ? token + thread : 0);
      cp_async_4_zfill(lse + thread, static_cast<const float*>(p.lse) + row, is_there);
      cp_async_4_zfill(lse + kQueries + thread, p.delta + row, is_there);
    }
  };
  using KeyRows = Rows<T, D, kAttentionRows, kThreads * kTeams, kPadded>;
  KeyRows(p.k, tile.begin, kv_head, int(threadIdx.x), columns).load(keys, 0, there);
  if constexpr (kForKeys) KeyRows(p.v, tile.begin, kv_head, int(threadIdx.x), columns).load(values, 0, there);
  int turn = next_turn(0);
  if (turn < count) load(turn, 0);
  cp_async_commit_group();
  cp_async_wait_all();
  if constexpr (kGroup) fence_proxy_async();
  __syncthreads();

  Sums<kBlocks, D> grad_k, grad_v;
  for_each(grad_k, [](float& x, int, int, int) { x = 0; });
  for_each(grad_v, [](float& x, int, int, int) { x = 0; });
  for (int number = 0, next; turn < count; turn = next, number++) {
    next = next_turn(turn + 1);
    if constexpr (kShape.stages == 2) {
      if (next < count) load(next, number + 1);
      cp_async_commit_group();
    }
    cp_async_wait_group<kShape.stages - 1>();
    if constexpr (kGroup) fence_proxy_async();
    bar_sync(1 + team, kThreads);
    char *queries = turns + number % kShape.stages * kTurnBytes, *grads = queries + kRowBytes<D> * kQueries;
    const float *lse = numbers + number % kShape.stages * (2 * kQueries), *delta = lse + kQueries;
    const int query = query_of(turn);
#pragma unroll 1
    for (int step = 0; step < kQueries && query + step < query_end; step += kStep) {
      Sums<kBlocks, kStep> s, g;
      if constexpr (!kForKeys) for_each(g, [](float& x, int, int, int) { x = 0; });
      Product::begin();
      Product::template multiply_rows<kAttentionRows, kQueries>(s, keys, first_row, queries, step, lane);
      Product::commit();
      if constexpr (kForKeys) Product::template multiply_rows<kAttentionRows, kQueries>(g, values, first_row, grads, step, lane);
      Product::commit();
      weigh<Product>(
          s, g, scores, [&](int, int n, int i) { return lse[step + 8 * n + 2 * (lane % 4) + i % 2]; },
          [&](int, int n, int i) { return delta[step + 8 * n + 2 * (lane % 4) + i % 2]; });
      if (!scores.all_see(query + step, query + step + kStep, key, key + kAttentionRows, length)) {
        const auto seen = [&](int row) { return scores.queries_of(key + first_row + row); };
        mask(s, query + step, lane, 0.f, seen);
        mask(g, query + step, lane, 0.f, seen);
      }
      if constexpr (kForest)
        if (positions) {
          const auto seen = [&](int row, int column) {
            return position(query + step + column) - position(key + first_row + row) < int(p.window);
          };
          mask_each(s, lane, 0.f, seen);
          mask_each(g, lane, 0.f, seen);
        }
      using Left = typename Product::template Left<kBlocks, kStep / 8>;
      const Left weights(s), changes(g);
      Product::begin();
      if constexpr (kForValues) Product::template add_weighted_rows<kQueries>(grad_v, weights, grads, step, lane);
      if constexpr (kForKeys) Product::template add_weighted_rows<kQueries>(grad_k, changes, queries, step, lane);
      Product::commit();
      Product::wait(grad_v, grad_k);
    }
    bar_sync(1 + team, kThreads);
    if constexpr (kShape.stages == 1) {
      if (next < count) load(next, number + 1);
      cp_async_commit_group();
    }
  }
  cp_async_wait_all();
  __syncthreads();

  const auto for_each_sums = [&](auto&& f) {
    if constexpr (kForValues) f(grad_v, 0);
    if constexpr (kForKeys) f(grad_k, 1);
  };
  for_each_sums([&](auto& grad, int) { add_teams<kTeams, kThreads>(grad, buffers, kShape.stages * kTurnBytes, team, thread); });
  if constexpr (kForest)
    if (work.slices.count > 1 &&
        !work.template add_up<D, kThreads>(p, kv_head, kForValues ? 0 : 1, team == 0, thread, for_each_sums))
      return end_overlapping(beside);
  const int64_t stride = int64_t(p.kv_heads) * columns.count, first = tile.begin * stride + kv_head * columns.count;
  const auto finish = [&](Sums<kBlocks, D>& grad, void* to, char* rows, float scale) {
    float factor[kBlocks][2];
#pragma unroll
    for (int m = 0; m < kBlocks; m++) factor[m][0] = factor[m][1] = scale;
    if (team == 0)
      store_rows<T, D, kAttentionRows, kBlocks>(static_cast<T*>(to) + first, stride, there, rows, first_row, lane, grad, factor,
                                                columns);
  };
  if constexpr (kForValues) finish(grad_v, p.grad_v, values, 1.f);
  if constexpr (kForKeys) finish(grad_k, p.grad_k, keys, scores.product_scale);
  end_overlapping(beside);
}

// ---- Launches

template <typename T, int D, bool kPadded, bool kGroup, bool kForest>
cudaError_t launch_forward(AttentionParams p, int64_t tiles, const Device& device, cudaStream_t stream) {
  p.long_from = choose_attention_long_forward_from(p, device);
  const auto launch_short = [&](bool beside) {
    return launch_large<forward_kernel<T, D, kPadded, kGroup, kForest>>(
        {.follows = device.overlaps_launches()}, device, tiles * p.heads, attention_forward_shape(D, kGroup).threads(),
        attention_forward_shared(D, kGroup), stream, p, Scores(p), beside);
  };
  if constexpr (kGroup)
    if (p.long_from != kNeverLong) {
      const auto launch_long = [&](bool beside) {
        return launch_long_forward<T, D, kPadded, kForest>(p, tiles, device, stream, beside);
      };
      constexpr bool kLongFirst = kForest || kAttentionLongFirst;  // branches go on from what it has made
      const cudaError_t error = kLongFirst ? launch_long(false) : launch_short(false);
      if (error != cudaSuccess) return error;
      return kLongFirst ? launch_short(true) : launch_long(true);
    }
  return launch_short(false);
}

template <typename T, int D, bool kPadded, bool kGroup, bool kForest>
cudaError_t launch_backward(AttentionParams p, int64_t tiles, const Device& device, cudaStream_t stream) {
  constexpr AttentionShape kQueries = attention_queries_shape(D, kGroup), kKeys = attention_keys_shape(D, kGroup);
  p.long_from = choose_attention_long_keys_from(p, device);
  cudaError_t error = launch_large<queries_kernel<T, D, kPadded, kGroup, kForest>>(
      {}, device, tiles * p.heads, kQueries.threads(), attention_queries_shared(D, kGroup), stream, p, Scores(p));
  if (error != cudaSuccess) return error;
  bool beside = p.long_from != kNeverLong;
  if constexpr (kGroup)
    if (beside) {
      if constexpr (attention_keys_split(D)) error = launch_long_split<T, D, kPadded>(p, tiles, device, stream);
      else error = launch_long_joint<T, D>(p, tiles, device, stream);
      if (error != cudaSuccess) return error;
    }
  const int64_t further = may_have_slices(p) ? p.tokens / kAttentionRows + 1 : 0;  // blocks for slices that are no tile's first
  const auto with_teams = [&](auto number) {
    constexpr int kTeams = number;
    const auto with_half = [&](auto half) {
      return launch_large<keys_kernel<T, D, kPadded, kGroup, kForest, kTeams, half>>(
          {.follows = device.overlaps_launches()}, device, (tiles + further) * p.kv_heads, kKeys.threads() * kTeams,
          attention_keys_shared(D, kGroup, kTeams), stream, p, Scores(p, false), beside);
    };
    if constexpr (attention_keys_split(D)) {
      const cudaError_t error = with_half(std::integral_constant<Half, Half::values>{});
      beside = true;  // neither reads what the other writes
      return error != cudaSuccess ? error : with_half(std::integral_constant<Half, Half::keys>{});
    } else {
      return with_half(std::integral_constant<Half, Half::both>{});
    }
  };
  const auto launch_short = [&] {
    constexpr int kMost = attention_teams(D, kGroup, 4);
    const int teams = attention_teams(D, kGroup, p.heads / p.kv_heads, device.shared_per_block);
    if constexpr (kMost >= 4)
      if (teams == 4) return with_teams(std::integral_constant<int, 4>{});
    if constexpr (kMost >= 2)
      if (teams == 2) return with_teams(std::integral_constant<int, 2>{});
    return with_teams(std::integral_constant<int, 1>{});
  };
  error = launch_short();
  if constexpr (kGroup && !attention_keys_split(D))
    if (error == cudaSuccess && p.long_from != kNeverLong) error = launch_joint_queries<T, D, kForest>(p, tiles, device, stream);
  return error;
}

// f(element type, columns of tiles, whether heads have fewer, whether by warp groups, whether documents share prefixes)
template <typename F>
cudaError_t dispatch(const AttentionParams& p, const Device& device, F&& f) {
  const auto with_dim = [&](auto type, auto dim) {
    const auto with_padded = [&](auto padded) {
      const auto with_group = [&](auto group) {
        return p.prefixes ? f(type, dim, padded, group, std::true_type{}) : f(type, dim, padded, group, std::false_type{});
      };
      return device.has_wgmma ? with_group(std::true_type{}) : with_group(std::false_type{});
    };
    if constexpr (std::has_single_bit(unsigned(dim)))  // heads of 96 and 192 features take the padded form, too
      if (p.head_dim == dim) return with_padded(std::false_type{});
    return with_padded(std::true_type{});
  };
  const auto with_type = [&](auto type) {
    switch (attention_takes(p.head_dim) ? attention_columns(p.head_dim) : 0) {
      case 64: return with_dim(type, std::integral_constant<int, 64>{});
      case 96: return with_dim(type, std::integral_constant<int, 96>{});
      case 128: return with_dim(type, std::integral_constant<int, 128>{});
      case 192: return with_dim(type, std::integral_constant<int, 192>{});
      case 256: return with_dim(type, std::integral_constant<int, 256>{});
      default: return cudaErrorInvalidValue;
    }
  };
  switch (p.dtype) {
    case DType::bf16: return with_type(bf16_t{});
    case DType::f16: return with_type(half_t{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_cuda(const AttentionParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t tiles = attention_tiles(p.tokens, p.axis.documents);
  launch(p.axis.index_dtype == DType::i32 ? tiles_kernel<int32_t> : tiles_kernel<int64_t>, dim3(1), dim3(kClasses), 0, stream, p,
         tiles);
  return dispatch(p, device, [&](auto type, auto dim, auto padded, auto group, auto forest) {
    return launch_forward<decltype(type), dim, padded, group, forest>(p, tiles, device, stream);
  });
}

int64_t attention_parts(const AttentionParams& p, bool backward) {
  Device device;
  if (p.heads == 0 || current_device(device) != cudaSuccess) return 0;
  const int columns = attention_columns(p.head_dim);
  const int64_t sums = attention_sums(p.tokens, p.axis.documents, p.heads, columns);
  if (backward) {
    const bool joint = !attention_keys_split(columns) && choose_attention_long_keys_from(p, device) != kNeverLong;
    return (joint ? sums : 0) + (may_have_slices(p) ? 2 * attention_sums(p.tokens, p.axis.documents, p.kv_heads, columns) : 0);
  }
  AttentionParams forward = p;
  forward.long_from = choose_attention_long_forward_from(p, device);
  return forwards_branches(forward) ? sums + 2 * sums / columns : 0;
}

cudaError_t attention_backward_cuda(const AttentionParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  if (p.heads == 0) {  // without queries, keys have gradients nonetheless
    const size_t bytes = size_t(2 * p.tokens * p.kv_heads * p.head_dim);
    const cudaError_t error = cudaMemsetAsync(p.grad_k, 0, bytes, stream);
    return error != cudaSuccess ? error : cudaMemsetAsync(p.grad_v, 0, bytes, stream);
  }
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return dispatch(p, device, [&](auto type, auto dim, auto padded, auto group, auto forest) {
    return launch_backward<decltype(type), dim, padded, group, forest>(p, attention_tiles(p.tokens, p.axis.documents), device,
                                                                       stream);
  });
}

}  // namespace packops

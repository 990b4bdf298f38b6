// Cross entropy on CUDA, before a logit is read: each row's target and scale, and an order of the rows in which counted rows come
// first.
#pragma once

#include "ce_loss_maths.cuh"
#include "common/launch.cuh"

namespace packops {
namespace {

struct RowEntry {
  int32_t row, target;
};

// The pieces of CeLossParams::workspace; `size` is in floats.
struct Workspace {
  RowEntry* order;          // (rows) counted rows ascending, then the others descending; each with its target's column
  float* weight;            // (rows) a counted row's share of the denominator
  float* document_inverse;  // (documents) the factor that a document contributes to its rows' scales
  int32_t* document_counted;
  float* tile_weight;  // (tiles)
  int32_t *tile_count, *tile_offset;
  float *class_weight_sum, *normalizer;
  int64_t size;

  __host__ __device__ explicit Workspace(const CeLossParams& p) {
    const int64_t tiles = (p.rows + kTile - 1) / kTile;
    auto* at = static_cast<float*>(p.workspace);
    const auto take = [&](int64_t count) {
      float* piece = at;
      at += count;
      return piece;
    };
    order = reinterpret_cast<RowEntry*>(take(2 * p.rows));
    weight = take(p.rows);
    document_inverse = take(p.axis.documents);
    document_counted = reinterpret_cast<int32_t*>(take(p.axis.documents));
    tile_weight = take(tiles);
    tile_count = reinterpret_cast<int32_t*>(take(tiles));
    tile_offset = reinterpret_cast<int32_t*>(take(tiles));
    class_weight_sum = take(1);
    normalizer = take(1);
    size = at - static_cast<float*>(p.workspace);
  }
};

// The first row of document d, clamped to [0, rows]: cu_seqlens may hold anything.
__device__ __forceinline__ int64_t bound(const CeLossParams& p, int64_t d) {
  const int64_t b = p.axis.cu_seqlens ? boundary(p.axis, d) : d * p.doc_length;
  return min(max(b, int64_t(0)), p.rows);
}
// The document of row t, or -1 for padding.
__device__ int64_t document_of(const CeLossParams& p, int64_t t) {
  if (!p.axis.cu_seqlens) return t / p.doc_length;
  int64_t low = 0, high = p.axis.documents + 1;  // the first d with bound(d) > t is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bound(p, middle) > t) high = middle;
    else low = middle + 1;
  }
  return low == 0 || low > p.axis.documents ? -1 : low - 1;
}

__device__ __forceinline__ float class_weight(const CeLossParams& p, int64_t c) {
  return p.class_weight ? static_cast<const float*>(p.class_weight)[c] : 1.f;
}
__device__ __forceinline__ float token_weight(const CeLossParams& p, int64_t t) {
  return p.token_weight ? static_cast<const float*>(p.token_weight)[t] : 1.f;
}
__device__ __forceinline__ float inverse_or_zero(float x) { return x != 0 ? 1 / x : 0.f; }

struct WeightAndCount {
  float weight;
  int32_t count;
};
struct AddWeightAndCount {
  __device__ __forceinline__ WeightAndCount operator()(WeightAndCount a, WeightAndCount b) const {
    return {a.weight + b.weight, a.count + b.count};
  }
};
using Scratch = WeightAndCount[kTile / 32];

// The targets and weights of one tile of rows.
__device__ void prepare_targets(const CeLossParams& p, int64_t tile, Scratch& scratch) {
  const Workspace w(p);
  const int64_t t = tile * kTile + threadIdx.x;
  WeightAndCount mine{0, 0};
  if (t < p.rows) {
    int32_t target = kIgnored;
    const int64_t d = p.axis.cu_seqlens || p.shift ? document_of(p, t) : 0;
    if (d >= 0 && !(p.shift && t + 1 >= bound(p, d + 1)) && token_weight(p, t) != 0) {
      const int64_t label = integer_at(p.labels, p.labels_dtype, t + (p.shift ? 1 : 0));
      if (label != p.ignore_index) target = label >= 0 && label < class_count(p) ? int32_t(label) : kBadLabel;
    }
    p.target[t] = target;
    if (target != kIgnored) mine = {token_weight(p, t) * (target >= 0 ? class_weight(p, column_of(p, target)) : 1.f), 1};
    w.weight[t] = mine.weight;
  }
  mine = block_reduce<kTile>(mine, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch);
  if (threadIdx.x == 0) {
    w.tile_weight[tile] = mine.weight;
    w.tile_count[tile] = mine.count;
  }
}

// Sums over documents, one per group of kGroup threads (a warp or the block).
template <int kGroup>
__device__ void prepare_documents(const CeLossParams& p, int64_t first, int64_t stride, Scratch& scratch) {
  const Workspace w(p);
  const int lane = threadIdx.x % kGroup;
  for (int64_t d = first; d < p.axis.documents; d += stride) {
    WeightAndCount part{0, 0};
    const int64_t end = bound(p, d + 1);
    for (int64_t t = bound(p, d) + lane; t < end; t += kGroup)
      part = AddWeightAndCount{}(part, {w.weight[t], p.target[t] != kIgnored});
    if constexpr (kGroup == 32) {
      part = warp_reduce(part, AddWeightAndCount{});
    } else {
      part = block_reduce<kGroup>(part, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch);
      __syncthreads();
    }
    if (lane == 0) {
      w.document_inverse[d] = p.reduction == Reduction::seq_mean_token_sum ? 1.f : inverse_or_zero(part.weight);
      w.document_counted[d] = part.count > 0;
    }
  }
}

// A denominator that makes no sense must show: nothing else may look at it without waiting for the device.
__device__ float inverse_or_nan(float value) { return value > 0 && value < INFINITY ? 1 / value : NAN; }

__device__ float num_items_of(const CeLossParams& p) {
  if (!p.num_items) return float(p.num_items_value);
  switch (p.num_items_dtype) {
    case DType::f64: return float(*static_cast<const double*>(p.num_items));
    case DType::i32: return float(*static_cast<const int32_t*>(p.num_items));
    case DType::i64: return float(*static_cast<const int64_t*>(p.num_items));
    default: return *static_cast<const float*>(p.num_items);
  }
}

// Totals over tiles and documents, and where each tile's counted rows go in the order. Run by one block.
__device__ void prepare_totals(const CeLossParams& p, Scratch& scratch) {
  const Workspace w(p);
  const int64_t tiles = (p.rows + kTile - 1) / kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WeightAndCount total{0, 0};
  for (int64_t base = 0; base < tiles; base += kTile) {  // a scan of kTile tiles at a time; `total` carries over
    const int64_t tile = base + threadIdx.x;
    WeightAndCount mine{0, 0};
    if (tile < tiles) mine = {w.tile_weight[tile], w.tile_count[tile]};
    int32_t inclusive = mine.count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t below = __shfl_up_sync(kFullWarp, inclusive, offset);
      if (lane >= offset) inclusive += below;
    }
    const WeightAndCount of_warp = warp_reduce(mine, AddWeightAndCount{});
    if (lane == 0) scratch[warp] = of_warp;
    __syncthreads();
    int32_t before = total.count;
    for (int i = 0; i < warp; i++) before += scratch[i].count;
    if (tile < tiles) w.tile_offset[tile] = before + inclusive - mine.count;
    for (int i = 0; i < kTile / 32; i++) total = AddWeightAndCount{}(total, scratch[i]);
    __syncthreads();
  }
  int32_t documents = 0;
  if (per_sequence(p.reduction) || p.counts) {
    WeightAndCount mine{0, 0};
    for (int64_t d = threadIdx.x; d < p.axis.documents; d += kTile) mine.count += w.document_counted[d];
    documents = block_reduce<kTile>(mine, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch).count;
    __syncthreads();
  }
  float class_weight_sum = float(class_count(p));
  if (p.class_weight) {
    WeightAndCount mine{0, 0};
    for (int64_t c = threadIdx.x; c < class_count(p); c += kTile) mine.weight += class_weight(p, c - p.first_class);
    class_weight_sum = block_reduce<kTile>(mine, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch).weight;
  }
  if (threadIdx.x == 0) {
    float normalizer = 1;
    if (p.has_num_items) normalizer = inverse_or_nan(num_items_of(p));
    else if (p.reduction == Reduction::mean) normalizer = inverse_or_zero(total.weight);
    else if (per_sequence(p.reduction)) normalizer = inverse_or_zero(float(documents));
    *w.normalizer = normalizer;
    *w.class_weight_sum = class_weight_sum;
    if (p.counts) {
      p.counts[0] = total.count;
      p.counts[1] = documents;
    }
    if (p.partial) {
      state(p.partial, kPartialStates * p.rows) = float(p.first_class);
      state(p.partial, kPartialStates * p.rows + 1) = float(p.vocab);
    }
  }
}

// The scales of one tile of rows, and their places in the order.
__device__ void prepare_scales(const CeLossParams& p, int64_t tile, Scratch& scratch) {
  const Workspace w(p);
  const int64_t t = tile * kTile + threadIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t target = t < p.rows ? p.target[t] : kIgnored;
  if (t < p.rows) {
    float scale = token_weight(p, t) * *w.normalizer;
    if (per_sequence(p.reduction)) {
      const int64_t d = document_of(p, t);
      scale *= d >= 0 ? w.document_inverse[d] : 0.f;
    }
    state(p.scale, t) = scale;
  }
  // A class of an earlier shard would give a negative column, which means kIgnored or kBadLabel: replaced by one past all
  // columns.
  const int32_t column = target < 0 ? target : column_of(p, target) < 0 ? 0x7fffffff : column_of(p, target);
  const unsigned counted = __ballot_sync(kFullWarp, target != kIgnored);
  if (lane == 0) scratch[warp].count = __popc(counted);
  __syncthreads();
  int32_t before = w.tile_offset[tile] + __popc(counted & ((1u << lane) - 1));
  for (int i = 0; i < warp; i++) before += scratch[i].count;
  if (t < p.rows) w.order[target != kIgnored ? before : p.rows - 1 - (t - before)] = {int32_t(t), column};
  __syncthreads();
}

__host__ __device__ __forceinline__ bool needs_documents(const CeLossParams& p) { return per_sequence(p.reduction) || p.counts; }

// All of it in one launch of one block, or of one cluster (sm_90): four launches would take longer than a small loss.
template <bool kCluster>
__global__ void __launch_bounds__(kTile) prepare_kernel(const __grid_constant__ CeLossParams p) {
  auto& scratch = *dynamic_shared<Scratch>();
  int64_t rank = 0, blocks = 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kCluster) rank = cluster_ctarank(), blocks = cluster_nctarank();
#endif
  const auto everyone = [] {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if constexpr (kCluster) return cluster_sync();
#endif
    __syncthreads();
  };
  griddepcontrol_wait();
  const int64_t tiles = (p.rows + kTile - 1) / kTile;
  for (int64_t tile = rank; tile < tiles; tile += blocks) {
    prepare_targets(p, tile, scratch);
    __syncthreads();
  }
  everyone();
  if constexpr (!kCluster) {
    if (needs_documents(p)) {
      prepare_documents<32>(p, threadIdx.x / 32, kTile / 32, scratch);
      __syncthreads();
    }
  }
  if (rank == 0) prepare_totals(p, scratch);
  everyone();
  for (int64_t tile = rank; tile < tiles; tile += blocks) prepare_scales(p, tile, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_targets_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  griddepcontrol_wait();
  prepare_targets(p, blockIdx.x, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_documents_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  griddepcontrol_wait();
  prepare_documents<kTile>(p, blockIdx.x, gridDim.x, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_totals_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  griddepcontrol_wait();
  prepare_totals(p, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_scales_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  griddepcontrol_wait();
  prepare_scales(p, blockIdx.x, scratch);
}

}  // namespace
}  // namespace packops

// Cross entropy on CUDA: the interface and the formulas of ce_loss.h.
//
// Bytes of device memory per bf16 logit: 2 for the loss, 4 for loss and gradient (read once, written once), 2 per ignored row's
// logit (its gradient's zeros). The bound is memory bandwidth; everything else here exists to keep loads in flight.
//
// 1. prepare: one number per row. Which label it is scored against, what its loss is multiplied by, and an order of the rows in
//    which those that count come first, so that the work can be dealt out evenly however the ignored ones lie.
// 2. rows, one of two kernels:
//    resident (sm_90 and later): persistent clusters of blocks share a row. One warp copies ahead into a ring of shared memory;
//      the others reduce the row as it arrives, exchange partial results over the cluster, and write the gradient from the ring
//      while the next row is already on its way.
//    streaming (every architecture, and rows no cluster can hold): a block per row reads it twice, the second time from the L2
//      where that is large enough.
// 3. reduce: the sum of the rows' shares, in a fixed order.
//
// All reductions are fixed trees: the bits of a row depend on nothing but the row.
#include "ce_loss.h"

#include <atomic>
#include <type_traits>

#include "ce_loss_config.h"
#include "common/async.cuh"
#include "common/numeric.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

// ---------------------------------------------------------------------------------------------------------------- rows

template <typename T>
__device__ __forceinline__ T* row_of(void* base, const RowLayout& l, int64_t t) {
  return static_cast<T*>(base) + (t / l.inner) * l.outer + (t % l.inner) * l.step;
}
template <typename T>
__device__ __forceinline__ const T* row_of(const void* base, const RowLayout& l, int64_t t) {
  return row_of<T>(const_cast<void*>(base), l, t);
}
__device__ __forceinline__ float& state(void* array, int64_t t) { return static_cast<float*>(array)[t]; }

// A row as elements before the first 16-byte boundary, whole vectors, and elements after the last.
template <typename T>
struct Span {
  int head, vectors, tail;
  __device__ __forceinline__ Span(const T* row, int64_t vocab) {
    const int to_boundary = int((16 - (reinterpret_cast<uintptr_t>(row) & 15)) & 15) / int(sizeof(T));
    head = int(min(int64_t(to_boundary), vocab));
    vectors = int((vocab - head) / kVec<T>);
    tail = int(vocab) - head - vectors * kVec<T>;
  }
};

// What a thread, a warp or a cluster knows of a row: all relative to its own maximum.
struct PlainPartial {
  float max = -INFINITY;
  float sum = 0;  // sum_c e^(x'_c - max)
  float pad[2] = {0, 0};
};
struct FullPartial {
  float max = -INFINITY;
  float sum = 0;
  float moment = 0;    // sum_c e^(x'_c - max) (x'_c - max)
  float weighted = 0;  // sum_c w_c (x'_c - max)
  float weight = 0;    // sum_c w_c
  int32_t argmax = 0x7fffffff;
  float pad[2] = {0, 0};
};

// -inf - -inf is NaN: an all -inf part is taken relative to 0, where it adds nothing.
__device__ __forceinline__ float finite_base(float max) { return max == -INFINITY ? 0.f : max; }

struct MergePlain {
  __device__ __forceinline__ PlainPartial operator()(const PlainPartial& a, const PlainPartial& b) const {
    PlainPartial r;
    r.max = fmaxf(a.max, b.max);
    const float base = finite_base(r.max);
    // Rounded products: a fused one would make the sum depend on the order of a and b, and lanes would disagree.
    r.sum = __fadd_rn(__fmul_rn(a.sum, expf(a.max - base)), __fmul_rn(b.sum, expf(b.max - base)));
    return r;
  }
};
struct MergeFull {
  __device__ __forceinline__ FullPartial operator()(const FullPartial& a, const FullPartial& b) const {
    FullPartial r;
    r.max = fmaxf(a.max, b.max);
    const float base = finite_base(r.max);
    const float ea = expf(a.max - base), eb = expf(b.max - base);
    const float da = a.max == -INFINITY ? 0.f : a.max - base, db = b.max == -INFINITY ? 0.f : b.max - base;
    r.sum = __fadd_rn(__fmul_rn(a.sum, ea), __fmul_rn(b.sum, eb));
    r.moment = __fadd_rn(__fmul_rn(ea, __fadd_rn(a.moment, __fmul_rn(da, a.sum))), __fmul_rn(eb, __fadd_rn(b.moment, __fmul_rn(db, b.sum))));
    r.weighted = __fadd_rn(__fadd_rn(a.weighted, __fmul_rn(a.weight, da)), __fadd_rn(b.weighted, __fmul_rn(b.weight, db)));
    r.weight = __fadd_rn(a.weight, b.weight);
    r.argmax = a.max == b.max ? min(a.argmax, b.argmax) : (a.max > b.max ? a.argmax : b.argmax);
    return r;
  }
};

// The maths of a row, plain (p.plain() and no statistics) or with everything.
template <typename T, bool kFull>
struct RowMaths {
  using Partial = std::conditional_t<kFull, FullPartial, PlainPartial>;
  using Merge = std::conditional_t<kFull, MergeFull, MergePlain>;

  const CeLossParams& p;
  float class_weight_sum;  // sum_c w_c; unused when plain

  __device__ __forceinline__ float transform(float x) const {
    if constexpr (!kFull) return x;
    return p.softcap > 0 ? p.softcap * tanhf(x * (p.logit_scale / p.softcap)) : x * p.logit_scale;
  }
  __device__ __forceinline__ float chain(float transformed) const {  // d x' / d x
    if constexpr (!kFull) return 1.f;
    if (!(p.softcap > 0)) return p.logit_scale;
    const float t = transformed / p.softcap;
    return p.logit_scale * (1.f - t * t);
  }
  __device__ __forceinline__ float class_weight(int64_t c) const { return kFull && p.class_weight ? p.class_weight[c] : 1.f; }

  // Adds kCount elements that begin at column c, given raw.
  template <int kCount>
  __device__ __forceinline__ void add(Partial& part, float (&x)[kCount], int64_t c) const {
    float top = part.max;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      x[i] = transform(x[i]);
      top = fmaxf(top, x[i]);
    }
    const float base = finite_base(top), shrink = softmax_exp<T>(part.max - base);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float d = x[i] - base, e = softmax_exp<T>(d);
      sum += e;
      if constexpr (kFull) {
        if (i == 0) {
          const float moved = part.max == -INFINITY ? 0.f : part.max - base;
          part.moment = shrink * (part.moment + moved * part.sum);
          part.weighted += part.weight * moved;
        }
        part.moment += e == 0.f ? 0.f : e * d;
        const float w = class_weight(c + i);
        part.weighted += w * d;
        part.weight += w;
        if (x[i] == top && (top > part.max || int32_t(c + i) < part.argmax)) {  // the first of equals
          part.argmax = int32_t(c + i);
          part.max = top;
        }
      }
    }
    part.sum = part.sum * shrink + sum;
    part.max = top;
  }

  struct Coefficients {
    float alpha, beta, gamma;
  };
  __device__ __forceinline__ Coefficients coefficients(int32_t y, float max, float log_sum) const {
    if constexpr (!kFull) return {1.f, 0.f, 1.f};
    const float eps = p.label_smoothing, beta = eps / float(p.vocab), target_weight = class_weight(y);
    return {(1 - eps) * target_weight + beta * class_weight_sum + 2 * p.z_loss * (max + log_sum), beta, (1 - eps) * target_weight};
  }
  __device__ __forceinline__ float loss(const Partial& row, int32_t y, float target_logit) const {
    const float log_sum = logf(row.sum), gap = log_sum - (transform(target_logit) - row.max);
    if constexpr (!kFull) {
      return gap;
    } else {
      const Coefficients k = coefficients(y, row.max, log_sum);
      float loss = k.gamma * gap;
      if (p.label_smoothing != 0) loss += k.beta * (row.weight * log_sum - row.weighted);
      if (p.z_loss != 0) loss += p.z_loss * (row.max + log_sum) * (row.max + log_sum);
      return loss;
    }
  }
};

// multiplier * d loss / d x for one row, once its maximum and sum are known.
template <typename T, bool kFull>
struct RowGradient {
  const RowMaths<T, kFull>& maths;
  typename RowMaths<T, kFull>::Coefficients k;
  int32_t y;
  float max, multiplier, over_sum, softmax_factor;

  __device__ __forceinline__ RowGradient(const RowMaths<T, kFull>& maths, int32_t y, float max, float sum, float multiplier)
      : maths(maths), k(maths.coefficients(y, max, logf(sum))), y(y), max(max), multiplier(multiplier), over_sum(k.alpha / sum) {
    softmax_factor = multiplier * over_sum;
  }
  // Of a class that is not the target.
  __device__ __forceinline__ float other(float raw, int64_t c) const {
    const float x = maths.transform(raw);
    float g = softmax_exp<T>(x - max) * softmax_factor;
    if constexpr (kFull) {
      if (k.beta != 0) g -= multiplier * k.beta * maths.class_weight(c);
      g *= maths.chain(x);
    }
    return g;
  }
  // Of the target: in one fp32 expression, or a confident row's p - 1 would be the difference of two rounded numbers.
  __device__ __forceinline__ float target(float raw) const {
    const float x = maths.transform(raw);
    return ((over_sum * expf(x - max) - k.beta * maths.class_weight(y)) - k.gamma) * multiplier * maths.chain(x);
  }
  __device__ __forceinline__ float operator()(float raw, int64_t c) const { return c == y ? target(raw) : other(raw, c); }
  // In place on a vector of raw logits that begins at column c.
  __device__ __forceinline__ void vector(float (&x)[kVec<T>], int64_t c) const {
    const uint32_t place = uint32_t(y - int32_t(c));
    const bool has_target = place < uint32_t(kVec<T>);
    float target_gradient = 0;
    if (has_target) {
#pragma unroll
      for (int i = 0; i < kVec<T>; i++)
        if (i == int(place)) target_gradient = target(x[i]);
    }
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) {
      x[i] = other(x[i], c + i);
      if (has_target && i == int(place)) x[i] = target_gradient;
    }
  }
};

// Everything about a row but its gradient. Called by one thread.
template <bool kFull, typename Partial>
__device__ __forceinline__ void write_row_state(const CeLossParams& p, int64_t t, const Partial& row) {
  state(p.row_max, t) = row.max;
  state(p.row_sum, t) = row.sum;
  if constexpr (kFull) {
    if (p.entropy) state(p.entropy, t) = logf(row.sum) - row.moment / row.sum;
    if (p.prediction) p.prediction[t] = row.argmax < p.vocab ? row.argmax : 0;
  }
}
__device__ __forceinline__ void write_row_loss(const CeLossParams& p, int64_t t, float loss) {
  state(p.row_loss, t) = loss;
  if (p.reduction == Reduction::none) state(p.loss, t) = loss * state(p.scale, t);
}
__device__ __forceinline__ void write_ignored_row(const CeLossParams& p, int64_t t, int32_t target) {
  state(p.row_max, t) = 0;
  state(p.row_sum, t) = 1;
  if (p.entropy) state(p.entropy, t) = 0;
  if (p.prediction) p.prediction[t] = -1;
  state(p.row_loss, t) = target == kIgnored ? 0.f : NAN;
  if (p.reduction == Reduction::none) state(p.loss, t) = target == kIgnored ? 0.f : NAN;
}

// Zeros in columns [0, vocab) of a gradient row, by `threads` threads.
template <typename T>
__device__ __forceinline__ void zero_row(T* out, int64_t vocab, int thread, int threads) {
  const Span<T> span(out, vocab);
  for (int i = thread; i < span.head; i += threads) out[i] = from_float<T>(0.f);
  for (int i = thread; i < span.vectors; i += threads) store_streaming(out + span.head + int64_t(i) * kVec<T>, make_uint4(0, 0, 0, 0));
  for (int i = thread; i < span.tail; i += threads) out[vocab - span.tail + i] = from_float<T>(0.f);
}

// ------------------------------------------------------------------------------------------------------------- prepare

constexpr int kTile = 1024;  // rows, and threads, of a block that prepares

struct RowEntry {
  int32_t row, target;
};

// The pieces of CeLossParams::workspace; `size` is in floats.
struct Workspace {
  RowEntry* order;          // (rows) the rows that count in ascending order, then the others in descending order
  float* weight;            // (rows) a counted row's part in the denominator
  float* document_inverse;  // (documents) what a row's scale owes to its document
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
    document_inverse = take(p.documents);
    document_counted = reinterpret_cast<int32_t*>(take(p.documents));
    tile_weight = take(tiles);
    tile_count = reinterpret_cast<int32_t*>(take(tiles));
    tile_offset = reinterpret_cast<int32_t*>(take(tiles));
    class_weight_sum = take(1);
    normalizer = take(1);
    size = at - static_cast<float*>(p.workspace);
  }
};

__device__ __forceinline__ int64_t integer_at(const void* data, DType dtype, int64_t i) {
  return dtype == DType::i32 ? int64_t(static_cast<const int32_t*>(data)[i]) : static_cast<const int64_t*>(data)[i];
}

// Where document d begins, whatever cu_seqlens holds: in [0, rows].
__device__ __forceinline__ int64_t bound(const CeLossParams& p, int64_t d) {
  const int64_t b = p.cu_seqlens ? integer_at(p.cu_seqlens, p.cu_seqlens_dtype, d) : d * p.doc_length;
  return min(max(b, int64_t(0)), p.rows);
}
// The document that holds row t, or -1 for padding. Empty documents hold nothing.
__device__ int64_t document_of(const CeLossParams& p, int64_t t) {
  if (!p.cu_seqlens) return t / p.doc_length;
  int64_t low = 0, high = p.documents + 1;  // the first d with bound(d) > t is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bound(p, middle) > t) high = middle;
    else low = middle + 1;
  }
  return low == 0 || low > p.documents ? -1 : low - 1;
}

__device__ __forceinline__ float token_weight(const CeLossParams& p, int64_t t) { return p.token_weight ? p.token_weight[t] : 1.f; }
__device__ __forceinline__ float inverse_or_zero(float x) { return x != 0 ? 1 / x : 0.f; }

struct WeightAndCount {
  float weight;
  int32_t count;
};
struct AddWeightAndCount {
  __device__ __forceinline__ WeightAndCount operator()(WeightAndCount a, WeightAndCount b) const { return {a.weight + b.weight, a.count + b.count}; }
};
using Scratch = WeightAndCount[kTile / 32];

// Targets and weights of one tile of rows.
__device__ void prepare_targets(const CeLossParams& p, int64_t tile, Scratch& scratch) {
  const Workspace w(p);
  const int64_t t = tile * kTile + threadIdx.x;
  WeightAndCount mine{0, 0};
  if (t < p.rows) {
    int32_t target = kIgnored;
    const int64_t d = p.cu_seqlens || p.shift ? document_of(p, t) : 0;
    if (d >= 0 && !(p.shift && t + 1 >= bound(p, d + 1))) {
      const int64_t label = integer_at(p.labels, p.labels_dtype, t + (p.shift ? 1 : 0));
      if (label != p.ignore_index) target = label >= 0 && label < p.vocab ? int32_t(label) : kBadLabel;
    }
    p.target[t] = target;
    if (target != kIgnored) mine = {token_weight(p, t) * (p.class_weight && target >= 0 ? p.class_weight[target] : 1.f), 1};
    w.weight[t] = mine.weight;
  }
  mine = block_reduce<kTile>(mine, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch);
  if (threadIdx.x == 0) {
    w.tile_weight[tile] = mine.weight;
    w.tile_count[tile] = mine.count;
  }
}

// One document per group of kGroup threads (a warp, or the block).
template <int kGroup>
__device__ void prepare_documents(const CeLossParams& p, int64_t first, int64_t stride, Scratch& scratch) {
  const Workspace w(p);
  const int lane = threadIdx.x % kGroup;
  for (int64_t d = first; d < p.documents; d += stride) {
    WeightAndCount part{0, 0};
    const int64_t end = bound(p, d + 1);
    for (int64_t t = bound(p, d) + lane; t < end; t += kGroup) part = AddWeightAndCount{}(part, {w.weight[t], p.target[t] != kIgnored});
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

__device__ float num_items_of(const CeLossParams& p) {
  if (!p.num_items) return float(p.num_items_value);
  switch (p.num_items_dtype) {
    case DType::f64: return float(*static_cast<const double*>(p.num_items));
    case DType::i32: return float(*static_cast<const int32_t*>(p.num_items));
    case DType::i64: return float(*static_cast<const int64_t*>(p.num_items));
    default: return *static_cast<const float*>(p.num_items);
  }
}

// Totals over the tiles and documents, and where each tile's counted rows go in the order. By one block.
__device__ void prepare_totals(const CeLossParams& p, Scratch& scratch) {
  const Workspace w(p);
  const int64_t tiles = (p.rows + kTile - 1) / kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WeightAndCount total{0, 0};
  for (int64_t base = 0; base < tiles; base += kTile) {  // a scan of kTile tiles at a time, carried on in `total`
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
    for (int64_t d = threadIdx.x; d < p.documents; d += kTile) mine.count += w.document_counted[d];
    documents = block_reduce<kTile>(mine, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch).count;
    __syncthreads();
  }
  float class_weight_sum = float(p.vocab);
  if (p.class_weight) {
    WeightAndCount mine{0, 0};
    for (int64_t c = threadIdx.x; c < p.vocab; c += kTile) mine.weight += p.class_weight[c];
    class_weight_sum = block_reduce<kTile>(mine, WeightAndCount{0, 0}, AddWeightAndCount{}, scratch).weight;
  }
  if (threadIdx.x == 0) {
    float normalizer = 1;
    if (p.has_num_items) normalizer = 1 / num_items_of(p);
    else if (p.reduction == Reduction::mean) normalizer = inverse_or_zero(total.weight);
    else if (per_sequence(p.reduction)) normalizer = inverse_or_zero(float(documents));
    *w.normalizer = normalizer;
    *w.class_weight_sum = class_weight_sum;
    if (p.counts) {
      p.counts[0] = total.count;
      p.counts[1] = documents;
    }
  }
}

// Scales of one tile of rows, and their places in the order.
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
  const unsigned counted = __ballot_sync(kFullWarp, target != kIgnored);
  if (lane == 0) scratch[warp].count = __popc(counted);
  __syncthreads();
  int32_t before = w.tile_offset[tile] + __popc(counted & ((1u << lane) - 1));
  for (int i = 0; i < warp; i++) before += scratch[i].count;
  if (t < p.rows) w.order[target != kIgnored ? before : p.rows - 1 - (t - before)] = {int32_t(t), target};
  __syncthreads();
}

__device__ __forceinline__ bool needs_documents(const CeLossParams& p) { return per_sequence(p.reduction) || p.counts; }

// Few rows: everything in one block, because four launches would cost more than the loss.
__global__ void __launch_bounds__(kTile) prepare_small_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  const int64_t tiles = (p.rows + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tiles; tile++) {
    prepare_targets(p, tile, scratch);
    __syncthreads();
  }
  if (needs_documents(p)) {
    prepare_documents<32>(p, threadIdx.x / 32, kTile / 32, scratch);
    __syncthreads();
  }
  prepare_totals(p, scratch);
  __syncthreads();
  for (int64_t tile = 0; tile < tiles; tile++) prepare_scales(p, tile, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_targets_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  prepare_targets(p, blockIdx.x, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_documents_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  prepare_documents<kTile>(p, blockIdx.x, gridDim.x, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_totals_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  prepare_totals(p, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_scales_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  prepare_scales(p, blockIdx.x, scratch);
}

// ------------------------------------------------------------------------------------------------------------- reduce

__global__ void __launch_bounds__(kTile) reduce_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kTile / 32];
  float sum = 0;
  for (int64_t t = threadIdx.x; t < p.rows; t += kTile) sum += p.target[t] == kIgnored ? 0.f : state(p.scale, t) * state(p.row_loss, t);
  sum = block_reduce<kTile>(sum, 0.f, Add<float>{}, scratch);
  if (threadIdx.x == 0) state(p.loss, 0) = sum;
}

// Statistics: the loss of each document, a block a document.
__global__ void __launch_bounds__(kTile) sequence_loss_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kTile / 32];
  const Workspace w(p);
  for (int64_t d = blockIdx.x; d < p.documents; d += gridDim.x) {
    float sum = 0;
    const int64_t end = bound(p, d + 1);
    for (int64_t t = bound(p, d) + threadIdx.x; t < end; t += kTile)
      sum += p.target[t] == kIgnored ? 0.f : token_weight(p, t) * state(p.row_loss, t);
    sum = block_reduce<kTile>(sum, 0.f, Add<float>{}, scratch);
    if (threadIdx.x == 0) state(p.sequence_loss, d) = sum * w.document_inverse[d];
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------------------- streaming

constexpr int kStreamThreads = 512;
constexpr int kStreamUnroll = 4;  // 16-byte loads in flight per thread

// Calls on_vector(raw vector, column) and on_element(raw, column) for a block's share of a row, loads first.
template <typename T, typename OnVector, typename OnElement>
__device__ __forceinline__ void for_row(const T* row, int64_t vocab, OnVector on_vector, OnElement on_element) {
  const Span<T> span(row, vocab);
  const T* body = row + span.head;
  int i = threadIdx.x;
  for (; i + (kStreamUnroll - 1) * kStreamThreads < span.vectors; i += kStreamUnroll * kStreamThreads) {
    uint4 raw[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; u++) raw[u] = load_cached(body + int64_t(i + u * kStreamThreads) * kVec<T>);
#pragma unroll
    for (int u = 0; u < kStreamUnroll; u++) on_vector(raw[u], span.head + int64_t(i + u * kStreamThreads) * kVec<T>);
  }
  for (; i < span.vectors; i += kStreamThreads) on_vector(load_cached(body + int64_t(i) * kVec<T>), span.head + int64_t(i) * kVec<T>);
  if (int(threadIdx.x) < span.head) on_element(row[threadIdx.x], int64_t(threadIdx.x));
  if (int(threadIdx.x) < span.tail) on_element(row[vocab - span.tail + threadIdx.x], vocab - span.tail + threadIdx.x);
}

// Writes a row's gradient. In place, every element is read before the barrier-free write of the same thread.
template <typename T, bool kFull>
__device__ __forceinline__ void stream_gradient(T* out, const T* row, int64_t vocab, const RowGradient<T, kFull>& gradient) {
  const bool same_alignment = ((reinterpret_cast<uintptr_t>(out) ^ reinterpret_cast<uintptr_t>(row)) & 15) == 0;
  if (same_alignment) {
    for_row<T>(
        row, vocab,
        [&](uint4 raw, int64_t c) {
          float x[kVec<T>];
          unpack<T>(raw, x);
          gradient.vector(x, c);
          store_streaming(out + c, pack<T>(x));
        },
        [&](T raw, int64_t c) { out[c] = from_float<T>(gradient(to_float(raw), c)); });
  } else {
    for (int64_t c = threadIdx.x; c < vocab; c += kStreamThreads) out[c] = from_float<T>(gradient(to_float(row[c]), c));
  }
}

template <typename T, bool kFull>
__global__ void __launch_bounds__(kStreamThreads) stream_forward_kernel(const __grid_constant__ CeLossParams p) {
  using Maths = RowMaths<T, kFull>;
  __shared__ typename Maths::Partial scratch[kStreamThreads / 32];
  const int64_t t = blockIdx.x;
  const int32_t y = p.target[t];
  if (y < 0) {
    if (threadIdx.x == 0) write_ignored_row(p, t, y);
    if (p.grad) zero_row(row_of<T>(p.grad, p.grad_layout, t), p.vocab, threadIdx.x, kStreamThreads);
    return;
  }
  const T* row = row_of<T>(p.logits, p.logits_layout, t);
  const Maths maths{p, kFull ? *Workspace(p).class_weight_sum : 0.f};
  typename Maths::Partial part;
  for_row<T>(
      row, p.vocab,
      [&](uint4 raw, int64_t c) {
        float x[kVec<T>];
        unpack<T>(raw, x);
        maths.add(part, x, c);
      },
      [&](T raw, int64_t c) {
        float x[1] = {to_float(raw)};
        maths.add(part, x, c);
      });
  float target_logit = 0;
  if (threadIdx.x == 0) target_logit = to_float(row[y]);  // before the gradient may overwrite it
  part = block_reduce<kStreamThreads>(part, typename Maths::Partial{}, typename Maths::Merge{}, scratch);
  if (threadIdx.x == 0) {
    write_row_state<kFull>(p, t, part);
    write_row_loss(p, t, maths.loss(part, y, target_logit));
  }
  if (p.grad) {
    const RowGradient<T, kFull> gradient(maths, y, part.max, part.sum, state(p.scale, t));
    stream_gradient<T, kFull>(row_of<T>(p.grad, p.grad_layout, t), row, p.vocab, gradient);
  }
}

template <typename T, bool kFull>
__global__ void __launch_bounds__(kStreamThreads) stream_backward_kernel(const __grid_constant__ CeLossParams p) {
  const int64_t t = blockIdx.x;
  const RowLayout& l = p.grad_output_layout;
  const float incoming = static_cast<const float*>(p.grad_output)[(t / l.inner) * l.outer + (t % l.inner) * l.step];
  if (p.grad_holds_gradient && incoming == 1.f) return;
  T* out = row_of<T>(p.grad, p.grad_layout, t);
  const int32_t y = p.target[t];
  if (y < 0) return zero_row(out, p.vocab, threadIdx.x, kStreamThreads);
  if (!p.logits) {
    for_row<T>(
        out, p.vocab,
        [&](uint4 raw, int64_t c) {
          float x[kVec<T>];
          unpack<T>(raw, x);
#pragma unroll
          for (int i = 0; i < kVec<T>; i++) x[i] *= incoming;
          store_streaming(out + c, pack<T>(x));
        },
        [&](T raw, int64_t c) { out[c] = from_float<T>(to_float(raw) * incoming); });
    return;
  }
  float class_weight_sum = float(p.vocab);
  if constexpr (kFull) {
    if (p.class_weight && p.label_smoothing != 0) {
      __shared__ float scratch[kStreamThreads / 32];
      float sum = 0;
      for (int64_t c = threadIdx.x; c < p.vocab; c += kStreamThreads) sum += p.class_weight[c];
      class_weight_sum = block_reduce<kStreamThreads>(sum, 0.f, Add<float>{}, scratch);
    }
  }
  const RowMaths<T, kFull> maths{p, class_weight_sum};
  const RowGradient<T, kFull> gradient(maths, y, state(p.row_max, t), state(p.row_sum, t), incoming * state(p.scale, t));
  stream_gradient<T, kFull>(out, row_of<T>(p.logits, p.logits_layout, t), p.vocab, gradient);
}

// ------------------------------------------------------------------------------------------------------------ resident

template <typename T, bool kFull, bool kGrad>
__global__ void __launch_bounds__(kResidentThreads + 32, kResidentBlocks) resident_kernel(const __grid_constant__ CeLossParams p, const int stages) {
#if __CUDA_ARCH__ >= 900
  using Maths = RowMaths<T, kFull>;
  using Partial = typename Maths::Partial;
  constexpr int kWarps = kResidentThreads / 32;
  constexpr int kChunkVectors = kChunkBytes / 16;
  static_assert(sizeof(Partial) % 16 == 0);

  extern __shared__ __align__(128) unsigned char shared[];
  const int cluster = int(cluster_size()), rank = int(cluster_rank());
  unsigned char* ring = shared;
  auto* partials = reinterpret_cast<Partial*>(ring + stages * kChunkBytes);  // [2][cluster * kWarps]
  auto* full = reinterpret_cast<MBarrier*>(partials + 2 * cluster * kWarps);
  MBarrier *empty = full + stages, *exchanged = empty + stages;

  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kWarps);
    }
    barrier_init(exchanged, 1);
    barrier_init(exchanged + 1, 1);
    fence_barrier_init();
  }
  cluster_sync();

  const int64_t first = blockIdx.x / cluster, stride = gridDim.x / cluster;
  const RowEntry* order = Workspace(p).order;  // entries are fetched a row ahead, so that nobody waits for them
  // This block's vectors of a row.
  const auto part_of = [&](const Span<T>& span, int& begin, int& count) {
    const int share = (span.vectors + cluster - 1) / cluster;
    begin = min(rank * share, span.vectors);
    count = min(share, span.vectors - begin);
  };

  if (threadIdx.x >= kResidentThreads) {  // the warp that copies
    if (threadIdx.x == kResidentThreads) {
      uint32_t issued = 0;
      RowEntry next = first < p.rows ? order[first] : RowEntry{0, kIgnored};
      for (int64_t i = first; i < p.rows; i += stride) {
        const int64_t t = next.row;
        const int32_t y = next.target;
        if (i + stride < p.rows) next = order[i + stride];
        if (y < 0) continue;
        const T* row = row_of<T>(p.logits, p.logits_layout, t);
        const Span<T> span(row, p.vocab);
        int begin, count;
        part_of(span, begin, count);
        const auto* source = reinterpret_cast<const unsigned char*>(row + span.head) + int64_t(begin) * 16;
        for (int done = 0; done < count; done += kChunkVectors, issued++) {
          const uint32_t stage = issued % stages, bytes = uint32_t(min(kChunkVectors, count - done)) * 16;
          if (issued >= uint32_t(stages)) barrier_wait(empty + stage, (issued / stages - 1) & 1);
          barrier_expect(full + stage, bytes);
          bulk_load(ring + stage * kChunkBytes, source + int64_t(done) * 16, bytes, full + stage);
        }
      }
    }
  } else {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Maths maths{p, kFull ? *Workspace(p).class_weight_sum : 0.f};
    uint32_t taken = 0, exchanges = 0;
    RowEntry next = first < p.rows ? order[first] : RowEntry{0, kIgnored};
    for (int64_t i = first; i < p.rows; i += stride) {
      const int64_t t = next.row;
      const int32_t y = next.target;
      if (i + stride < p.rows) next = order[i + stride];
      if (y < 0) {
        if (rank == 0 && threadIdx.x == 0) write_ignored_row(p, t, y);
        if constexpr (kGrad) zero_row(row_of<T>(p.grad, p.grad_layout, t), p.vocab, rank * kResidentThreads + threadIdx.x, cluster * kResidentThreads);
        continue;
      }
      const T* row = row_of<T>(p.logits, p.logits_layout, t);
      const Span<T> span(row, p.vocab);
      int begin, count;
      part_of(span, begin, count);

      // The elements outside the vectors belong to rank 0: one each to the first threads of its first two warps.
      int64_t edge = -1;
      if (rank == 0 && int(threadIdx.x) < span.head) edge = threadIdx.x;
      if (rank == 0 && warp == 1 && lane < span.tail) edge = p.vocab - span.tail + lane;
      const float edge_raw = edge >= 0 ? to_float(row[edge]) : 0.f;

      Partial part;
      float target_logit = 0;
      bool owns_target = edge == y;
      if (owns_target) target_logit = edge_raw;
      uint32_t chunk = taken;
      for (int done = 0; done < count; done += kChunkVectors, chunk++) {
        const uint32_t stage = chunk % stages;
        barrier_wait(full + stage, (chunk / stages) & 1);
        const int here = min(kChunkVectors, count - done);
        for (int v = threadIdx.x; v < here; v += kResidentThreads) {
          float x[kVec<T>];
          unpack<T>(load_cached(ring + stage * kChunkBytes + v * 16), x);
          const int64_t c = span.head + int64_t(begin + done + v) * kVec<T>;
          const uint32_t place = uint32_t(y - int32_t(c));
          if (place < uint32_t(kVec<T>)) {
            owns_target = true;
#pragma unroll
            for (int i = 0; i < kVec<T>; i++)
              if (i == int(place)) target_logit = x[i];
          }
          maths.add(part, x, c);
        }
        if constexpr (!kGrad) {
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + stage);
        }
      }
      if (edge >= 0) {
        float x[1] = {edge_raw};
        maths.add(part, x, edge);
      }

      // Every warp sends its result to every block of the cluster. Two sets of places, used in turn: a block can be at most one
      // row ahead of another, because it needs that one's results.
      part = warp_reduce(part, typename Maths::Merge{});
      const int set = exchanges & 1;
      Partial* places = partials + set * cluster * kWarps;
      if (threadIdx.x == 0) barrier_expect(exchanged + set, cluster * kWarps * sizeof(Partial));
      if (lane < cluster) {
        const auto* words = reinterpret_cast<const uint4*>(&part);
        auto* to = reinterpret_cast<uint4*>(places + rank * kWarps + warp);
#pragma unroll
        for (int i = 0; i < int(sizeof(Partial) / 16); i++) send16(to + i, words[i], exchanged + set, lane);
      }
      barrier_wait_cluster(exchanged + set, (exchanges >> 1) & 1);
      exchanges++;
      part = Partial{};
      for (int i = lane; i < cluster * kWarps; i += 32) part = typename Maths::Merge{}(part, places[i]);
      part = warp_reduce(part, typename Maths::Merge{});

      if (rank == 0 && threadIdx.x == 0) write_row_state<kFull>(p, t, part);
      if (owns_target) write_row_loss(p, t, maths.loss(part, y, target_logit));

      if constexpr (kGrad) {
        const RowGradient<T, kFull> gradient(maths, y, part.max, part.sum, state(p.scale, t));
        T* out = row_of<T>(p.grad, p.grad_layout, t);
        chunk = taken;
        for (int done = 0; done < count; done += kChunkVectors, chunk++) {
          const uint32_t stage = chunk % stages;
          const int here = min(kChunkVectors, count - done);
          for (int v = threadIdx.x; v < here; v += kResidentThreads) {
            float x[kVec<T>];
            unpack<T>(load_cached(ring + stage * kChunkBytes + v * 16), x);
            const int64_t c = span.head + int64_t(begin + done + v) * kVec<T>;
            gradient.vector(x, c);
            store_streaming(out + c, pack<T>(x));
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + stage);
        }
        if (edge >= 0) out[edge] = from_float<T>(gradient(edge_raw, edge));
      }
      taken = chunk;
    }
  }
  cluster_sync();  // no block may leave while another still writes into its shared memory
#endif
}

// ---------------------------------------------------------------------------------------------------------------- host

constexpr int kMaxDevices = 64;

cudaError_t device_limits(DeviceLimits& limits, int& device, int& sms) {
  static std::atomic<int> cache[kMaxDevices][4];
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  auto& c = cache[device % kMaxDevices];
  if (c[0].load(std::memory_order_acquire) == 0) {
    int major, minor, values[3];
    if ((error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&values[0], cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&values[1], cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&values[2], cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
    for (int i = 0; i < 3; i++) c[i + 1].store(values[i], std::memory_order_relaxed);
    c[0].store(major * 10 + minor, std::memory_order_release);
  }
  limits = {c[0].load(std::memory_order_acquire), c[1].load(std::memory_order_relaxed), c[2].load(std::memory_order_relaxed)};
  sms = c[3].load(std::memory_order_relaxed);
  return cudaSuccess;
}

// Whether a gradient row starts at the same place modulo 16 bytes as its row of logits, for every row.
bool same_alignment(const CeLossParams& p, int element_bytes) {
  const auto offset = [&](int64_t a, int64_t b) { return ((a - b) * element_bytes) % 16 == 0; };
  return (reinterpret_cast<uintptr_t>(p.logits) - reinterpret_cast<uintptr_t>(p.grad)) % 16 == 0 && p.logits_layout.inner == p.grad_layout.inner &&
         offset(p.logits_layout.outer, p.grad_layout.outer) && offset(p.logits_layout.step, p.grad_layout.step);
}

template <typename T, bool kFull, bool kGrad>
cudaError_t launch_resident(const CeLossParams& p, const CeLossConfig& config, int device, int sms, cudaStream_t stream) {
  const auto kernel = resident_kernel<T, kFull, kGrad>;
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(kResidentThreads + 32);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(config.cluster), 1, 1};
  launch.attrs = &attribute;
  launch.numAttrs = 1;

  // Persistent blocks must all be on the device at once; asked once per device and cluster size.
  static std::atomic<int> cache[kMaxDevices][kMaxCluster + 1];
  auto& resident_clusters = cache[device % kMaxDevices][config.cluster];
  int clusters = resident_clusters.load(std::memory_order_acquire);
  if (clusters == 0) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
    if (error != cudaSuccess) return error;
    launch.gridDim = dim3(unsigned(sms) * kResidentBlocks / config.cluster * config.cluster);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    resident_clusters.store(clusters, std::memory_order_release);
  }
  launch.gridDim = dim3(unsigned(std::min<int64_t>(clusters, p.rows)) * config.cluster);
  return cudaLaunchKernelEx(&launch, kernel, p, config.stages);
}

template <typename T, bool kFull>
cudaError_t launch_rows(const CeLossParams& p, cudaStream_t stream) {
  DeviceLimits limits;
  int device, sms;
  cudaError_t error = device_limits(limits, device, sms);
  if (error != cudaSuccess) return error;
  const CeLossConfig config = choose_ce_loss_config(p.vocab, sizeof(T), p.grad != nullptr, p.grad == nullptr || same_alignment(p, sizeof(T)),
                                                    sizeof(typename RowMaths<T, kFull>::Partial), limits);
  if (config.resident) return p.grad ? launch_resident<T, kFull, true>(p, config, device, sms, stream) : launch_resident<T, kFull, false>(p, config, device, sms, stream);
  stream_forward_kernel<T, kFull><<<unsigned(p.rows), kStreamThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

bool full_maths(const CeLossParams& p) { return !p.plain() || p.entropy || p.prediction; }

constexpr int64_t kSmallRows = 2 * kTile;

cudaError_t prepare(const CeLossParams& p, cudaStream_t stream) {
  if (p.rows <= kSmallRows) {
    prepare_small_kernel<<<1, kTile, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const unsigned tiles = unsigned((p.rows + kTile - 1) / kTile);
  prepare_targets_kernel<<<tiles, kTile, 0, stream>>>(p);
  if ((per_sequence(p.reduction) || p.counts) && p.documents > 0)
    prepare_documents_kernel<<<unsigned(std::min<int64_t>(p.documents, 65536)), kTile, 0, stream>>>(p);
  prepare_totals_kernel<<<1, kTile, 0, stream>>>(p);
  prepare_scales_kernel<<<tiles, kTile, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int64_t ce_loss_workspace(const CeLossParams& p) { return Workspace(p).size; }

int ce_loss_forward_cuda(const CeLossParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t error = prepare(p, stream);
  if (error != cudaSuccess) return error;
  if (p.rows > 0) {
    dispatch_float<false>(p.logits_dtype, [&](auto type) {
      using T = decltype(type);
      error = full_maths(p) ? launch_rows<T, true>(p, stream) : launch_rows<T, false>(p, stream);
    });
    if (error != cudaSuccess) return error;
  }
  if (p.reduction != Reduction::none) reduce_kernel<<<1, kTile, 0, stream>>>(p);
  if (p.sequence_loss && p.documents > 0) sequence_loss_kernel<<<unsigned(std::min<int64_t>(p.documents, 65536)), kTile, 0, stream>>>(p);
  return cudaGetLastError();
}

int ce_loss_backward_cuda(const CeLossParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0) return cudaSuccess;
  dispatch_float<false>(p.logits_dtype, [&](auto type) {
    using T = decltype(type);
    if (full_maths(p)) stream_backward_kernel<T, true><<<unsigned(p.rows), kStreamThreads, 0, stream>>>(p);
    else stream_backward_kernel<T, false><<<unsigned(p.rows), kStreamThreads, 0, stream>>>(p);
  });
  return cudaGetLastError();
}

}  // namespace packops

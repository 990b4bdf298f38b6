// Cross entropy on CUDA: the interface and the formulas of ce_loss.h.
//
// Bytes of device memory per bf16 logit: 2 for the loss, 4 for loss and gradient (read once, written once), 2 per ignored row's
// logit (its gradient's zeros). The bound is memory bandwidth; everything else here exists to keep loads in flight.
//
// 1. prepare: one number per row. Which label it is scored against, what its loss is multiplied by, and an order of the rows in
//    which those that count come first, so that the work can be dealt out evenly however the ignored ones lie.
// 2. rows, one of three kernels:
//    staged (where two rows fit into a multiprocessor's shared memory): a block per row keeps it there between the pass that reduces
//      it and the pass that writes its gradient; other blocks of the multiprocessor read meanwhile.
//    resident (longer rows, sm_90 and later): persistent clusters of blocks share a row, which waits in a ring of shared memory.
//    streaming (every architecture, and rows no cluster can hold): a block per row reads it twice, the second time from the L2
//      where that is large enough.
// 3. reduce: the sum of the rows' shares, in a fixed order.
// These launches follow each other without a gap where the hardware can: see wait_for_launch_before.
//
// All reductions are fixed trees: the bits of a row depend on nothing but the row.
#include "ce_loss.h"

#include <atomic>
#include <type_traits>

#include "ce_loss_config.h"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

// ---------------------------------------------------------------------------------------------------------------- rows

template <typename T>
__device__ __forceinline__ T* row_of(void* base, const RowLayout& l, int64_t t) {
  if (t < l.inner) return static_cast<T*>(base) + t * l.step;  // nearly always, and a division costs as much as a vector
  return static_cast<T*>(base) + (t / l.inner) * l.outer + (t % l.inner) * l.step;
}
template <typename T>
__device__ __forceinline__ const T* row_of(const void* base, const RowLayout& l, int64_t t) {
  return row_of<T>(const_cast<void*>(base), l, t);
}
__device__ __forceinline__ float& state(void* array, int64_t t) { return static_cast<float*>(array)[t]; }

// The column of a counted row's class; one that does not exist if the class is another shard's.
__device__ __forceinline__ int32_t column_of(const CeLossParams& p, int32_t target) { return int32_t(target - p.first_class); }
__device__ __forceinline__ bool is_here(const CeLossParams& p, int32_t y) { return uint32_t(y) < uint32_t(p.vocab); }

constexpr int kLine = 128;  // of the cache: what begins there is read and written in whole sectors

// A row as elements before the first boundary (16 bytes, or more), whole vectors, and elements after the last.
template <typename T, int kBoundary = 16>
struct Span {
  int head, vectors, tail;
  __device__ __forceinline__ Span(const T* row, int64_t vocab) {
    const int to_boundary = int((kBoundary - (reinterpret_cast<uintptr_t>(row) % kBoundary)) % kBoundary) / int(sizeof(T));
    head = int(min(int64_t(to_boundary), vocab));
    vectors = int((vocab - head) / kVec<T>);
    tail = int(vocab) - head - vectors * kVec<T>;
  }
};

// What of the maths a kernel is compiled for; z-loss, class weights without smoothing, and the token's scale are a matter of a
// row's coefficients and cost nothing.
enum Features : int {
  kPlain = 0,
  kScale = 1,       // logit_scale
  kUniform = 2,     // label smoothing
  kStatistics = 4,  // entropy, argmax
  kSoftcap = 8,     // and logit_scale
  kEverything = 15,
};

// What a thread, a warp or a cluster knows of a row: all relative to its own maximum. Combining two is commutative to the last
// bit (products are rounded before they are added), so that all lanes of a butterfly agree. `target`, the target's x', is
// carried along, not combined.
template <typename T>
struct PlainPartial {
  float max = -INFINITY;
  float sum = 0;       // sum_c e^(x'_c - max)
  float weighted = 0;  // sum_c w_c x'_c
  float target = 0;

  // Of all lanes, for all lanes.
  template <int kFeatures>
  __device__ __forceinline__ void reduce_over_warp() {
    const float top = warp_max(max);
    sum = warp_sum(sum * RowExp<T>::ratio(max, top));
    if constexpr (kFeatures & kUniform) weighted = warp_sum(weighted);
    max = top;
  }
  __device__ __forceinline__ PlainPartial operator+(const PlainPartial& b) const {
    PlainPartial r;
    r.max = fmaxf(max, b.max);
    r.sum = __fadd_rn(__fmul_rn(sum, RowExp<T>::ratio(max, r.max)), __fmul_rn(b.sum, RowExp<T>::ratio(b.max, r.max)));
    r.weighted = weighted + b.weighted;
    return r;
  }
};
template <typename T>
struct StatisticsPartial {
  float max = -INFINITY;
  float sum = 0;
  float weighted = 0;
  float target = 0;
  float moment = 0;  // sum_c e^(x'_c - max) (x'_c - max)
  int32_t argmax = 0x7fffffff;
  float pad[2] = {0, 0};

  template <int kFeatures>
  __device__ __forceinline__ void reduce_over_warp() {
    *this = warp_reduce(*this, Add<StatisticsPartial>{});
  }
  __device__ __forceinline__ StatisticsPartial operator+(const StatisticsPartial& b) const {
    StatisticsPartial r;
    r.max = fmaxf(max, b.max);
    const float ea = RowExp<T>::ratio(max, r.max), eb = RowExp<T>::ratio(b.max, r.max);
    r.sum = __fadd_rn(__fmul_rn(sum, ea), __fmul_rn(b.sum, eb));
    r.moment = __fadd_rn(__fmul_rn(ea, __fadd_rn(moment, __fmul_rn(moved(max, r.max), sum))),
                         __fmul_rn(eb, __fadd_rn(b.moment, __fmul_rn(moved(b.max, r.max), b.sum))));
    r.weighted = weighted + b.weighted;
    r.argmax = max == b.max ? min(argmax, b.argmax) : (max > b.max ? argmax : b.argmax);
    return r;
  }
  // How far terms relative to `from` go down when they become relative to `to`. Nothing is relative to -inf.
  __device__ __forceinline__ static float moved(float from, float to) { return from == -INFINITY ? 0.f : from - to; }
};

// The maths of a row.
//
// Softcapped 16-bit logits without other options (kCapped; dispatch asks is_capped_fast) have a form of their own, whose bound is the
// memory: no x' exceeds the softcap, so that takes the place of the row's maximum, known before the row is read, and of x' only the
// distance from it is ever computed, in units of log 2: 0 at the softcap, in proportion to 1 - tanh.
template <typename T, int kFeatures>
struct RowMaths {
  static constexpr bool kCapped = kFeatures == kSoftcap && sizeof(T) == 2;
  static constexpr bool kHasTransform = (kFeatures & (kScale | kSoftcap)) != 0, kHasUniform = (kFeatures & kUniform) != 0,
                        kHasStatistics = (kFeatures & kStatistics) != 0;
  using Partial = std::conditional_t<kHasStatistics, StatisticsPartial<T>, PlainPartial<T>>;

  const CeLossParams& p;
  float class_weight_sum;  // sum_c w_c; used with kHasUniform
  float twice_into_tanh, inverse_cap;

  // With kCapped four elements share a reciprocal. The product of their denominators must not overflow, so logits are first clamped
  // to this, twice, where tanh has long been 1.
  uint32_t largest;

  __device__ __forceinline__ RowMaths(const CeLossParams& p, float class_weight_sum)
      : p(p), class_weight_sum(class_weight_sum), twice_into_tanh(2 * p.logit_scale / p.softcap), inverse_cap(1 / p.softcap) {
    if constexpr (kCapped) {
      const float x = kLargestExponent / into_exponent();
      largest = pack2(x, x, T{});
    }
  }

  __device__ __forceinline__ bool has_softcap() const {
    return kFeatures == kEverything ? p.softcap > 0 : (kFeatures & kSoftcap) != 0;
  }
  __device__ __forceinline__ float into_exponent() const { return twice_into_tanh * kLog2E; }
  // r = 1 / (e^2u + 1), of which tanh u = 1 - 2r.
  __device__ __forceinline__ float fall(float x) const { return reciprocal_approx(exp2_approx(x * into_exponent()) + 1.f); }
  // r of half a vector.
  __device__ __forceinline__ void falls(uint32_t first, uint32_t second, float (&r)[4]) const {
    const float2 a = unpack2(min2(first, largest, T{}), T{}), b = unpack2(min2(second, largest, T{}), T{});
    r[0] = exp2_approx(a.x * into_exponent());
    r[1] = exp2_approx(a.y * into_exponent());
    r[2] = exp2_approx(b.x * into_exponent());
    r[3] = exp2_approx(b.y * into_exponent());
    reciprocals_of_successors(r);
  }
  __device__ __forceinline__ float below_cap() const { return -2 * kLog2E * p.softcap; }  // of which x' is r below the softcap
  // x'. Of 16-bit logits within 2^-22 softcap, a tenth of what their rounding is worth near 0. With kCapped, (x' - softcap) log2(e).
  __device__ __forceinline__ float transform(float x) const {
    if constexpr (!kHasTransform) return x;
    if (!has_softcap()) return x * p.logit_scale;
    if constexpr (kCapped) return below_cap() * fall(x);
    if constexpr (sizeof(T) == 2) return fmaf(-2 * p.softcap, fall(x), p.softcap);
    return p.softcap * tanh_accurate(x * (0.5f * twice_into_tanh));
  }
  // x' itself of what transform returned.
  __device__ __forceinline__ float logit(float transformed) const {
    return kCapped ? fmaf(transformed, kLn2, p.softcap) : transformed;
  }
  // x' of the element at column c, to the last bit as its vector has it however the row is cut into vectors: with the neighbours in
  // its aligned 8 bytes if the row has them all. Every kernel takes the target's x' from here, or a confident row's p - 1 would be the
  // difference of two numbers that were rounded differently.
  __device__ __forceinline__ float transform_at(const T* row, int64_t c) const {
    if constexpr (kCapped) {
      const int which = int(reinterpret_cast<uintptr_t>(row + c) % 8 / sizeof(T));
      if (c >= which && c - which + 4 <= p.vocab) {
        const auto four = *reinterpret_cast<const uint2*>(row + c - which);
        float r[4];
        falls(four.x, four.y, r);
        return below_cap() * (which < 2 ? (which == 0 ? r[0] : r[1]) : (which == 2 ? r[2] : r[3]));
      }
    }
    return transform(to_float(row[c]));
  }
  __device__ __forceinline__ float chain(float transformed) const {  // d x' / d x
    if constexpr (!kHasTransform) return 1.f;
    if (!has_softcap()) return p.logit_scale;
    if constexpr (kCapped) {
      const float r = transformed * (-0.5f * kLn2) * inverse_cap;
      return p.logit_scale * 4 * fmaf(-r, r, r);
    }
    const float t = transformed * inverse_cap;
    return p.logit_scale * (1.f - t * t);
  }
  __device__ __forceinline__ float class_weight(int64_t c) const { return p.class_weight ? p.class_weight[c] : 1.f; }

  // Adds kCount transformed elements that begin at column c.
  template <int kCount>
  __device__ __forceinline__ void add(Partial& part, const float (&x)[kCount], int64_t c) const {
    if constexpr (kCapped) {
      part.max = p.softcap;
#pragma unroll
      for (int i = 0; i < kCount; i++) part.sum += exp2_approx(x[i]);
      return;
    }
    float top = part.max;
#pragma unroll
    for (int i = 0; i < kCount; i++) top = fmaxf(top, x[i]);
    const RowExp<T> exp(top);
    const float shrink = RowExp<T>::ratio(part.max, top);
    if constexpr (kHasStatistics) part.moment = shrink * (part.moment + Partial::moved(part.max, top) * part.sum);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float e = exp(x[i]);
      sum += e;
      if constexpr (kHasUniform) part.weighted += class_weight(c + i) * x[i];
      if constexpr (kHasStatistics) {
        part.moment += e == 0.f ? 0.f : e * (x[i] - top);
        if (x[i] == top && (top > part.max || int32_t(c + i) < part.argmax)) {  // the first of equals
          part.argmax = int32_t(c + i);
          part.max = top;
        }
      }
    }
    part.sum = part.sum * shrink + sum;
    part.max = top;
  }
  // Adds the first `valid` of kCount raw vectors, the first at column c, the next `step` columns on.
  template <int kCount>
  __device__ __forceinline__ void add(Partial& part, const uint4 (&raw)[kCount], int64_t c, int step, int valid = kCount) const {
    if constexpr (kCapped) {
      part.max = p.softcap;
      float sums[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < kCount; k++) {
        if (k >= valid) break;
        float r[2][4];
        falls(raw[k].x, raw[k].y, r[0]);
        falls(raw[k].z, raw[k].w, r[1]);
#pragma unroll
        for (int i = 0; i < kVec<T>; i++) sums[i % 4] += exp2_approx(below_cap() * r[i / 4][i % 4]);
      }
      part.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      return;
    }
    float x[kVec<T>];
    // A rising transform moves the largest logit to the largest; only then is one transform per element enough.
    const bool rising = !kHasTransform || (sizeof(T) == 2 && p.logit_scale > 0);
    if (kHasStatistics || !rising) {
#pragma unroll
      for (int k = 0; k < kCount; k++) {
        if (k >= valid) break;
        unpack<T>(raw[k], x);
#pragma unroll
        for (int i = 0; i < kVec<T>; i++) x[i] = transform(x[i]);
        add(part, x, c + int64_t(k) * step);
      }
      return;
    }
    if (valid <= 0) return;
    float top = max_of<T>(raw[0]);
#pragma unroll
    for (int k = 1; k < kCount; k++)
      if (k < valid) top = fmaxf(top, max_of<T>(raw[k]));
    top = fmaxf(part.max, transform(top));
    const RowExp<T> exp(top);
    float sums[4] = {0, 0, 0, 0}, weighted[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      if (k >= valid) break;
      unpack<T>(raw[k], x);
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) {
        sums[i % 4] += exp(transform(x[i]));
        if constexpr (kHasUniform) weighted[i % 2] += p.class_weight ? p.class_weight[c + int64_t(k) * step + i] * x[i] : x[i];
      }
    }
    part.sum = part.sum * RowExp<T>::ratio(part.max, top) + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if constexpr (kHasUniform) part.weighted += weighted[0] + weighted[1];
    part.max = top;
  }

  struct Coefficients {
    float alpha, beta, gamma;
  };
  __device__ __forceinline__ Coefficients coefficients(int32_t y, float max, float log_sum) const {
    const float eps = kHasUniform ? p.label_smoothing : 0.f, beta = eps / float(class_count(p)),
                gamma = (1 - eps) * class_weight(y);
    float alpha = gamma;
    if constexpr (kHasUniform) alpha += beta * class_weight_sum;
    if (p.z_loss != 0) alpha += 2 * p.z_loss * (max + log_sum);
    return {alpha, beta, gamma};
  }
  __device__ __forceinline__ float loss(const Partial& row, int32_t y) const {
    const float log_sum = logf(row.sum), lse = row.max + log_sum;
    const Coefficients k = coefficients(y, row.max, log_sum);
    // With kCapped both parts of the sum can be large next to it.
    float loss =
        k.gamma * (kCapped ? logf(row.sum / exp2_approx(row.target)) : log_sum + RowExp<T>::below_max(row.target, row.max));
    if constexpr (kHasUniform) loss += k.beta * (class_weight_sum * lse - row.weighted);
    if (p.z_loss != 0) loss += p.z_loss * lse * lse;
    return loss;
  }
};

// multiplier * d loss / d x for one row, once its maximum and sum are known.
template <typename T, int kFeatures>
struct RowGradient {
  using Maths = RowMaths<T, kFeatures>;
  const Maths& maths;
  typename Maths::Coefficients k;
  int32_t y;
  RowExp<T> exp;
  float multiplier, over_sum, softmax_factor;
  // With kCapped: 2^(below_cap r + exponent_offset) is |softmax_factor d u / d x 4| e^(x' - max). Not to be used for the target: the
  // offset's rounding is not in the sum.
  float exponent_offset;
  uint32_t sign;  // of a pair of such gradients

  __device__ __forceinline__ RowGradient(const Maths& maths, int32_t y, float max, float sum, float multiplier)
      : maths(maths), k(maths.coefficients(y, max, logf(sum))), y(y), exp(max), multiplier(multiplier), over_sum(k.alpha / sum) {
    // A forward that made statistics was of the other form, whose sum is relative to the maximum.
    if constexpr (Maths::kCapped) over_sum *= exp2_approx((maths.p.softcap - max) * kLog2E);
    softmax_factor = multiplier * over_sum;
    if constexpr (Maths::kCapped) {
      const float factor = softmax_factor * 4 * maths.p.logit_scale;
      exponent_offset = log2_approx(fabsf(factor));
      sign = factor < 0 ? 0x80008000u : 0;
    }
  }
  // e^(x' - max), given what transform returned.
  __device__ __forceinline__ float term(float transformed) const {
    if constexpr (Maths::kCapped) return exp2_approx(transformed);
    return exp(transformed);
  }
  // Of a class that is not the target.
  __device__ __forceinline__ float other(float raw, int64_t c) const {
    const float x = maths.transform(raw);
    float g = term(x) * softmax_factor;
    if constexpr (Maths::kHasUniform) g -= multiplier * k.beta * maths.class_weight(c);
    if constexpr (Maths::kHasTransform) g *= maths.chain(x);
    return g;
  }
  // Of the target, given its x': in one fp32 expression, or a confident row's p - 1 would be the difference of two rounded numbers.
  __device__ __forceinline__ float target(float x) const {
    const float uniform = Maths::kHasUniform ? k.beta * maths.class_weight(y) : 0.f;
    return ((over_sum * term(x) - uniform) - k.gamma) * multiplier * maths.chain(x);
  }
  // Of a vector of raw logits that begins at column c, as if the target were not among them: its owner writes it afterwards,
  // because choosing an element of a register array by a runtime index would put the array into local memory.
  __device__ __forceinline__ uint4 others(uint4 raw, int64_t c) const {
    if constexpr (Maths::kCapped) {
      const uint2 a = capped_others(raw.x, raw.y), b = capped_others(raw.z, raw.w);
      return {a.x, a.y, b.x, b.y};
    }
    float x[kVec<T>];
    unpack<T>(raw, x);
#pragma unroll
    for (int i = 0; i < kVec<T>; i++) x[i] = other(x[i], c + i);
    return pack<T>(x);
  }
  // Of half a vector whose elements share reciprocals; 1 - tanh^2 = 4 r (1 - r).
  __device__ __forceinline__ uint2 capped_others(uint32_t first, uint32_t second) const {
    float r[4];
    maths.falls(first, second, r);
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = exp2_approx(fmaf(maths.below_cap(), r[i], exponent_offset)) * fmaf(-r[i], r[i], r[i]);
    return {pack2(r[0], r[1], T{}) ^ sign, pack2(r[2], r[3], T{}) ^ sign};
  }
  // Whether a vector that begins at column c holds the target.
  __device__ __forceinline__ bool in_vector(int64_t c) const { return uint32_t(y - int32_t(c)) < uint32_t(kVec<T>); }
};

// Everything about a row but its gradient. Called by one thread.
template <int kFeatures, typename Partial>
__device__ __forceinline__ void write_row_state(const CeLossParams& p, int64_t t, const Partial& row) {
  state(p.row_max, t) = row.max;
  state(p.row_sum, t) = row.sum;
  if constexpr (kFeatures & kStatistics) {
    if (p.entropy) state(p.entropy, t) = logf(row.sum) - row.moment / row.sum;
    if (p.prediction) p.prediction[t] = row.argmax < p.vocab ? row.argmax : 0;
  }
}
__device__ __forceinline__ void write_row_loss(const CeLossParams& p, int64_t t, float loss) {
  state(p.row_loss, t) = loss;
  if (p.reduction == Reduction::none) state(p.loss, t) = loss * state(p.scale, t);
}
// A counted row: all of the above or, of a shard, what the other shards need of it.
template <int kFeatures, typename Maths>
__device__ __forceinline__ void write_row(const CeLossParams& p, const Maths& maths, int64_t t, typename Maths::Partial row,
                                          int32_t y) {
  if (p.partial) {
    state(p.partial, kPartialMax * p.rows + t) = row.max;
    state(p.partial, kPartialSum * p.rows + t) = row.sum;
    state(p.partial, kPartialTarget * p.rows + t) = is_here(p, y) ? maths.logit(row.target) : 0.f;
    state(p.partial, kPartialWeighted * p.rows + t) = row.weighted;
  } else {
    write_row_state<kFeatures>(p, t, row);
    write_row_loss(p, t, maths.loss(row, y));
  }
}
__device__ __forceinline__ void write_ignored_row(const CeLossParams& p, int64_t t, int32_t target) {
  if (p.partial) {
    for (int which = 0; which < kPartialStates; which++) state(p.partial, which * p.rows + t) = 0;
    return;
  }
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
  const Span<T, kLine> span(out, vocab);
  for (int i = thread; i < span.head; i += threads) out[i] = from_float<T>(0.f);
  for (int i = thread; i < span.vectors; i += threads)
    store_streaming(out + span.head + int64_t(i) * kVec<T>, make_uint4(0, 0, 0, 0));
  for (int i = thread; i < span.tail; i += threads) out[vocab - span.tail + i] = from_float<T>(0.f);
}

// ------------------------------------------------------------------------------------------------------------- prepare

struct RowEntry {
  int32_t row, target;
};

// The pieces of CeLossParams::workspace; `size` is in floats.
struct Workspace {
  RowEntry* order;          // (rows) the rows that count in ascending order, then the others in descending order; with columns
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

__device__ __forceinline__ float token_weight(const CeLossParams& p, int64_t t) {
  return p.token_weight ? p.token_weight[t] : 1.f;
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

// Targets and weights of one tile of rows.
__device__ void prepare_targets(const CeLossParams& p, int64_t tile, Scratch& scratch) {
  const Workspace w(p);
  const int64_t t = tile * kTile + threadIdx.x;
  WeightAndCount mine{0, 0};
  if (t < p.rows) {
    int32_t target = kIgnored;
    const int64_t d = p.cu_seqlens || p.shift ? document_of(p, t) : 0;
    if (d >= 0 && !(p.shift && t + 1 >= bound(p, d + 1)) && token_weight(p, t) != 0) {
      const int64_t label = integer_at(p.labels, p.labels_dtype, t + (p.shift ? 1 : 0));
      if (label != p.ignore_index) target = label >= 0 && label < class_count(p) ? int32_t(label) : kBadLabel;
    }
    p.target[t] = target;
    if (target != kIgnored)
      mine = {token_weight(p, t) * (p.class_weight && target >= 0 ? p.class_weight[column_of(p, target)] : 1.f), 1};
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
  float class_weight_sum = float(class_count(p));
  if (p.class_weight) {
    WeightAndCount mine{0, 0};
    for (int64_t c = threadIdx.x; c < class_count(p); c += kTile) mine.weight += p.class_weight[c - p.first_class];
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
  // Columns of shards before this one's become the last of shards after it: the codes below 0 must stay what they are.
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

// Everything in one launch of one block or cluster, because four launches would cost more than a small loss. kCluster: sm_90.
template <bool kCluster>
__global__ void __launch_bounds__(kTile) prepare_kernel(const __grid_constant__ CeLossParams p) {
  auto& scratch = *dynamic_shared<Scratch>();
  int64_t rank = 0, blocks = 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if constexpr (kCluster) rank = cluster_rank(), blocks = cluster_size();
#endif
  const auto everyone = [] {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if constexpr (kCluster) return cluster_sync();
#endif
    __syncthreads();
  };
  wait_for_launch_before();
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
  wait_for_launch_before();
  prepare_targets(p, blockIdx.x, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_documents_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  wait_for_launch_before();
  prepare_documents<kTile>(p, blockIdx.x, gridDim.x, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_totals_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  wait_for_launch_before();
  prepare_totals(p, scratch);
}
__global__ void __launch_bounds__(kTile) prepare_scales_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ Scratch scratch;
  wait_for_launch_before();
  prepare_scales(p, blockIdx.x, scratch);
}

// ------------------------------------------------------------------------------------------------------------- reduce

__global__ void __launch_bounds__(kTile) reduce_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kTile / 32];
  wait_for_launch_before();
  float sum = 0;
  for (int64_t t = threadIdx.x; t < p.rows; t += kTile)
    sum += p.target[t] == kIgnored ? 0.f : state(p.scale, t) * state(p.row_loss, t);
  sum = block_reduce<kTile>(sum, 0.f, Add<float>{}, scratch);
  if (threadIdx.x == 0) state(p.loss, 0) = sum;
}

// Statistics: the loss of each document, a block a document.
__global__ void __launch_bounds__(kTile) sequence_loss_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kTile / 32];
  const Workspace w(p);
  wait_for_launch_before();
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

// -------------------------------------------------------------------------------------------------------------- shards

// sum_c w_c over the classes of all shards, for every thread of the block.
template <int kThreads>
__device__ __forceinline__ float sum_class_weights(const CeLossParams& p, float (&scratch)[kThreads / 32]) {
  if (!p.class_weight) return float(class_count(p));
  float sum = 0;
  for (int64_t c = threadIdx.x; c < class_count(p); c += kThreads) sum += p.class_weight[c - p.first_class];
  return block_reduce<kThreads>(sum, 0.f, Add<float>{}, scratch);
}

constexpr int kCombineThreads = 128;

// Rows' states and losses out of their shards', a thread a row, always in the order of the shards: every process gets the same
// bits.
template <typename T, int kFeatures>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kCombineThreads / 32];
  const RowMaths<T, kFeatures> maths(p, kFeatures & kUniform ? sum_class_weights<kCombineThreads>(p, scratch) : 0.f);
  const int64_t t = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (t >= p.rows) return;
  const int32_t target = p.target[t];
  if (target < 0) return write_ignored_row(p, t, target);
  const auto* shards = static_cast<const float*>(p.partials);
  const int64_t size = partial_size(p);
  PlainPartial<T> row;
  float end = 0;
  bool in_order = true;
  for (int64_t s = 0; s < p.shards; s++) {
    const float* shard = shards + s * size;
    row.max = fmaxf(row.max, shard[kPartialMax * p.rows + t]);
    row.weighted += shard[kPartialWeighted * p.rows + t];
    row.target += shard[kPartialTarget * p.rows + t];  // 0 but in one shard
    in_order = in_order && shard[size - 2] == end;
    end += shard[size - 1];
  }
  for (int64_t s = 0; s < p.shards; s++) {
    const float* shard = shards + s * size;
    row.sum += shard[kPartialSum * p.rows + t] * RowExp<T>::ratio(shard[kPartialMax * p.rows + t], row.max);
  }
  if (!in_order || end != float(class_count(p))) row.sum = NAN;
  write_row<kFeatures>(p, maths, t, row, column_of(p, target));
}

// ------------------------------------------------------------------------------------------------------- parts of rows

// A block's part of a row: whole vectors of the row's body, which begins at a cache line, so that rows of odd vocabularies are
// copied and written in whole sectors too. The elements outside the body belong to rank 0.
template <typename T>
struct RowPart {
  static constexpr int kMostHead = kLine / int(sizeof(T));

  const T* row;
  Span<T, kLine> span;
  int begin, count;  // vectors

  __device__ __forceinline__ RowPart(const CeLossParams& p, int64_t t, int cluster, int rank)
      : row(row_of<T>(p.logits, p.logits_layout, t)), span(row, p.vocab) {
    const int share = (span.vectors + cluster - 1) >> (31 - __clz(cluster));  // clusters are powers of two
    begin = min(rank * share, span.vectors);
    count = min(share, span.vectors - begin);
  }
  __device__ __forceinline__ int64_t column() const { return span.head + int64_t(begin) * kVec<T>; }  // of the first vector
  // The edge element of a thread of rank 0, or -1: one each.
  __device__ __forceinline__ int64_t edge(int64_t vocab, int thread) const {
    if (thread < span.head) return thread;
    if (thread >= kMostHead && thread - kMostHead < span.tail) return vocab - span.tail + thread - kMostHead;
    return -1;
  }
};

// -------------------------------------------------------------------------------------------------------------- staged

// A row in the shared memory of a block, loss and gradient from one read. A thread keeps there what it will work on itself, so that
// it waits for nobody's copies but its own; its registers stay free, and while a block reduces and writes, the other blocks of the
// multiprocessor have theirs in flight.
constexpr int kStagedUnroll = 4;

template <typename T, int kFeatures, int kThreads>
__global__ void __launch_bounds__(kThreads, staged_blocks(kThreads)) staged_kernel(const __grid_constant__ CeLossParams p) {
  using Maths = RowMaths<T, kFeatures>;
  using Partial = typename Maths::Partial;
  constexpr int kWarps = kThreads / 32, kStep = kThreads * kVec<T>;
  static_assert(kThreads >= RowPart<T>::kMostHead + kVec<T>);
  auto* kept = dynamic_shared<uint4>();
  __shared__ Partial of_warps[kWarps];
  wait_for_launch_before();
  const RowEntry entry = Workspace(p).order[blockIdx.x];
  const int64_t t = entry.row;
  const int32_t y = entry.target;
  const int thread = threadIdx.x, lane = thread % 32;
  T* out = row_of<T>(p.grad, p.grad_layout, t);
  if (y < 0) {
    if (thread == 0) write_ignored_row(p, t, y);
    return zero_row(out, p.vocab, thread, kThreads);
  }
  const RowPart<T> all(p, t, 1, 0);
  const int64_t column = all.column();
  for (int v = thread; v < all.count; v += kThreads) copy16_async(kept + v, all.row + column + int64_t(v) * kVec<T>);

  const int64_t edge = all.edge(p.vocab, thread);
  const float edge_raw = edge >= 0 ? to_float(all.row[edge]) : 0.f;
  const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
  const float target = thread == 0 || edge == y ? maths.transform_at(all.row, y) : 0.f;
  const float scale = state(p.scale, t);
  wait_for_copies();

  Partial part;
  uint4 raw[kStagedUnroll];
  int v = thread, valid = 0;
#pragma unroll 1
  for (; v + (kStagedUnroll - 1) * kThreads < all.count; v += kStagedUnroll * kThreads) {
#pragma unroll
    for (int k = 0; k < kStagedUnroll; k++) raw[k] = kept[v + k * kThreads];
    maths.add(part, raw, column + int64_t(v) * kVec<T>, kStep);
  }
#pragma unroll
  for (int k = 0; k < kStagedUnroll - 1; k++)
    if (v + k * kThreads < all.count) raw[k] = kept[v + k * kThreads], valid = k + 1;
  maths.add(part, raw, column + int64_t(v) * kVec<T>, kStep, valid);
  if (edge >= 0) {
    const float x[1] = {edge == y ? target : maths.transform(edge_raw)};
    maths.add(part, x, edge);
  }
  part.template reduce_over_warp<kFeatures>();
  if (lane == 0) of_warps[thread / 32] = part;
  __syncthreads();  // beyond it the gradient may overwrite the row
  part = lane < kWarps ? of_warps[lane] : Partial{};
  part.template reduce_over_warp<kFeatures>();
  if (thread == 0) {
    part.target = target;
    write_row<kFeatures>(p, maths, t, part, y);
  }

  const RowGradient<T, kFeatures> gradient(maths, y, part.max, part.sum, scale);
#pragma unroll 2
  for (v = thread; v < all.count; v += kThreads)
    store_streaming(out + column + int64_t(v) * kVec<T>, gradient.others(kept[v], column + int64_t(v) * kVec<T>));
  if (edge >= 0) out[edge] = from_float<T>(edge == y ? gradient.target(target) : gradient.other(edge_raw, edge));
  const int in_vectors = y - int32_t(column);  // where the target is among them
  if (in_vectors >= 0 && in_vectors < all.count * kVec<T> && in_vectors / kVec<T> % kThreads == thread)
    out[y] = from_float<T>(gradient.target(maths.transform_at(reinterpret_cast<const T*>(kept), in_vectors)));
}

// ----------------------------------------------------------------------------------------------------------- streaming

constexpr int kStreamThreads = 512;
constexpr int kStreamUnroll = 4;    // 16-byte loads in flight per thread
constexpr int kBackwardBlocks = 4;  // per SM

// Calls on_vectors(raw vectors, column of the first, columns to the next) and on_element(raw, column) for a thread's share of a row.
template <typename T, typename OnVectors, typename OnElement>
__device__ __forceinline__ void for_row(const T* row, int64_t vocab, OnVectors on_vectors, OnElement on_element) {
  constexpr int kStep = kStreamThreads * kVec<T>;
  const Span<T> span(row, vocab);
  const T* body = row + span.head;
  int i = threadIdx.x;
  for (; i + (kStreamUnroll - 1) * kStreamThreads < span.vectors; i += kStreamUnroll * kStreamThreads) {
    uint4 raw[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; u++) raw[u] = load_cached(body + int64_t(i + u * kStreamThreads) * kVec<T>);
    on_vectors(raw, span.head + int64_t(i) * kVec<T>, kStep);
  }
  for (; i < span.vectors; i += kStreamThreads) {
    const uint4 raw[1] = {load_cached(body + int64_t(i) * kVec<T>)};
    on_vectors(raw, span.head + int64_t(i) * kVec<T>, kStep);
  }
  if (int(threadIdx.x) < span.head) on_element(row[threadIdx.x], int64_t(threadIdx.x));
  if (int(threadIdx.x) < span.tail) on_element(row[vocab - span.tail + threadIdx.x], vocab - span.tail + threadIdx.x);
}

// Writes a row's gradient, given the target's x'. `out` may be the row: a thread writes only what it has read.
template <typename T, int kFeatures>
__device__ __forceinline__ void stream_gradient(T* out, const T* row, int64_t vocab, const RowGradient<T, kFeatures>& gradient,
                                                float target) {
  const auto of_element = [&](T raw, int64_t c) {
    return from_float<T>(c == gradient.y ? gradient.target(target) : gradient.other(to_float(raw), c));
  };
  const bool same_alignment = ((reinterpret_cast<uintptr_t>(out) ^ reinterpret_cast<uintptr_t>(row)) & 15) == 0;
  if (same_alignment) {
    for_row<T>(
        row, vocab,
        [&](const auto& raw, int64_t c, int step) {
#pragma unroll
          for (int k = 0; k < int(std::extent_v<std::remove_reference_t<decltype(raw)>>); k++, c += step) {
            store_streaming(out + c, gradient.others(raw[k], c));
            if (gradient.in_vector(c)) out[gradient.y] = from_float<T>(gradient.target(target));
          }
        },
        [&](T raw, int64_t c) { out[c] = of_element(raw, c); });
  } else {
    for (int64_t c = threadIdx.x; c < vocab; c += kStreamThreads) out[c] = of_element(row[c], c);
  }
}

template <typename T, int kFeatures>
__global__ void __launch_bounds__(kStreamThreads) stream_forward_kernel(const __grid_constant__ CeLossParams p) {
  using Maths = RowMaths<T, kFeatures>;
  __shared__ typename Maths::Partial scratch[kStreamThreads / 32];
  __shared__ float target;  // its x', known before the gradient may overwrite it
  wait_for_launch_before();
  const int64_t t = blockIdx.x;
  const int32_t target_class = p.target[t], y = column_of(p, target_class);
  if (target_class < 0) {
    if (threadIdx.x == 0) write_ignored_row(p, t, target_class);
    if (p.grad) zero_row(row_of<T>(p.grad, p.grad_layout, t), p.vocab, threadIdx.x, kStreamThreads);
    return;
  }
  const T* row = row_of<T>(p.logits, p.logits_layout, t);
  const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
  typename Maths::Partial part;
  for_row<T>(
      row, p.vocab, [&](const auto& raw, int64_t c, int step) { maths.add(part, raw, c, step); },
      [&](T raw, int64_t c) {
        const float x[1] = {c == y ? maths.transform_at(row, c) : maths.transform(to_float(raw))};
        maths.add(part, x, c);
      });
  if (threadIdx.x == 0) target = is_here(p, y) ? maths.transform_at(row, y) : 0.f;
  part = block_reduce<kStreamThreads>(part, typename Maths::Partial{}, Add<typename Maths::Partial>{}, scratch);
  if (threadIdx.x == 0) {
    part.target = target;
    write_row<kFeatures>(p, maths, t, part, y);
  }
  if (p.grad) {
    const RowGradient<T, kFeatures> gradient(maths, y, part.max, part.sum, state(p.scale, t));
    stream_gradient<T, kFeatures>(row_of<T>(p.grad, p.grad_layout, t), row, p.vocab, gradient, target);
  }
}

// The gradient of one row, by a block. `target` is shared by its threads.
template <typename T, int kFeatures>
__device__ __forceinline__ void backward_row(const CeLossParams& p, int64_t t, float incoming, float class_weight_sum,
                                             float& target) {
  if (p.grad_holds_gradient && incoming == 1.f) return;
  T* out = row_of<T>(p.grad, p.grad_layout, t);
  const int32_t y = column_of(p, p.target[t]);
  if (p.target[t] < 0) return zero_row(out, p.vocab, threadIdx.x, kStreamThreads);
  if (!p.logits) {
    for_row<T>(
        out, p.vocab,
        [&](const auto& raw, int64_t c, int step) {
#pragma unroll
          for (int k = 0; k < int(std::extent_v<std::remove_reference_t<decltype(raw)>>); k++, c += step) {
            float x[kVec<T>];
            unpack<T>(raw[k], x);
#pragma unroll
            for (int i = 0; i < kVec<T>; i++) x[i] *= incoming;
            store_streaming(out + c, pack<T>(x));
          }
        },
        [&](T raw, int64_t c) { out[c] = from_float<T>(to_float(raw) * incoming); });
    return;
  }
  const RowMaths<T, kFeatures> maths(p, class_weight_sum);
  const RowGradient<T, kFeatures> gradient(maths, y, state(p.row_max, t), state(p.row_sum, t), incoming * state(p.scale, t));
  const T* row = row_of<T>(p.logits, p.logits_layout, t);
  __syncthreads();  // the row before is done with `target`
  if (threadIdx.x == 0) target = is_here(p, y) ? maths.transform_at(row, y) : 0.f;
  __syncthreads();
  stream_gradient<T, kFeatures>(out, row, p.vocab, gradient, target);
}

// A few blocks per SM that walk over the rows: when grad_output is 1, as after loss.backward(), there is nothing to do, and a
// block per row would take longer to find that out.
template <typename T, int kFeatures>
__global__ void __launch_bounds__(kStreamThreads) stream_backward_kernel(const __grid_constant__ CeLossParams p) {
  const RowLayout& l = p.grad_output_layout;
  const auto* grad_output = static_cast<const float*>(p.grad_output);
  if (p.grad_holds_gradient && l.outer == 0 && l.step == 0 && *grad_output == 1.f) return;
  __shared__ float scratch[kStreamThreads / 32], target;
  const float class_weight_sum = kFeatures & kUniform ? sum_class_weights<kStreamThreads>(p, scratch) : 0.f;
  for (int64_t t = blockIdx.x; t < p.rows; t += gridDim.x)
    backward_row<T, kFeatures>(p, t, grad_output[(t / l.inner) * l.outer + (t % l.inner) * l.step], class_weight_sum, target);
}

// ------------------------------------------------------------------------------------------------------------ resident

// Three roles, a pipeline: the copier fills the ring, the reducers read each chunk once and send the row's partial result to every
// block of the cluster, the writers collect the results, write the loss and the gradient, and free the chunks. Nobody waits for
// the cluster but the writers, and while they do, the next rows are copied and reduced.
template <bool kGrad, int kFeatures>
struct Roles {
  static constexpr int kReducers = kGrad ? kRoleThreads : kForwardThreads;
  static constexpr int kWriters = kGrad ? kRoleThreads : 32;  // without a gradient, one warp that writes the loss
  static constexpr int kThreads = kReducers + kWriters + 32;
  static constexpr int kBlocks =
      !kGrad && (kFeatures & (kUniform | kStatistics)) ? 2 : resident_blocks(kGrad);  // or registers spill
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A place in a ring of barriers, and the parity of the phase that they are in.
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The rows that a cluster works on, in order; entries are fetched a row ahead, so that nobody waits for them.
struct RowWalk {
  const RowEntry* order;
  int64_t rows, stride, i;
  RowEntry next;

  __device__ __forceinline__ RowWalk(const CeLossParams& p, int cluster)
      : order(Workspace(p).order), rows(p.rows), stride(gridDim.x / cluster), i(blockIdx.x / cluster), next{0, kIgnored} {
    if (i < rows) next = order[i];
  }
  __device__ __forceinline__ bool done() const { return i >= rows; }
  __device__ __forceinline__ RowEntry take() {
    const RowEntry entry = next;
    i += stride;
    if (i < rows) next = order[i];
    return entry;
  }
};
#endif

template <typename T, int kFeatures, bool kGrad>
__global__ void __launch_bounds__(Roles<kGrad, kFeatures>::kThreads, Roles<kGrad, kFeatures>::kBlocks)
    resident_kernel(const __grid_constant__ CeLossParams p, const int stages) {
#if __CUDA_ARCH__ >= 900
  using Maths = RowMaths<T, kFeatures>;
  using Partial = typename Maths::Partial;
  using Role = Roles<kGrad, kFeatures>;
  constexpr int kReducerWarps = Role::kReducers / 32;
  constexpr int kChunkVectors = chunk_bytes(kGrad) / 16;
  static_assert(sizeof(Partial) % 16 == 0 && kReducerWarps <= kMaxWarps && kExchanges % 2 == 0);

  auto* shared = dynamic_shared<unsigned char>();
  const int cluster = int(cluster_size()), rank = int(cluster_rank());
  auto* ring = reinterpret_cast<uint4*>(shared);
  auto* results = reinterpret_cast<Partial*>(shared + stages * chunk_bytes(kGrad));  // [kExchanges][cluster]
  Partial* of_warps = results + kExchanges * cluster;                                // [2][kReducerWarps]
  auto* full = reinterpret_cast<MBarrier*>(of_warps + 2 * kMaxWarps);
  MBarrier *empty = full + stages, *exchanged = empty + stages, *collected = exchanged + kExchanges;
  auto* targets = reinterpret_cast<float*>(collected + kExchanges);  // [2]

  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, (kGrad ? Role::kWriters : Role::kReducers) / 32);
    }
    for (int s = 0; s < kExchanges; s++) {
      barrier_init(exchanged + s, 1);
      barrier_init(collected + s, 1);
    }
    fence_barrier_init();
  }
  cluster_sync();

  wait_for_launch_before();
  RowWalk walk(p, cluster);
  RingPlace place, exchange;
  const int lane = threadIdx.x % 32;

  if (threadIdx.x < Role::kReducers) {
    constexpr int kPerThread = kChunkVectors / Role::kReducers;  // vectors of a whole chunk
    constexpr int kStep = Role::kReducers * kVec<T>;
    static_assert(kChunkVectors % Role::kReducers == 0 && Role::kReducers >= RowPart<T>::kMostHead + kVec<T>);
    const int warp = threadIdx.x / 32;
    int sent = 0;
    const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      if (entry.target < 0) continue;
      const RowPart<T> mine(p, entry.row, cluster, rank);
      const int64_t edge = rank == 0 ? mine.edge(p.vocab, threadIdx.x) : -1;
      const float edge_raw = edge >= 0 ? to_float(mine.row[edge]) : 0.f;
      const int target_element = entry.target - int32_t(mine.column());
      const int target_vector = target_element >= 0 ? target_element / kVec<T> : -1;
      // Two sets of places, used in turn: the barrier of the next row keeps this row's from being overwritten too early.
      const int set = exchange.stage & 1;
      const auto look_for_target = [&](const uint4* vector, int v) {
        if (v == target_vector) targets[set] = maths.transform_at(reinterpret_cast<const T*>(vector), target_element % kVec<T>);
      };
      Partial part;
      for (int done = 0; done < mine.count; done += kChunkVectors) {
        barrier_wait(full + place.stage, place.phase);
        const uint4* chunk = ring + place.stage * kChunkVectors;
        if (mine.count - done >= kChunkVectors) {
          uint4 raw[kPerThread];
#pragma unroll
          for (int k = 0; k < kPerThread; k++) raw[k] = chunk[threadIdx.x + k * Role::kReducers];
#pragma unroll
          for (int k = 0; k < kPerThread; k++)
            look_for_target(chunk + threadIdx.x + k * Role::kReducers, done + threadIdx.x + k * Role::kReducers);
          maths.add(part, raw, mine.column() + int64_t(done + threadIdx.x) * kVec<T>, kStep);
        } else {
          for (int v = threadIdx.x; v < mine.count - done; v += Role::kReducers) {
            const uint4 raw[1] = {chunk[v]};
            look_for_target(chunk + v, done + v);
            maths.add(part, raw, mine.column() + int64_t(done + v) * kVec<T>, kStep);
          }
        }
        if constexpr (!kGrad) {
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + place.stage);
        }
        place.advance(stages);
      }
      if (edge >= 0) {
        const float x[1] = {edge == entry.target ? maths.transform_at(mine.row, edge) : maths.transform(edge_raw)};
        if (edge == entry.target) targets[set] = x[0];
        maths.add(part, x, edge);
      }
      part.template reduce_over_warp<kFeatures>();
      Partial* places = of_warps + set * kReducerWarps;
      if (lane == 0) places[warp] = part;
      named_barrier(1, Role::kReducers);
      if (warp == exchange.stage % kReducerWarps) {  // each row another warp, so that none falls behind
        // With a gradient the ring holds the reducers back; without, they could overtake the writer.
        if (!kGrad && sent >= kExchanges) barrier_wait(collected + exchange.stage, exchange.phase ^ 1);
        part = lane < kReducerWarps ? places[lane] : Partial{};
        part.template reduce_over_warp<kFeatures>();
        const bool in_vectors = target_vector >= 0 && target_vector < mine.count;
        const bool on_edge = rank == 0 && (entry.target < mine.span.head || entry.target >= p.vocab - mine.span.tail);
        part.target = in_vectors || on_edge ? targets[set] : 0.f;
        if (cluster == 1) {  // to oneself an ordinary store suffices, and compute-sanitizer knows no other
          if (lane == 0) {
            results[exchange.stage] = part;
            barrier_arrive(exchanged + exchange.stage);
          }
        } else {
          if (lane == 0) barrier_expect(exchanged + exchange.stage, cluster * sizeof(Partial));
          if (lane < cluster) {
            uint4 words[sizeof(Partial) / 16];
            memcpy(words, &part, sizeof part);
            auto* to = reinterpret_cast<uint4*>(results + exchange.stage * cluster + rank);
#pragma unroll
            for (int i = 0; i < int(sizeof(Partial) / 16); i++) send16(to + i, words[i], exchanged + exchange.stage, lane);
          }
        }
      }
      exchange.advance(kExchanges);
      sent = min(sent + 1, kExchanges);
    }
  } else if (threadIdx.x < Role::kReducers + Role::kWriters) {
    constexpr int kPerThread = kChunkVectors / Role::kWriters;
    const int thread = threadIdx.x - Role::kReducers;
    const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      const int64_t t = entry.row;
      const int32_t y = entry.target;
      if (y < 0) {
        if (rank == 0 && thread == 0) write_ignored_row(p, t, y);
        if constexpr (kGrad)
          zero_row(row_of<T>(p.grad, p.grad_layout, t), p.vocab, rank * Role::kWriters + thread, cluster * Role::kWriters);
        continue;
      }
      const float scale = state(p.scale, t);
      const RowPart<T> mine(p, t, cluster, rank);
      barrier_wait_cluster(exchanged + exchange.stage, exchange.phase);
      const Partial* arrived = results + exchange.stage * cluster;
      Partial part = lane < cluster ? arrived[lane] : Partial{};
      part.template reduce_over_warp<kFeatures>();
      part.target = 0;
      for (int c = 0; c < cluster; c++) part.target += arrived[c].target;  // 0 but in one block
      if (!kGrad && lane == 0) barrier_arrive(collected + exchange.stage);
      exchange.advance(kExchanges);
      if (rank == 0 && thread == 0) write_row<kFeatures>(p, maths, t, part, y);
      if constexpr (kGrad) {
        const RowGradient<T, kFeatures> gradient(maths, y, part.max, part.sum, scale);
        const int64_t column = mine.column();
        T* out = row_of<T>(p.grad, p.grad_layout, t);
        T* out_part = out + column;
        const int target_element = y - int32_t(column);
        const int target_vector = target_element >= 0 ? target_element / kVec<T> : -1;
        const auto write = [&](uint4 raw, int v) {
          store_streaming(out_part + int64_t(v) * kVec<T>, gradient.others(raw, column + int64_t(v) * kVec<T>));
          if (v == target_vector) out[y] = from_float<T>(gradient.target(part.target));
        };
        for (int done = 0; done < mine.count; done += kChunkVectors) {
          const uint4* chunk = ring + place.stage * kChunkVectors;
          if (mine.count - done >= kChunkVectors) {
            uint4 raw[kPerThread];
#pragma unroll
            for (int k = 0; k < kPerThread; k++) raw[k] = chunk[thread + k * Role::kWriters];
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + place.stage);
#pragma unroll
            for (int k = 0; k < kPerThread; k++) write(raw[k], done + thread + k * Role::kWriters);
          } else {
            for (int v = thread; v < mine.count - done; v += Role::kWriters) write(chunk[v], done + v);
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + place.stage);
          }
          place.advance(stages);
        }
        const int64_t edge = rank == 0 ? mine.edge(p.vocab, thread) : -1;
        if (edge >= 0)
          out[edge] = from_float<T>(edge == y ? gradient.target(part.target) : gradient.other(to_float(mine.row[edge]), edge));
      }
    }
  } else if (lane == 0) {
    bool wrapped = false;  // nothing to wait for in the first round
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      if (entry.target < 0) continue;
      const RowPart<T> mine(p, entry.row, cluster, rank);
      const auto* source = reinterpret_cast<const uint4*>(mine.row + mine.span.head) + mine.begin;
      for (int done = 0; done < mine.count; done += kChunkVectors) {
        const uint32_t bytes = uint32_t(min(kChunkVectors, mine.count - done)) * 16;
        if (wrapped) barrier_wait(empty + place.stage, place.phase ^ 1);
        barrier_expect(full + place.stage, bytes);
        bulk_load(ring + place.stage * kChunkVectors, source + done, bytes, full + place.stage);
        place.advance(stages);
        if (place.stage == 0) wrapped = true;
      }
    }
  }
  __syncwarp();
  cluster_sync();  // no block may leave while another still writes into its shared memory
#endif
}

// ---------------------------------------------------------------------------------------------------------------- host

// Whether a gradient row starts at the same place modulo 16 bytes as its row of logits, for every row.
bool same_alignment(const CeLossParams& p, int element_bytes) {
  const auto offset = [&](int64_t a, int64_t b) { return ((a - b) * element_bytes) % 16 == 0; };
  return (reinterpret_cast<uintptr_t>(p.logits) - reinterpret_cast<uintptr_t>(p.grad)) % 16 == 0 &&
         p.logits_layout.inner == p.grad_layout.inner && offset(p.logits_layout.outer, p.grad_layout.outer) &&
         offset(p.logits_layout.step, p.grad_layout.step);
}

template <typename T, int kFeatures, int kThreads>
cudaError_t launch_staged(const CeLossParams& p, const CeLossConfig& config, const Device& device, cudaStream_t stream) {
  const auto kernel = staged_kernel<T, kFeatures, kThreads>;
  static std::atomic<bool> allowed[kMaxDevices];  // to have as much shared memory as there is
  auto& is_allowed = allowed[device.index % kMaxDevices];
  if (!is_allowed.load(std::memory_order_acquire)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_staged_bytes(device));
    if (error != cudaSuccess) return error;
    is_allowed.store(true, std::memory_order_release);
  }
  return launch_with({0, device.overlaps_launches()}, kernel, unsigned(p.rows), kThreads, config.shared_bytes, stream, p);
}

template <typename T, int kFeatures, bool kGrad>
cudaError_t launch_resident(const CeLossParams& p, const CeLossConfig& config, const Device& device, cudaStream_t stream) {
  const auto kernel = resident_kernel<T, kFeatures, kGrad>;
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(Roles<kGrad, kFeatures>::kThreads);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(config.cluster), 1, 1};
  launch.attrs = &attribute;
  launch.numAttrs = 1;

  // Persistent blocks must all be on the device at once; asked once per device and cluster size.
  static std::atomic<int> cache[kMaxDevices][kMaxCluster + 1];
  auto& resident_clusters = cache[device.index % kMaxDevices][config.cluster];
  int clusters = resident_clusters.load(std::memory_order_acquire);
  if (clusters == 0) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    if (error != cudaSuccess) return error;
    launch.gridDim = dim3(unsigned(device.multiprocessors) * resident_blocks(kGrad) / config.cluster * config.cluster);
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    resident_clusters.store(clusters, std::memory_order_release);
  }
  const unsigned blocks = unsigned(std::min<int64_t>(clusters, p.rows)) * config.cluster;
  return launch_with({config.cluster, true}, kernel, blocks, launch.blockDim, config.shared_bytes, stream, p, config.stages);
}

template <typename T, int kFeatures>
cudaError_t launch_rows(const CeLossParams& p, const Device& device, cudaStream_t stream) {
  const CeLossConfig config =
      choose_ce_loss_config(p.vocab, sizeof(T), p.grad != nullptr, p.grad == nullptr || same_alignment(p, sizeof(T)),
                            sizeof(typename RowMaths<T, kFeatures>::Partial), device);
  switch (config.path) {
    case CeLossPath::staged:
      return config.threads == 128 ? launch_staged<T, kFeatures, 128>(p, config, device, stream)
                                   : launch_staged<T, kFeatures, 256>(p, config, device, stream);
    case CeLossPath::resident:
      return p.grad ? launch_resident<T, kFeatures, true>(p, config, device, stream)
                    : launch_resident<T, kFeatures, false>(p, config, device, stream);
    default:
      return launch_with({0, device.overlaps_launches()}, stream_forward_kernel<T, kFeatures>, unsigned(p.rows), kStreamThreads,
                         0, stream, p);
  }
}

// Calls f(type, features) with the element type and the smallest compiled set of features that covers the problem.
template <typename F>
void dispatch(const CeLossParams& p, F&& f) {
  const bool softcap = p.softcap > 0, scale = p.logit_scale != 1, uniform = p.label_smoothing != 0,
             alone = !uniform && !p.entropy && !p.prediction;
  dispatch_float<false>(p.logits_dtype, [&](auto type) {
    if (alone && softcap && (sizeof(type) == 4 || is_capped_fast(p.softcap, p.logit_scale, p.logits_dtype)))
      f(type, std::integral_constant<int, kSoftcap>{});
    else if (alone && scale && !softcap) f(type, std::integral_constant<int, kScale>{});
    else if (p.entropy || p.prediction || softcap || scale) f(type, std::integral_constant<int, kEverything>{});
    else if (uniform) f(type, std::integral_constant<int, kUniform>{});
    else f(type, std::integral_constant<int, kPlain>{});
  });
}

cudaError_t prepare(const CeLossParams& p, const Device& device, cudaStream_t stream) {
  if (const int cluster = prepare_cluster(p.rows, needs_documents(p), device))
    return cluster == 1
               ? launch_with({}, prepare_kernel<false>, 1, kTile, sizeof(Scratch), stream, p)
               : launch_with({cluster, false}, prepare_kernel<true>, unsigned(cluster), kTile, sizeof(Scratch), stream, p);
  const unsigned tiles = unsigned((p.rows + kTile - 1) / kTile);
  const LaunchOptions next{0, device.overlaps_launches()};
  cudaError_t error = launch_with({}, prepare_targets_kernel, tiles, kTile, 0, stream, p);
  if (error == cudaSuccess && needs_documents(p) && p.documents > 0)
    error = launch_with(next, prepare_documents_kernel, unsigned(std::min<int64_t>(p.documents, 65536)), kTile, 0, stream, p);
  if (error == cudaSuccess) error = launch_with(next, prepare_totals_kernel, 1, kTile, 0, stream, p);
  if (error == cudaSuccess) error = launch_with(next, prepare_scales_kernel, tiles, kTile, 0, stream, p);
  return error;
}

}  // namespace

int64_t ce_loss_workspace(const CeLossParams& p) { return Workspace(p).size; }

int ce_loss_prepare_cuda(const CeLossParams& p, void* stream_handle) {
  Device device;
  const cudaError_t error = current_device(device);
  return error == cudaSuccess ? prepare(p, device, static_cast<cudaStream_t>(stream_handle)) : error;
}

int ce_loss_forward_cuda(const CeLossParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if ((error = prepare(p, device, stream)) != cudaSuccess) return error;
  if (p.rows > 0) {
    dispatch(p, [&](auto type, auto features) { error = launch_rows<decltype(type), features()>(p, device, stream); });
    if (error != cudaSuccess) return error;
  }
  if (p.partial) return cudaSuccess;
  const LaunchOptions next{0, device.overlaps_launches()};
  if (p.reduction != Reduction::none && (error = launch_with(next, reduce_kernel, 1, kTile, 0, stream, p)) != cudaSuccess)
    return error;
  if (p.sequence_loss && p.documents > 0)
    error = launch_with(next, sequence_loss_kernel, unsigned(std::min<int64_t>(p.documents, 65536)), kTile, 0, stream, p);
  return error;
}

int ce_loss_combine_cuda(const CeLossParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows > 0) {
    const auto blocks = unsigned((p.rows + kCombineThreads - 1) / kCombineThreads);
    dispatch_float<false>(p.logits_dtype, [&](auto type) {  // softcap and scale are in the partials already
      if (p.label_smoothing != 0) launch(combine_kernel<decltype(type), kUniform>, blocks, kCombineThreads, 0, stream, p);
      else launch(combine_kernel<decltype(type), kPlain>, blocks, kCombineThreads, 0, stream, p);
    });
  }
  if (p.reduction != Reduction::none) launch(reduce_kernel, 1, kTile, 0, stream, p);
  return cudaGetLastError();
}

int ce_loss_backward_cuda(const CeLossParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const auto blocks = unsigned(std::min<int64_t>(p.rows, int64_t(device.multiprocessors) * kBackwardBlocks));
  dispatch(p, [&](auto type, auto features) {
    launch(stream_backward_kernel<decltype(type), features()>, blocks, kStreamThreads, 0, stream, p);
  });
  return cudaGetLastError();
}

}  // namespace packops

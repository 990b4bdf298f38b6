// Cross entropy on CUDA, the maths of a row: partial results and how they combine, the loss, the gradient, and writing them.
#pragma once

#include <type_traits>

#include "ce_loss.h"
#include "ce_loss_launch.h"
#include "common/numeric.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

template <typename T>
__device__ __forceinline__ T* row_of(void* base, const RowLayout& l, int64_t t) {
  if (t < l.inner) return static_cast<T*>(base) + t * l.step;  // the usual case: a division costs as much as loading a vector
  return static_cast<T*>(base) + (t / l.inner) * l.outer + (t % l.inner) * l.step;
}
template <typename T>
__device__ __forceinline__ const T* row_of(const void* base, const RowLayout& l, int64_t t) {
  return row_of<T>(const_cast<void*>(base), l, t);
}
__device__ __forceinline__ float& state(void* array, int64_t t) { return static_cast<float*>(array)[t]; }

// The column of a counted row's class. Outside [0, vocab) if the class belongs to another shard.
__device__ __forceinline__ int32_t column_of(const CeLossParams& p, int32_t target) { return int32_t(target - p.first_class); }
__device__ __forceinline__ bool is_here(const CeLossParams& p, int32_t y) { return uint32_t(y) < uint32_t(p.vocab); }

constexpr int kLine = 128;  // bytes of a cache line; accesses that begin at one touch whole sectors

// Splits a row at the first boundary of kBoundary bytes: single elements before it, whole vectors, single elements after them.
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

// The partial result of a thread, a warp or a block for one row. Sums are relative to its own maximum. Combining two results is
// commutative to the last bit, since products are rounded before they are added: all lanes of a butterfly shuffle agree.
// `target`, the target's x', is only carried along.
template <typename T>
struct PlainPartial {
  float max = -INFINITY;
  float sum = 0;       // sum_c e^(x'_c - max)
  float weighted = 0;  // sum_c w_c x'_c
  float target = 0;

  // Combines all lanes; every lane gets the result.
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
    r.moment = __fadd_rn(moved_moment(ea, r.max), b.moved_moment(eb, r.max));
    r.weighted = weighted + b.weighted;
    r.argmax = max == b.max ? min(argmax, b.argmax) : (max > b.max ? argmax : b.argmax);
    return r;
  }
  // The moment relative to `to` instead of max. `ratio`: of the sums. If it is 0, no term is left, and max - to may be infinite.
  __device__ __forceinline__ float moved_moment(float ratio, float to) const {
    return ratio == 0.f ? 0.f : __fmul_rn(ratio, __fadd_rn(moment, __fmul_rn(max - to, sum)));
  }
};

// The maths of a row.
//
// Softcapped 16-bit logits without other options take a faster form (kCapped; see is_capped_fast), which is memory-bound. No x'
// exceeds the softcap, so the softcap replaces the row's maximum and is known before the row is read. Only the distance of x'
// from the softcap is computed, in units of log 2: 0 at the softcap, proportional to 1 - tanh.
template <typename T, int kFeatures>
struct RowMaths {
  static constexpr bool kCapped = kFeatures == kSoftcap && sizeof(T) == 2;
  static constexpr bool kHasTransform = (kFeatures & (kScale | kSoftcap)) != 0, kHasUniform = (kFeatures & kUniform) != 0,
                        kHasStatistics = (kFeatures & kStatistics) != 0;
  using Partial = std::conditional_t<kHasStatistics, StatisticsPartial<T>, PlainPartial<T>>;

  const CeLossParams& p;
  float class_weight_sum;  // sum_c w_c; used with kHasUniform
  float softcap, logit_scale, twice_into_tanh, inverse_cap;

  // With kCapped four elements share a reciprocal. The product of their denominators must not overflow, so logits are first
  // clamped to a value at which tanh is 1 in fp32. Stored twice, for pairs of 16-bit elements.
  uint32_t largest;

  __device__ __forceinline__ RowMaths(const CeLossParams& p, float class_weight_sum)
      : p(p),
        class_weight_sum(class_weight_sum),
        softcap(float(p.softcap)),
        logit_scale(float(p.logit_scale)),
        twice_into_tanh(2 * logit_scale / softcap),
        inverse_cap(1 / softcap) {
    if constexpr (kCapped) {
      const float x = kLargestExponent / into_exponent();
      largest = pack2(x, x, T{});
    }
  }

  __device__ __forceinline__ bool has_softcap() const {
    return kFeatures == kEverything ? softcap > 0 : (kFeatures & kSoftcap) != 0;
  }
  __device__ __forceinline__ float into_exponent() const { return twice_into_tanh * kLog2E; }
  // r = 1 / (e^2u + 1); tanh u = 1 - 2r.
  __device__ __forceinline__ float fall(float x) const { return rcp_approx(ex2_approx(x * into_exponent()) + 1.f); }
  // r of the four elements of half a vector.
  __device__ __forceinline__ void falls(uint32_t first, uint32_t second, float (&r)[4]) const {
    const float2 a = unpack2(min2(first, largest, T{}), T{}), b = unpack2(min2(second, largest, T{}), T{});
    r[0] = ex2_approx(a.x * into_exponent());
    r[1] = ex2_approx(a.y * into_exponent());
    r[2] = ex2_approx(b.x * into_exponent());
    r[3] = ex2_approx(b.y * into_exponent());
    reciprocals_of_successors(r);
  }
  // (x' - softcap) log2(e) = below_cap() r.
  __device__ __forceinline__ float below_cap() const { return -2 * kLog2E * softcap; }
  // x', or (x' - softcap) log2(e) with kCapped. 16-bit logits: absolute error 2^-22 softcap, a tenth of their own rounding near
  // 0.
  __device__ __forceinline__ float transform(float x) const {
    if constexpr (!kHasTransform) return x;
    if (!has_softcap()) return x * logit_scale;
    if constexpr (kCapped) return below_cap() * fall(x);
    if constexpr (sizeof(T) == 2) return fmaf(-2 * softcap, fall(x), softcap);
    return softcap * tanh_accurate(x * (0.5f * twice_into_tanh));
  }
  // x' from the result of transform.
  __device__ __forceinline__ float logit(float transformed) const {
    return kCapped ? fmaf(transformed, kLn2, softcap) : transformed;
  }
  // x' of the element at column c, with the same bits as in the vector passes: computed together with its neighbours in the
  // aligned 8 bytes around it, unless the row ends there. Every kernel takes the target's x' from here. Otherwise p - 1 of a
  // confident row would be the difference of two numbers with different rounding.
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
    if (!has_softcap()) return logit_scale;
    if constexpr (kCapped) {
      const float r = transformed * (-0.5f * kLn2) * inverse_cap;
      return logit_scale * 4 * fmaf(-r, r, r);
    }
    const float t = transformed * inverse_cap;
    return logit_scale * (1.f - t * t);
  }
  __device__ __forceinline__ float class_weight(int64_t c) const {
    return p.class_weight ? static_cast<const float*>(p.class_weight)[c] : 1.f;
  }

  // Adds kCount transformed elements that begin at column c.
  template <int kCount>
  __device__ __forceinline__ void add(Partial& part, const float (&x)[kCount], int64_t c) const {
    if constexpr (kCapped) {
      part.max = softcap;
#pragma unroll
      for (int i = 0; i < kCount; i++) part.sum += ex2_approx(x[i]);
      return;
    }
    float top = part.max;
#pragma unroll
    for (int i = 0; i < kCount; i++) top = fmaxf(top, x[i]);
    const RowExp<T> exp(top);
    const float shrink = RowExp<T>::ratio(part.max, top);
    if constexpr (kHasStatistics) part.moment = part.moved_moment(shrink, top);
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
      part.max = softcap;
      float sums[4] = {0, 0, 0, 0};
#pragma unroll
      for (int k = 0; k < kCount; k++) {
        if (k >= valid) break;
        float r[2][4];
        falls(raw[k].x, raw[k].y, r[0]);
        falls(raw[k].z, raw[k].w, r[1]);
#pragma unroll
        for (int i = 0; i < kVec<T>; i++) sums[i % 4] += ex2_approx(below_cap() * r[i / 4][i % 4]);
      }
      part.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      return;
    }
    float x[kVec<T>];
    // If the transform is increasing, the largest logit gives the largest x', and one transform per element is enough.
    const bool rising = !kHasTransform || (sizeof(T) == 2 && logit_scale > 0);
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
        if constexpr (kHasUniform) weighted[i % 2] += class_weight(c + int64_t(k) * step + i) * x[i];
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
    const float eps = kHasUniform ? float(p.label_smoothing) : 0.f, beta = eps / float(class_count(p)),
                gamma = (1 - eps) * class_weight(y);
    float alpha = gamma;
    if constexpr (kHasUniform) alpha += beta * class_weight_sum;
    if (p.z_loss != 0) alpha += 2 * float(p.z_loss) * (max + log_sum);
    return {alpha, beta, gamma};
  }
  __device__ __forceinline__ float loss(const Partial& row, int32_t y) const {
    const float log_sum = logf(row.sum), lse = row.max + log_sum;
    const Coefficients k = coefficients(y, row.max, log_sum);
    // With kCapped one logarithm: the difference of two could cancel.
    float loss =
        k.gamma * (kCapped ? logf(row.sum / ex2_approx(row.target)) : log_sum + RowExp<T>::below_max(row.target, row.max));
    // Kernels with statistics have the uniform part without smoothing, too: 0 times a logit of -inf would be NaN.
    if (kHasUniform && k.beta != 0) {
      const float uniform = class_weight_sum * lse - row.weighted;
      loss +=
          k.beta * (uniform == -INFINITY ? INFINITY : uniform);  // a sum of huge logits overflowed: so does the loss, as torch's
    }
    if (p.z_loss != 0) loss += float(p.z_loss) * lse * lse;
    return loss;
  }
  // below_max: the sum has the rounding of its terms' exponents (see RowExp), the moment's differences have none.
  __device__ __forceinline__ float entropy(const StatisticsPartial<T>& row) const {
    return logf(row.sum) + RowExp<T>::below_max(row.max, row.max) - row.moment / row.sum;
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
  // With kCapped: 2^(below_cap r + exponent_offset) = |softmax_factor d u / d x 4| e^(x' - max). Not for the target: the sum does
  // not contain the rounding of the offset.
  float exponent_offset;
  uint32_t sign;  // of a pair of 16-bit gradients

  __device__ __forceinline__ RowGradient(const Maths& maths, int32_t y, float max, float sum, float multiplier)
      : maths(maths), k(maths.coefficients(y, max, logf(sum))), y(y), exp(max), multiplier(multiplier), over_sum(k.alpha / sum) {
    // After a forward with statistics, which takes the general form, the sum is relative to the maximum.
    if constexpr (Maths::kCapped) over_sum *= ex2_approx((maths.softcap - max) * kLog2E);
    softmax_factor = multiplier * over_sum;
    if constexpr (Maths::kCapped) {
      const float factor = softmax_factor * 4 * maths.logit_scale;
      exponent_offset = lg2_approx(fabsf(factor));
      sign = factor < 0 ? 0x80008000u : 0;
    }
  }
  // e^(x' - max) from the result of transform.
  __device__ __forceinline__ float term(float transformed) const {
    if constexpr (Maths::kCapped) return ex2_approx(transformed);
    return exp(transformed);
  }
  // The gradient of a class that is not the target.
  __device__ __forceinline__ float other(float raw, int64_t c) const {
    const float x = maths.transform(raw);
    float g = term(x) * softmax_factor;
    if constexpr (Maths::kHasUniform) g -= multiplier * k.beta * maths.class_weight(c);
    if constexpr (Maths::kHasTransform) g *= maths.chain(x);
    return g;
  }
  // The gradient of the target from its x'. One fp32 expression: p - 1 of a confident row must not be rounded in between.
  __device__ __forceinline__ float target(float x) const {
    const float uniform = Maths::kHasUniform ? k.beta * maths.class_weight(y) : 0.f;
    return ((over_sum * term(x) - uniform) - k.gamma) * multiplier * maths.chain(x);
  }
  // The gradients of a vector of raw logits from column c on, none of them taken for the target. The thread that has the target
  // writes it afterwards: indexing a register array at run time would move the array into local memory.
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
  // The gradients of half a vector, whose elements share a reciprocal; 1 - tanh^2 = 4 r (1 - r).
  __device__ __forceinline__ uint2 capped_others(uint32_t first, uint32_t second) const {
    float r[4];
    maths.falls(first, second, r);
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = ex2_approx(fmaf(maths.below_cap(), r[i], exponent_offset)) * fmaf(-r[i], r[i], r[i]);
    return {pack2(r[0], r[1], T{}) ^ sign, pack2(r[2], r[3], T{}) ^ sign};
  }
  // Whether the vector from column c on holds the target.
  __device__ __forceinline__ bool in_vector(int64_t c) const { return uint32_t(y - int32_t(c)) < uint32_t(kVec<T>); }
};

// Writing a row's results except its gradient. Called by one thread.

__device__ __forceinline__ void write_row_loss(const CeLossParams& p, int64_t t, float loss) {
  state(p.row_loss, t) = loss;
  if (p.reduction == Reduction::none) state(p.loss, t) = loss * state(p.scale, t);
}
// A counted row: its results, or, for a shard of the vocabulary, its partial state.
template <int kFeatures, typename Maths>
__device__ __forceinline__ void write_row(const CeLossParams& p, const Maths& maths, int64_t t, typename Maths::Partial row,
                                          int32_t y) {
  if (p.partial) {
    state(p.partial, kPartialMax * p.rows + t) = row.max;
    state(p.partial, kPartialSum * p.rows + t) = row.sum;
    state(p.partial, kPartialTarget * p.rows + t) = is_here(p, y) ? maths.logit(row.target) : 0.f;
    state(p.partial, kPartialWeighted * p.rows + t) = row.weighted;
  } else {
    state(p.row_max, t) = row.max;
    state(p.row_sum, t) = row.sum;
    if constexpr (kFeatures & kStatistics) {
      if (p.entropy) state(p.entropy, t) = maths.entropy(row);
      if (p.prediction) p.prediction[t] = row.argmax < p.vocab ? row.argmax : 0;
    }
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

// Zeroes columns [0, vocab) of a gradient row with `threads` threads.
template <typename T>
__device__ __forceinline__ void zero_row(T* out, int64_t vocab, int thread, int threads) {
  const Span<T, kLine> span(out, vocab);
  for (int i = thread; i < span.head; i += threads) out[i] = from_float<T>(0.f);
  for (int i = thread; i < span.vectors; i += threads)
    store_streaming(out + span.head + int64_t(i) * kVec<T>, make_uint4(0, 0, 0, 0));
  for (int i = thread; i < span.tail; i += threads) out[vocab - span.tail + i] = from_float<T>(0.f);
}

// A block's share of a row: whole vectors of its body. The body begins at a cache line, so that rows of odd vocabularies are
// copied and written in whole sectors, too. The single elements around it belong to rank 0.
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
  // The column of the single element of a thread of rank 0, or -1. At most one per thread.
  __device__ __forceinline__ int64_t edge(int64_t vocab, int thread) const {
    if (thread < span.head) return thread;
    if (thread >= kMostHead && thread - kMostHead < span.tail) return vocab - span.tail + thread - kMostHead;
    return -1;
  }
};

}  // namespace
}  // namespace packops

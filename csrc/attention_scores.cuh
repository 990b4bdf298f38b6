// Scores of attention on CUDA, in registers as the products leave them (attention_products.cuh): softcap and masks.
#pragma once

#include <cmath>

#include "attention.h"
#include "attention_products.cuh"
#include "attention_tiles.cuh"

namespace packops {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

struct Interval {
  int first, last;
  __device__ __forceinline__ bool holds(int i) const { return i >= first && i <= last; }
};

// Turns products of queries and keys into scores, and knows the mask. Exponentials are to base 2.
struct Scores {
  float scale;          // from a product, or from tanh with a softcap, to an exponent of 2
  float softcap_scale;  // from a product to the argument of tanh
  float product_scale;  // of gradients
  bool capped, causal;
  int window;

  // by_position: queries and keys are named by their positions, not by tokens.
  explicit Scores(const AttentionParams& p, bool by_position = true)
      : scale(float(p.softcap > 0 ? p.softcap : p.scale) * kLog2e),
        softcap_scale(float(p.softcap > 0 ? p.scale / p.softcap : 0)),
        product_scale(float(p.scale)),
        capped(p.softcap > 0),
        causal(p.causal),
        window(by_position || !p.prefixes ? int(p.window) : 0) {}

  // tanh, absolute error 2^-22
  __device__ __forceinline__ float cap(float product) const {
    return 1.f - 2.f * rcp_approx(1.f + ex2_approx(product * (2 * kLog2e * softcap_scale)));
  }
  // Forward: `before` and `now` are the greatest scores of rows without and with those of s. Weights are 2^(x scale - shift), and
  // correction is the factor of what was summed before.
  template <int kBlocks, int kColumns>
  __device__ __forceinline__ void relate(float (&s)[kBlocks][kColumns][4], const float (&before)[kBlocks][2],
                                         const float (&now)[kBlocks][2], float (&shift)[kBlocks][2],
                                         float (&correction)[kBlocks][2]) const {
    bool near = true;
#pragma unroll
    for (int m = 0; m < kBlocks; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Not a fused product: the factor of a row with the same greatest score is exactly 1.
        shift[m][half] = __fmul_rn(now[m][half], scale);
        correction[m][half] = ex2_approx(__fmul_rn(before[m][half], scale) - shift[m][half]);
        near = near && !is_far(shift[m][half]);
      }
    if (near) return;
    // All weights of a row have the rounding of its shift, so it cancels. From 2^31 on it would overflow them. So rows far from 0
    // subtract the greatest score, which is exact, and have no shift. Nor have rows that have seen no key.
    float base[kBlocks][2];
#pragma unroll
    for (int m = 0; m < kBlocks; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        base[m][half] = 0;
        if (!is_far(shift[m][half])) continue;
        const bool seen = now[m][half] != -INFINITY;
        correction[m][half] = seen ? ex2_approx((before[m][half] - now[m][half]) * scale) : 1.f;
        base[m][half] = seen ? now[m][half] : 0.f;
        shift[m][half] = 0;
      }
    for_each(s, [&](float& x, int m, int, int i) { x -= base[m][i / 2]; });
  }
  static __device__ __forceinline__ bool is_far(float exponent) { return !(fabsf(exponent) <= 0x1p12f); }
  // The keys that a query sees, of `keys` in its document; the queries that see a key. [first, last], both inclusive.
  __device__ __forceinline__ Interval keys_of(int query, int keys) const {
    return {window ? query - window + 1 : 0, causal ? min(query, keys - 1) : keys - 1};
  }
  __device__ __forceinline__ Interval queries_of(int key) const {
    return {causal ? key : 0, window ? key + window - 1 : 0x7fffffff};
  }
  // Whether every query of [query, query_end) sees every key of [key, key_end): then no mask is needed.
  __device__ __forceinline__ bool all_see(int query, int query_end, int key, int key_end, int keys) const {
    return key_end <= keys && (!causal || (key_end - 1 <= query && (window == 0 || key > query_end - 1 - window)));
  }
};

// lse of a row whose exponentials, relative to `greatest`, add up to `total`. From 2^16 on fp32 does not hold what the gradients need
// of it, so they shall be NaN.
__device__ __forceinline__ void store_lse(const AttentionParams& p, const Scores& scores, int head, int token, float greatest,
                                          float total) {
  const float lse = fmaf(greatest, scores.scale, lg2_approx(total));
  static_cast<float*>(p.lse)[head * p.tokens + token] = total == 0             ? -INFINITY
                                                        : fabsf(lse) < 0x1p16f ? lse
                                                                               : __int_as_float(0x7fc00000);
}

// Replaces the sums in masked columns by `value`. columns(row) is the Interval that a row of the warp keeps; `first` is the
// column of the first sum.
template <int kBlocks, int kColumns, typename F>
__device__ __forceinline__ void mask(float (&sums)[kBlocks][kColumns][4], int first, int lane, float value, F&& columns) {
  Interval kept[kBlocks][2];
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Interval all = columns(16 * m + 8 * half + lane / 4);
      const int mine = first + 2 * (lane % 4);
      kept[m][half] = {max(all.first, mine) - mine, min(all.last, mine + 8 * kColumns) - mine};
    }
  for_each(sums, [&](float& x, int m, int n, int i) { x = kept[m][i / 2].holds(8 * n + i % 2) ? x : value; });
}

// Sums become `value` where sees(row of the warp, column) is false.
template <int kBlocks, int kColumns, typename F>
__device__ __forceinline__ void mask_each(float (&sums)[kBlocks][kColumns][4], int lane, float value, F&& sees) {
  for_each(sums, [&](float& x, int m, int n, int i) {
    if (!sees(16 * m + 8 * (i / 2) + lane / 4, 8 * n + 2 * (lane % 4) + i % 2)) x = value;
  });
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}
__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}

}  // namespace
}  // namespace packops

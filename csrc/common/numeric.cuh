// The exponential and hyperbolic tangent that kernels use, chosen in one place.
#pragma once

#include "common/dtype.h"
#include "common/ptx.cuh"

namespace packops {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Replaces four e in [0, 2^31) by 1 / (e + 1) with one reciprocal, of their product, which must not overflow. That is 11
// instructions of the FMA pipe; four reciprocals would be four of the special-function unit, which is an eighth as fast, and four
// additions. Relative error 2^-21.4. One NaN makes all four NaN. The last bits depend on all four, so values that must agree have
// to come from the same four.
__device__ __forceinline__ void reciprocals_of_successors(float (&e)[4]) {
  const float b = e[1] + 1.f, d = e[3] + 1.f, ab = fmaf(e[0], b, b), cd = fmaf(e[2], d, d);
  const float over_all = rcp_approx(ab * cd), over_ab = over_all * cd, over_cd = over_all * ab;
  e[1] = fmaf(over_ab, e[0], over_ab);
  e[0] = over_ab * b;
  e[3] = fmaf(over_cd, e[2], over_cd);
  e[2] = over_cd * d;
}

// tanh without branches: 1 - 2 / (e^2x + 1), or an odd polynomial near 0, where the difference would cancel.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float large = 1.f - __fdividef(2.f, ex2_approx(x * (2 * kLog2E)) + 1.f);
  const float z = x * x;
  float p = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float small = fmaf(p * z, x, x);
  // e^2x beyond 2^126 makes the quotient 0 or, in fast division, flushes it to 0: the limit either way.
  return fabsf(x) < 0.625f ? small : large;
}

// Above this the rounding of max log2e, at most 2^-24 of it, no longer fits into an exponent. Neighbouring 16-bit numbers are so
// far apart there that e^(x - max) is 0 or 1.
inline constexpr float kExtreme = 0x1p26f;

// A function object: e^(x - max) for the elements of a row with that maximum. A row of -inf gives zeros.
//
// 16-bit elements: 2^(x log2e - shift), shift = max log2e rounded once; one fused multiply-add and one ex2. The rounding of shift
// scales all terms of a row alike, so it cancels when terms are divided by their sum, provided that all of them, the target's
// included, use the same shift. fp32 elements: a subtraction, exact where it matters, and expf.
template <typename T>
struct RowExp {
  float scale = kLog2E, shift;

  __device__ __forceinline__ explicit RowExp(float max) {
    if constexpr (sizeof(T) == 4) {
      shift = max == -INFINITY ? 0.f : max;
    } else {
      if (fabsf(max) > kExtreme) scale = 1;  // the difference is exact, and any base tells equal from smaller
      shift = max == -INFINITY ? 0.f : __fmul_rn(max, scale);
    }
  }
  __device__ __forceinline__ float operator()(float x) const {
    if constexpr (sizeof(T) == 4) return expf(x - shift);
    return ex2_approx(fmaf(x, scale, -shift));
  }
  // The factor that turns a sum relative to `from` into one relative to `to` >= from.
  __device__ __forceinline__ static float ratio(float from, float to) {
    if constexpr (sizeof(T) == 4) return from == -INFINITY ? 0.f : expf(from - to);
    if (fabsf(to) > kExtreme) return from == to && to != -INFINITY ? 1.f : 0.f;
    return from < -kExtreme ? 0.f : ex2_approx(__fmul_rn(from, kLog2E) - __fmul_rn(to, kLog2E));
  }
  // max - x with the rounding of the terms: log(sum of terms) + below_max(x) = log-sum-exp - x.
  __device__ __forceinline__ static float below_max(float x, float max) {
    if constexpr (sizeof(T) == 4) return max - x;
    return fabsf(max) > kExtreme ? max - x : -kLn2 * fmaf(x, kLog2E, -__fmul_rn(max, kLog2E));
  }
};

}  // namespace packops

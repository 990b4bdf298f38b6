// The exponential and hyperbolic tangent that kernels use, chosen in one place.
#pragma once

#include "common/dtype.h"
#include "common/ptx.cuh"

namespace packops {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// e becomes 1 / (e + 1), four times, e in [0, 2^31): one reciprocal, of the product, which must not overflow, and 11 instructions of
// the FMA pipe where four reciprocals are four of the special-function unit, an eighth as fast, and four additions. Relative error
// 2^-21.4; a NaN makes all four NaN. The last bits depend on all four, so what must agree has to come from the same four.
__device__ __forceinline__ void reciprocals_of_successors(float (&e)[4]) {
  const float b = e[1] + 1.f, d = e[3] + 1.f, ab = fmaf(e[0], b, b), cd = fmaf(e[2], d, d);
  const float over_all = reciprocal_approx(ab * cd), over_ab = over_all * cd, over_cd = over_all * ab;
  e[1] = fmaf(over_ab, e[0], over_ab);
  e[0] = over_ab * b;
  e[3] = fmaf(over_cd, e[2], over_cd);
  e[2] = over_cd * d;
}

// tanh without branches: 1 - 2 / (e^2x + 1), and an odd polynomial near 0, where that would lose digits.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float large = 1.f - __fdividef(2.f, exp2_approx(x * (2 * kLog2E)) + 1.f);
  const float z = x * x;
  float p = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float small = fmaf(p * z, x, x);
  // e^2x beyond 2^126 makes the quotient 0 or, in fast division, flushes it to 0: the limit either way.
  return fabsf(x) < 0.625f ? small : large;
}

// Beyond this, a product with log2(e) may overflow. Neighbouring bf16 numbers lie so far apart there that e^(x - max) is 0 or 1.
inline constexpr float kExtreme = 1e38f;

// e^(x - max) for the elements of a row with that maximum, as a function object. A row of -inf gives zeros.
//
// 16-bit elements: 2^(x log2e - shift) with shift = max log2e rounded once, a fused multiply-add and one ex2. The rounding of
// shift multiplies every term of a row by the same factor, so it cancels wherever terms are divided by their sum, provided that
// all of them, and the target's, go through the same shift. fp32 elements get a subtraction, which is exact where it matters,
// and expf.
template <typename T>
struct RowExp {
  float scale = kLog2E, shift;

  __device__ __forceinline__ explicit RowExp(float max) {
    if constexpr (sizeof(T) == 4) {
      shift = max == -INFINITY ? 0.f : max;
    } else {
      if (fabsf(max) > kExtreme) scale = 0x1p-20f;  // any factor that keeps the product finite tells equal from smaller
      shift = max == -INFINITY ? 0.f : __fmul_rn(max, scale);
    }
  }
  __device__ __forceinline__ float operator()(float x) const {
    if constexpr (sizeof(T) == 4) return expf(x - shift);
    return exp2_approx(fmaf(x, scale, -shift));
  }
  // The factor that turns a sum relative to `from` into one relative to `to` >= from.
  __device__ __forceinline__ static float ratio(float from, float to) {
    if constexpr (sizeof(T) == 4) return from == -INFINITY ? 0.f : expf(from - to);
    if (fabsf(to) > kExtreme) return from == to && to != -INFINITY ? 1.f : 0.f;
    return from < -kExtreme ? 0.f : exp2_approx(__fmul_rn(from, kLog2E) - __fmul_rn(to, kLog2E));
  }
  // max - x, consistent with the terms: log(sum of terms) + below_max(x) is log-sum-exp - x.
  __device__ __forceinline__ static float below_max(float x, float max) {
    if constexpr (sizeof(T) == 4) return max - x;
    return fabsf(max) > kExtreme ? max - x : -kLn2 * fmaf(x, kLog2E, -__fmul_rn(max, kLog2E));
  }
};

}  // namespace packops

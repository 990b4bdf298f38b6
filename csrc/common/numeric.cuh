// The exponential and hyperbolic tangent that kernels use, chosen in one place.
#pragma once

#include "common/dtype.h"

namespace packops {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {  // relative error 2^-22; flushes subnormals; 0 at -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^d for d <= 0. 16-bit inputs and outputs hide the last bits, so one multiplication and the hardware's ex2 do; fp32 gets expf.
template <typename T>
__device__ __forceinline__ float softmax_exp(float d) {
  if constexpr (sizeof(T) == 4) return expf(d);
  return exp2_approx(d * kLog2E);
}

}  // namespace packops

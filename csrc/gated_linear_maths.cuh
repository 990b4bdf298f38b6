// One element of the gate of a gated MLP; formulas in gated_linear.h. For gated_linear.cu and gated_mlp.cu.
//
// 16-bit types take e^x and 1/x from the special-function unit, relative error below 1e-5; fp32 uses expf and a division. Both
// are used on a safe range only: e^x for x <= 0, 1/x for 1 <= x <= 2.
#pragma once

#include "common/ptx.cuh"
#include "gated_linear.h"

namespace packops {
namespace {

struct Gate {
  float share, slope;  // f(g) = g share, f'(g) = share + g slope
};

template <typename T, Activation A>
__device__ __forceinline__ Gate gate_of(float g) {
  if constexpr (A == Activation::gelu) {
    return {0.5f * erfcf(-0.7071067811865476f * g), 0.3989422804014327f * expf(-0.5f * g * g)};
  } else {
    float x = g, derivative = 1;
    if constexpr (A == Activation::gelu_tanh) {
      const float square = fminf(g * g, kGeluSquareLimit);  // NaN stays in g
      x = kGeluSlope * g * fmaf(kGeluCubic, square, 1.f);
      derivative = kGeluSlope * fmaf(3 * kGeluCubic, square, 1.f);
    }
    float a, larger;
    if constexpr (sizeof(T) == 2) {
      a = ex2_approx(-1.4426950408889634f * fabsf(x));
      larger = rcp_approx(1.f + a);
    } else {
      a = expf(-fabsf(x));
      larger = 1.f / (1.f + a);
    }
    const float smaller = a * larger;
    return {g < 0 ? smaller : larger, larger * smaller * derivative};
  }
}

struct Results {
  float product, grad_gate, grad_up;
};

template <typename T, Activation A>
__device__ __forceinline__ Results results_of(float grad, float gate, float up) {
  const Gate at = gate_of<T, A>(gate);
  const float value = gate * at.share;
  return {value * up, grad * (up * fmaf(gate, at.slope, at.share)), grad * value};
}

}  // namespace
}  // namespace packops

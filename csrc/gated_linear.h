// The gate of a gated MLP (SwiGLU, GeGLU): the plain interface of gated_linear.cu and gated_linear_cpu.cpp.
//
//   product = f(gate) up,    f(g) = g share(g),    f'(g) = share(g) + g slope(g)
//   grad_gate = grad up f'(gate),    grad_up = grad f(gate)
//
//   silu        share = s(g)      slope = s(g) s(-g)                            s(x) = 1 / (1 + e^-x)
//   gelu_tanh   share = s(u)      slope = s(u) s(-u) u'     u = 2 √(2/π) (g + 0.044715 g³): (1 + tanh(u/2)) / 2 is s(u)
//   gelu        share = Φ(g)      slope = e^(-g²/2) / √(2π)
//
// Of both s(x) and s(-x) the larger is 1 / (1 + a) and the smaller a / (1 + a), with a = e^-|x| <= 1: nothing overflows, and
// nothing is subtracted. Where g is finite so are share and slope, and where f(g) or f'(g) has a limit, huge numbers have it. At
// infinities and NaN the results are torch's.
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/dtype.h"

namespace packops {

enum class Activation : int32_t { silu, gelu_tanh, gelu };

inline constexpr float kGeluCubic = 0.044715f, kGeluSlope = 1.5957691216057308f;  // 2 √(2/π)
// u is far past the point where s(u) is 0 or 1 in any format, and the square of a huge g must not become infinite.
inline constexpr float kGeluSquareLimit = 1024;

// Inputs have strides between rows, in elements; the elements of a row are contiguous. Outputs are contiguous.
struct GatedParams {
  const void *gate = nullptr, *up = nullptr, *grad = nullptr;  // grad null: forward
  int64_t gate_row = 0, up_row = 0, grad_row = 0;
  void *product = nullptr, *grad_gate = nullptr, *grad_up = nullptr;  // null: not wanted
  int64_t rows = 0, columns = 0;
  DType dtype = DType::f32;
  Activation activation = Activation::silu;
};

// As one row, where all rows follow each other.
inline GatedParams gated_as_one_row(GatedParams p) {
  if (p.gate_row == p.columns && p.up_row == p.columns && (!p.grad || p.grad_row == p.columns)) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  return p;
}

// Elements [begin, end) of rows * columns.
void gated_cpu(const GatedParams& params, int64_t begin, int64_t end);

#ifdef PACKOPS_WITH_CUDA
cudaError_t gated_cuda(const GatedParams& params, cudaStream_t stream);
#endif

}  // namespace packops

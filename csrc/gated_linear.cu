// The gate of a gated MLP on CUDA; formulas in gated_linear.h.
//
//   forward    product = f(gate) up                                                      reads 2 matrices, writes 1
//   backward   product again, grad_gate = grad up f'(gate), grad_up = grad f(gate)       reads 3, writes 3 (2 without product)
//
// Bound: memory. Elementwise, without sums, so an element's bits do not depend on its place.
// Layout: see common/row_blocks.h. A thread issues all its loads before it uses the first. The end of a row, and rows that are
// not 16-byte aligned, are processed one element at a time with the same arithmetic: fused products are explicit, so the bits
// agree.
#include "gated_linear.h"

#include "common/launch.cuh"
#include "common/row_blocks.cuh"
#include "common/vec.cuh"
#include "gated_linear_launch.h"
#include "gated_linear_maths.cuh"

namespace packops {
namespace {

template <typename T, Activation A, bool kBackward>
__global__ void __launch_bounds__(kGatedThreads, 4)  // without the 4, ptxas saves registers and serialises the loads
    gated_kernel(const __grid_constant__ GatedParams p, const __grid_constant__ GatedLaunch launch) {
  constexpr int W = kVec<T>, kUnroll = gated_unroll(kBackward);
  const RowPlace at(launch, kUnroll, W);
  if (at.row >= p.rows) return;
  const int64_t row = at.row, first = at.column, step = at.step, count = p.columns - first, out = row * p.columns + first;
  const T* gate = static_cast<const T*>(p.gate) + row * p.gate_row + first;
  const T* up = static_cast<const T*>(p.up) + row * p.up_row + first;
  const T* grad = static_cast<const T*>(p.grad) + row * p.grad_row + first;
  T *product = static_cast<T*>(p.product) + out, *grad_gate = static_cast<T*>(p.grad_gate) + out,
    *grad_up = static_cast<T*>(p.grad_up) + out;

  if (launch.aligned && (kUnroll - 1) * step + W <= count) {
    uint4 gates[kUnroll], ups[kUnroll], grads[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      gates[u] = load_streaming(gate + u * step);
      ups[u] = load_streaming(up + u * step);
      if constexpr (kBackward) grads[u] = load_streaming(grad + u * step);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      float g[W], x[W], d[W] = {};
      unpack<T>(gates[u], g);
      unpack<T>(ups[u], x);
      if constexpr (kBackward) unpack<T>(grads[u], d);
#pragma unroll
      for (int i = 0; i < W; i++) {
        const Results y = results_of<T, A>(d[i], g[i], x[i]);
        x[i] = y.product;
        g[i] = y.grad_gate;
        d[i] = y.grad_up;
      }
      if (!kBackward || p.product) store_streaming(product + u * step, pack<T>(x));
      if (kBackward && p.grad_gate) store_streaming(grad_gate + u * step, pack<T>(g));
      if (kBackward && p.grad_up) store_streaming(grad_up + u * step, pack<T>(d));
    }
    return;
  }
#pragma unroll 1
  for (int u = 0; u < kUnroll; u++)
#pragma unroll 1
    for (int64_t i = u * step, end = i + W < count ? i + W : count; i < end; i++) {
      const Results y = results_of<T, A>(kBackward ? to_float(grad[i]) : 0.f, to_float(gate[i]), to_float(up[i]));
      if (!kBackward || p.product) product[i] = from_float<T>(y.product);
      if (kBackward && p.grad_gate) grad_gate[i] = from_float<T>(y.grad_gate);
      if (kBackward && p.grad_up) grad_up[i] = from_float<T>(y.grad_up);
    }
}

template <typename T, Activation A>
void launch_gated(const GatedParams& p, cudaStream_t stream) {
  const GatedLaunch choice = choose_gated_launch(p);
  launch(p.grad ? gated_kernel<T, A, true> : gated_kernel<T, A, false>, grid_of(choice), block_of(choice), 0, stream, p, choice);
}

}  // namespace

cudaError_t gated_cuda(const GatedParams& params, cudaStream_t stream) {
  if (params.rows * params.columns == 0) return cudaSuccess;
  const GatedParams p = gated_as_one_row(params);
  const bool known = dispatch_float<false>(p.dtype, [&](auto type) {
    using T = decltype(type);
    switch (p.activation) {
      case Activation::silu: return launch_gated<T, Activation::silu>(p, stream);
      case Activation::gelu_tanh: return launch_gated<T, Activation::gelu_tanh>(p, stream);
      case Activation::gelu: return launch_gated<T, Activation::gelu>(p, stream);
    }
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace packops

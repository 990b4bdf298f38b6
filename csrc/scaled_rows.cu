// Rows times a factor, rounded once, on CUDA; formulas in scaled_rows.h, layout in scaled_rows_launch.h.
//
//   reads x once, writes out once (with `add` reads it, too): 6 bytes an element from fp32 to 16 bits
//
// Bound: memory. Elementwise, so an element's bits do not depend on its place. torch multiplies by a number that is on the device, and
// into another dtype, one element at a time: 2.8 ms for 8192 x 2304 and 256000 x 2304 elements on an H200.
#include "scaled_rows.h"

#include "common/launch.cuh"
#include "common/row_blocks.cuh"
#include "common/vec.cuh"
#include "scaled_rows_launch.h"

namespace packops {
namespace {

template <typename In, typename Out, bool kAdd>
__global__ void __launch_bounds__(kScaledRowsThreads, 4)
    scaled_rows_kernel(const __grid_constant__ ScaledRowsParams p, const __grid_constant__ ScaledRowsLaunch launch) {
  constexpr int W = scaled_rows_width(sizeof(In), sizeof(Out)), V = kScaledRowsVectors;
  const RowPlace at(launch, V, W);
  if (at.row >= p.rows) return;
  const bool counts = !p.target || p.target[at.row] >= 0;
  const float factor = p.factor ? static_cast<const float*>(p.factor)[at.row * p.factor_step] : 1.f;
  if (kAdd ? !counts : counts && p.x == p.out && factor == 1.f) return;  // nothing changes
  const int64_t count = p.columns - at.column;
  const In* x = static_cast<const In*>(p.x) + (p.index ? p.index[at.row] : at.row) * p.x_row + at.column;
  Out* out = static_cast<Out*>(p.out) + at.row * p.columns + at.column;

  const auto is_whole = [&](int v) { return launch.aligned && v * at.step + W <= count; };
  Vec<In, W> xs[V];
  Vec<Out, W> outs[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (counts && is_whole(v)) xs[v].load(x + v * at.step);
    if (kAdd && is_whole(v)) outs[v].load(out + v * at.step);
  }
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (!is_whole(v)) continue;
    float a[W] = {}, b[W];
    if (counts) xs[v].to_floats(a);
    if (kAdd) outs[v].to_floats(b);
#pragma unroll
    for (int i = 0; i < W; i++) a[i] = kAdd ? fmaf(factor, a[i], b[i]) : counts ? factor * a[i] : 0.f;
    outs[v].from_floats(a);
    outs[v].store(out + v * at.step);
  }
#pragma unroll 1
  for (int v = 0; v < V; v++)
#pragma unroll 1
    for (int64_t i = v * at.step; !is_whole(v) && i < v * at.step + W && i < count; i++) {
      const float a = counts ? to_float(x[i]) : 0.f;
      out[i] = from_float<Out>(kAdd ? fmaf(factor, a, to_float(out[i])) : counts ? factor * a : 0.f);
    }
}

}  // namespace

cudaError_t scaled_rows_cuda(const ScaledRowsParams& params, cudaStream_t stream) {
  if (params.rows * params.columns == 0) return cudaSuccess;
  const ScaledRowsParams p = scaled_rows_as_one(params);
  const ScaledRowsLaunch choice = choose_scaled_rows_launch(p);
  bool known = false;
  dispatch_float<false>(p.x_dtype, [&](auto in) {
    known = dispatch_float<false>(p.dtype, [&](auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      launch(p.add ? scaled_rows_kernel<In, Out, true> : scaled_rows_kernel<In, Out, false>, grid_of(choice), block_of(choice), 0,
             stream, p, choice);
    });
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace packops

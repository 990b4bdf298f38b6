// RMS norm of rows on CUDA, forward and backward; formulas in rms_norm.h, layout in rms_norm_launch.h.
//
//   forward    reads x, writes y                                            2 rows * columns * element_size bytes
//   backward   reads x and grad, writes dx; dweight in passing              3
//   with `added`: one more is read each way, and forward one more written   4, 4      (apart: 5, 6)
//
// Bound: memory. torch's fused kernels read x and grad twice in the backward pass, the second time for the weight. Here a thread
// has the same columns in all rows of its block and sums them in registers. Blocks write rows of partial sums, which a second
// kernel adds.
#include "rms_norm.h"

#include <array>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/partials.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "rms_norm_launch.h"

namespace packops {
namespace {

// Sums over each team of the block; every thread gets its team's. Double-buffered: passing round n's barrier means round n-1 was
// read. Without kSeveralTeams a team of more than a warp is a block.
template <bool kSeveralTeams, int kWarps, int N>
__device__ __forceinline__ void team_sum(float (&x)[N], int team, int size, int round, float (&shared)[2][kWarps][N]) {
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
  if (size == 32) return;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < N; i++) shared[round % 2][warp][i] = x[i];
  // No team waits for another. A kernel with named barriers has all sixteen in every block, so that two blocks fit: not forward.
  if constexpr (kSeveralTeams) bar_sync(1 + team, size);
  else __syncthreads();
  for (int i = 0; i < N; i++) {
    x[i] = 0;
    for (int w = team * size / 32; w < (team + 1) * size / 32; w++) x[i] += shared[round % 2][w][i];
  }
}

template <typename T, int V, bool kBackward, bool kAdds>
__global__ void __launch_bounds__(rms_norm_threads(V, kBackward), kBackward ? 1 : 4)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p, const __grid_constant__ RmsNormLaunch launch) {
  constexpr int W = kVec<T>, N = kBackward ? 2 : 1;
  __shared__ float shared[2][rms_norm_threads(V, kBackward) / 32][N];
  const int team = threadIdx.x / launch.team, lane = threadIdx.x % launch.team, teams = launch.threads / launch.team;
  const int columns = int(p.columns);
  const float inverse = 1.f / columns, eps = float(p.eps), one = p.zero_centered ? 1.f : 0.f;
  const auto column = [&](int v) { return (v * launch.team + lane) * W; };

  float sums[V][W];  // of the weight's gradient
#pragma unroll
  for (int v = 0; v < V; v++)
#pragma unroll
    for (int j = 0; j < W; j++) sums[v][j] = 0;
  // Loaded from the cache every time, to save registers.
  const auto weight = [&](int v, float (&w)[W]) {
    unpack<T>(load_cached(static_cast<const T*>(p.weight) + min(column(v), columns - W)), w);
  };

  // Streaming loads were faster forward, and slower backward.
  const auto load = [](const T* from) { return kBackward ? load_cached(from) : load_streaming(from); };

  int round = 0;
  for (int64_t first = int64_t(blockIdx.x) * teams; first < p.rows; first += int64_t(gridDim.x) * teams, round++) {
    const int64_t row = first + team;
    const bool has_row = row < p.rows;
    const T *x = static_cast<const T*>(p.x) + row * p.x_row, *grad = static_cast<const T*>(p.grad) + row * p.grad_row;
    const T* added = static_cast<const T*>(p.added) + row * p.added_row;
    uint4 xs[V], grads[V], adds[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      const bool there = has_row && column(v) < columns;
      xs[v] = there ? load(x + column(v)) : uint4{0, 0, 0, 0};
      if constexpr (kBackward) grads[v] = there ? load(grad + column(v)) : uint4{0, 0, 0, 0};
      if constexpr (kAdds) adds[v] = there ? load(added + column(v)) : uint4{0, 0, 0, 0};
    }
    float total[N] = {};  // x², and x h
#pragma unroll
    for (int v = 0; v < V; v++) {
      float a[W], g[W] = {}, w[W];
      unpack<T>(xs[v], a);
      if constexpr (kAdds && !kBackward) {
        unpack<T>(adds[v], g);
#pragma unroll
        for (int j = 0; j < W; j++) a[j] += g[j];
        xs[v] = pack<T>(a);
        unpack<T>(xs[v], a);  // the norm is of the rounded sum, as of one that another op has made
        if (has_row && column(v) < columns) store_streaming(static_cast<T*>(p.total) + row * p.columns + column(v), xs[v]);
      }
      weight(v, w);
      if constexpr (kBackward) unpack<T>(grads[v], g);
#pragma unroll
      for (int j = 0; j < W; j++) {
        total[0] = fmaf(a[j], a[j], total[0]);
        if constexpr (kBackward) total[1] = fmaf(a[j], g[j] * (w[j] + one), total[1]);
      }
      forget(xs[v]);
      if constexpr (kBackward) forget(grads[v]);
    }
    team_sum<kBackward>(total, team, launch.team, round, shared);
    const float r = rsqrtf(total[0] * inverse + eps);
    T* out = static_cast<T*>(p.out) + row * p.columns;
#pragma unroll
    for (int v = 0; v < V; v++) {
      float a[W], g[W] = {}, b[W] = {}, w[W];
      unpack<T>(xs[v], a);
      weight(v, w);
      if constexpr (kBackward) unpack<T>(grads[v], g);
      if constexpr (kBackward && kAdds) unpack<T>(adds[v], b);
#pragma unroll
      for (int j = 0; j < W; j++) {
        const float n = a[j] * r;
        if constexpr (kBackward) {
          sums[v][j] = fmaf(g[j], n, sums[v][j]);
          a[j] = r * (g[j] * (w[j] + one) - n * (total[1] * inverse * r));
          if constexpr (kAdds) a[j] += b[j];
        } else {
          a[j] = n * (w[j] + one);
        }
      }
      if (has_row && column(v) < columns) store_streaming(out + column(v), pack<T>(a));
    }
    if constexpr (!kBackward) break;  // blocks cover all rows; a loop costs 8 to 23 registers
  }

  if constexpr (kBackward) {
    griddepcontrol_launch_dependents();
    float* partial = static_cast<float*>(p.partial) + int64_t(blockIdx.x) * columns;
    auto* of_teams = dynamic_shared<float>();  // (teams, columns)
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int j = 0; j < W; j++)
        if (column(v) < columns) of_teams[team * columns + column(v) + j] = sums[v][j];
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += launch.threads) {
      float sum = of_teams[c];
      for (int t = 1; t < teams; t++) sum += of_teams[t * columns + c];
      partial[c] = sum;
    }
  }
}

__global__ void __launch_bounds__(kSumColumns* kSumRows) weight_gradient_kernel(const __grid_constant__ RmsNormParams p) {
  griddepcontrol_wait();
  add_partials(static_cast<const float*>(p.partial), p.partials, p.columns, p.weight_grad, p.dtype);
}

template <typename T, int V, bool kAdds>
cudaError_t launch_rows(const RmsNormParams& p, const RmsNormLaunch& choice, const Device& device, cudaStream_t stream) {
  constexpr auto kBackward = rms_norm_kernel<T, V, true, kAdds>;
  const int shared = p.backward() ? choice.threads / choice.team * int(p.columns * sizeof(float)) : 0;
  if (const cudaError_t error = allow_shared<kBackward>(device.index, shared); error != cudaSuccess) return error;
  launch(p.backward() ? kBackward : rms_norm_kernel<T, V, false, kAdds>, dim3(unsigned(choice.blocks)),
         dim3(unsigned(choice.threads)), size_t(shared), stream, p, choice);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm_cuda_partials(RmsNormParams& p) {
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  p.partials = choose_rms_norm_launch(p, device).blocks;
  return cudaSuccess;
}

cudaError_t rms_norm_cuda(const RmsNormParams& p, cudaStream_t stream) {
  if (!rms_norm_fits(p.columns, p.dtype)) return cudaErrorInvalidValue;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const RmsNormLaunch choice = choose_rms_norm_launch(p, device);
  const bool known = dispatch_float<false>(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr auto launches =
        std::array{launch_rows<T, 3, false>, launch_rows<T, 4, false>, launch_rows<T, 3, true>, launch_rows<T, 4, true>};
    if (choice.blocks > 0) error = launches[2 * (p.added != nullptr) + choice.vectors - 3](p, choice, device, stream);
  });
  if (!known) return cudaErrorInvalidValue;
  if (error != cudaSuccess || !p.backward()) return error;
  return launch_with({.follows = choice.blocks > 0 && device.overlaps_launches()}, weight_gradient_kernel,
                     dim3(blocks_for_partials(p.columns)), dim3(kSumColumns * kSumRows), 0, stream, p);
}

}  // namespace packops

// RoPE on CUDA: q and k in one launch, positions resolved in the kernel.
//
//   x' = x cos a - y sin a,   y' = y cos a + x sin a      for the pairs (x, y) of every head (see rope.h)
//
// Bound: memory. A head is read once and written once, 2 (Hq + Hk) D element_size bytes per token (in place: only rotated
// features), plus the token's sines and cosines (R / 2 of each, 1 to 3 % more) and its position.
//
// Layout: see rope_launch.h. A thread owns both vectors of a pair, so no element is loaded twice; it starts the loads of all its
// heads before it asks for the position, so that the chain position -> table row -> arithmetic runs in their shadow. The grid is
// linear over tokens, so the number of documents costs nothing; with cu_seqlens a warp finds a token's document 32 ways at a
// time. Half pairs: the vectors lie at i and i + R/2. Interleaved pairs: at the same places, each vector holding whole pairs, so
// that both kinds touch memory in the same pattern.
#include "rope.h"

#include "common/device.cuh"
#include "rope_device.cuh"
#include "rope_launch.h"

namespace packops {
namespace {

template <typename T, int W, bool kInterleaved, int kUnroll>
__global__ void __launch_bounds__(512)
    RopeKernel(const __grid_constant__ RopeParams p, const __grid_constant__ RopeLaunch launch) {
  extern __shared__ int64_t start_of[];  // of each token of the block, with cu_seqlens

  const int64_t first = int64_t(blockIdx.x / launch.chunks) * launch.tokens_per_block;
  int local, item;
  if (launch.token_inner) {
    const int walk = threadIdx.x / launch.lanes;
    local = walk % launch.tokens_per_block;
    item = walk / launch.tokens_per_block * launch.lanes + threadIdx.x % launch.lanes;
  } else {
    local = threadIdx.x / launch.items_per_block;
    item = threadIdx.x % launch.items_per_block;
  }
  bool active = local < launch.tokens_per_block && item < launch.items_per_block;
  item += blockIdx.x % launch.chunks * launch.items_per_block;
  const int slot = item / launch.lanes, lane = item % launch.lanes;
  const int heads = int(p.q.heads + p.k.heads), slots = (heads + kUnroll - 1) / kUnroll;
  const int64_t t = first + local;
  active = active && t < p.batch * p.tokens && slot < slots;
  const RopeToken at = active ? rope_token(p, t) : RopeToken{0, 0};
  const RopeLane place = rope_lane<W, kInterleaved>(p, lane, launch.lanes);

  Vec<T, W> a[kUnroll], b[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int head = slot + u * slots;
    if (active && head < heads) {
      const bool is_q = head < p.q.heads;
      const RopeHeads& side = is_q ? p.q : p.k;
      const T* x = static_cast<const T*>(side.in) + at.batch * side.in_batch + at.token * side.in_token +
                   (is_q ? head : head - p.q.heads) * side.in_head;
      a[u].load_streaming(x + place.a);
      if (place.has_b) b[u].load_streaming(x + place.b);
    }
  }

  if (p.cu_seqlens) {
    find_documents(p, first, launch.tokens_per_block, start_of);
    __syncthreads();
  }
  if (!active) return;
  const int64_t position = rope_position(p, t, at, p.cu_seqlens ? start_of[local] : 0);
  if (position == kOutside && p.in_place) return;

  if (place.turns && position != kOutside) {
    RopeCoefficients<W, kInterleaved> coefficients;
    coefficients.load(p, at, position, lane);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      float x[W], y[W];
      a[u].to_floats(x);
      b[u].to_floats(y);
      coefficients.turn(p, x, y);
      a[u].from_floats(x);
      b[u].from_floats(y);
    }
  }

#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int head = slot + u * slots;
    if (head < heads) {
      const bool is_q = head < p.q.heads;
      const RopeHeads& side = is_q ? p.q : p.k;
      T* y = static_cast<T*>(side.out) + at.batch * side.out_batch + at.token * side.out_token +
             (is_q ? head : head - p.q.heads) * side.out_head;
      a[u].store_streaming(y + place.a);
      if (place.has_b) b[u].store_streaming(y + place.b);
    }
  }
}

// ---- Launchers.

template <typename T, int W, bool kInterleaved>
void launch_unrolled(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  const int shared = p.cu_seqlens ? launch.tokens_per_block * int(sizeof(int64_t)) : 0;
  const dim3 grid(static_cast<unsigned>(launch.blocks)), block(launch.threads);
  constexpr int kMost = rope_max_unroll(W * sizeof(T));
  if constexpr (kMost >= 4)
    if (launch.unroll == 4) return RopeKernel<T, W, kInterleaved, 4><<<grid, block, shared, stream>>>(p, launch);
  if constexpr (kMost >= 2)
    if (launch.unroll == 2) return RopeKernel<T, W, kInterleaved, 2><<<grid, block, shared, stream>>>(p, launch);
  RopeKernel<T, W, kInterleaved, 1><<<grid, block, shared, stream>>>(p, launch);
}

template <typename T, bool kInterleaved>
void launch_width(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  switch (launch.width) {
    case 8:
      if constexpr (sizeof(T) == 2) launch_unrolled<T, 8, kInterleaved>(p, launch, stream);
      return;
    case 4: return launch_unrolled<T, 4, kInterleaved>(p, launch, stream);
    case 2: return launch_unrolled<T, 2, kInterleaved>(p, launch, stream);
    default: return launch_unrolled<T, 1, kInterleaved>(p, launch, stream);
  }
}

}  // namespace

cudaError_t rope_cuda(const RopeParams& p, const int* tuning, cudaStream_t stream) {
  if (p.batch * p.tokens == 0 || p.q.heads + p.k.heads == 0) return cudaSuccess;
  const int element_size = p.dtype == DType::f32 ? 4 : 2;
  const RopeLaunch launch = tuning ? choose_rope_launch(p, element_size, multiprocessors(), tuning[0], tuning[1], tuning[2])
                                   : choose_rope_launch(p, element_size, multiprocessors());
  const bool known = dispatch_float<false>(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.interleaved) launch_width<T, true>(p, launch, stream);
    else launch_width<T, false>(p, launch, stream);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace packops

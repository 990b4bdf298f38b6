// RoPE on CUDA: q and k in one launch, positions resolved in the kernel.
//
//   x' = x cos a - y sin a,   y' = y cos a + x sin a      for the pairs (x, y) of every head (see rope.h)
//
// Bound: memory. A head is read once and written once, 2 (Hq + Hk) D element_size bytes per token (in place: only rotated
// features), plus the token's sines and cosines (R / 2 of each, 1 to 3 % more) and its position.
//
// Layout: see rope_launch.h. A thread owns both vectors of a pair, so no element is loaded twice. It issues the loads of all its
// heads, then of its position, then of the table's rows, before any head has arrived: the dependent loads position -> row are
// hidden. The grid walks tokens, so the number of documents costs nothing; with cu_seqlens a warp searches for a token's document
// 32 places at a time. With M-RoPE a block puts its tokens' cosines and sines into shared memory once (RopeCoefficients::share),
// equally hidden, so that sections of every shape cost the same.
#include "rope.h"

#include "common/device.cuh"
#include "rope_device.cuh"
#include "rope_launch.h"

namespace packops {
namespace {

// kPlain: see RopeLaunch::plain.
template <typename T, int W, bool kInterleaved, bool kMrope, int kUnroll, bool kPlain>
__global__ void __launch_bounds__(rope_bound_threads(kPlain, kUnroll), kPlain ? kRopePlainBlocks : 1)
    rope_kernel(const __grid_constant__ RopeParams p, const __grid_constant__ RopeLaunch launch, const int64_t first_batch) {
  // M-RoPE: cosines, then sines, of each token's lanes. cu_seqlens: the start of each token's document.
  auto* numbers = dynamic_shared<float>();
  const int sines = kMrope ? launch.tokens_per_block * launch.lanes_per_block * W : 0;
  auto* start_of = reinterpret_cast<int64_t*>(numbers + 2 * sines);

  int lane = threadIdx.x, chunk = blockIdx.y;
  if (!kPlain && launch.lane_chunks > 1) {
    lane += chunk % launch.lane_chunks * blockDim.x;
    chunk /= launch.lane_chunks;
  }
  const int local = launch.token_inner ? threadIdx.y : threadIdx.z;
  const int slot_in_block = launch.token_inner ? threadIdx.z : threadIdx.y;
  const int slot = chunk * launch.slots_per_block + slot_in_block;
  const int64_t first = int64_t(blockIdx.x) * launch.tokens_per_block;
  const RopeToken at{first_batch + blockIdx.z, first + local};
  const bool active = at.token < p.tokens && slot < launch.slots && (kPlain || lane < launch.lanes);
  const int turning = p.rotary_offset + lane * W;
  const RopeLane place =
      kPlain ? RopeLane{turning, turning + p.rotary_dim / 2, true, true} : rope_lane<W, kInterleaved>(p, lane, launch.lanes);
  const RopeSlots<T, kPlain> heads(p, launch, slot);
  Vec<T, W> a[kUnroll], b[kUnroll];
  if (active) {
    const T* x = heads.input(p, at);
    const int64_t step = heads.input_step(p);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (heads.has(u)) a[u].load(x + u * step + place.a);
      if (heads.has(u) && place.has_b) b[u].load(x + u * step + place.b);
    }
  }

  if (p.axis.cu_seqlens) {
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    find_documents(p, at.batch * p.tokens + first, launch.tokens_per_block, start_of, thread, launch.threads());
    __syncthreads();
  }
  if (!kMrope && !active) return;
  const RopePosition<kMrope> position(p, at, p.axis.cu_seqlens ? start_of[local] : 0);
  RopeCoefficients<W, kInterleaved> coefficients;
  numbers += (local * launch.lanes_per_block + threadIdx.x) * W;
  const RopeShared shared{numbers, numbers + sines};
  if constexpr (kMrope) {
    coefficients.share(p, position, lane, shared, slot_in_block, launch.slots_per_block);
    __syncthreads();
    if (!active) return;
  }
  if (position.outside() && p.in_place) return;

  const bool turns = place.turns && !position.outside();
  if (turns) {
    if constexpr (kPlain) coefficients.load_rows(p, at, position, lane, {p.table_dtype, true, 1});
    else coefficients.load(p, at, position, lane, shared);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (coefficients.bad) {
        a[u].fill(coefficients.fault(p));
        b[u].fill(coefficients.fault(p));
        continue;
      }
      float x[W], y[W];
      a[u].to_floats(x);
      b[u].to_floats(y);
      coefficients.turn(x, y);
      a[u].from_floats(x);
      b[u].from_floats(y);
    }
  }

  T* y = heads.output(p, at);
  const int64_t step = heads.output_step(p);
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    if (heads.has(u)) a[u].store(y + u * step + place.a);
    if (heads.has(u) && place.has_b) b[u].store(y + u * step + place.b);
  }
  if (blockIdx.x == 0 && turns && coefficients.finds_misread(p, at.batch, lane)) {
    a[0].fill(coefficients.fault(p));
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (heads.has(u)) a[0].store(y + u * step + place.a), a[0].store(y + u * step + place.b);
    }
  }
}

// ---- Launchers.

template <typename T, int W, bool kInterleaved, bool kMrope>
void launch_unrolled(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  constexpr int kMost = rope_max_unroll(W * sizeof(T));
  if constexpr (W * sizeof(T) == 16 && !kMrope) {
    if (launch.plain && launch.unroll == 4)
      return launch_rope<rope_kernel<T, W, kInterleaved, kMrope, 4, true>>(p, p, launch, stream);
    if (launch.plain && launch.unroll == 2)
      return launch_rope<rope_kernel<T, W, kInterleaved, kMrope, 2, true>>(p, p, launch, stream);
  }
  if constexpr (kMost >= 4)
    if (launch.unroll == 4) return launch_rope<rope_kernel<T, W, kInterleaved, kMrope, 4, false>>(p, p, launch, stream);
  if constexpr (kMost >= 2)
    if (launch.unroll == 2) return launch_rope<rope_kernel<T, W, kInterleaved, kMrope, 2, false>>(p, p, launch, stream);
  launch_rope<rope_kernel<T, W, kInterleaved, kMrope, 1, false>>(p, p, launch, stream);
}

template <typename T, bool kInterleaved, bool kMrope>
void launch_width(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  switch (launch.width) {
    case 8:
      if constexpr (sizeof(T) == 2) launch_unrolled<T, 8, kInterleaved, kMrope>(p, launch, stream);
      return;
    case 4: return launch_unrolled<T, 4, kInterleaved, kMrope>(p, launch, stream);
    case 2: return launch_unrolled<T, 2, kInterleaved, kMrope>(p, launch, stream);
    default: return launch_unrolled<T, 1, kInterleaved, kMrope>(p, launch, stream);
  }
}

template <typename T>
void launch_pairs(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  if (p.interleaved)
    return p.mrope ? launch_width<T, true, true>(p, launch, stream) : launch_width<T, true, false>(p, launch, stream);
  return p.mrope ? launch_width<T, false, true>(p, launch, stream) : launch_width<T, false, false>(p, launch, stream);
}

}  // namespace

cudaError_t rope_cuda(const RopeParams& p, cudaStream_t stream) {
  if (p.batch * p.tokens == 0 || p.q.heads + p.k.heads == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  return rope_cuda_as(p, choose_rope_launch(p, device), stream);
}

cudaError_t rope_cuda_as(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  const bool known = dispatch_float<false>(p.dtype, [&](auto type) { launch_pairs<decltype(type)>(p, launch, stream); });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace packops

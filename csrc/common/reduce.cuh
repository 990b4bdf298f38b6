// Deterministic reductions: fixed trees over a warp and a block, no atomics.
#pragma once

namespace packops {

inline constexpr unsigned kFullWarp = 0xffffffffu;

template <typename V>
struct Add {
  __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};

// Combines the values of all 32 lanes; every lane gets the result. `combine` must be commutative.
template <typename V, typename Combine>
__device__ __forceinline__ V warp_reduce(V value, Combine combine) {
  static_assert(sizeof(V) % 4 == 0);
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    V other;
    if constexpr (sizeof(V) == 4 || sizeof(V) == 8) {
      if constexpr (std::is_arithmetic_v<V>) {
        other = __shfl_xor_sync(kFullWarp, value, offset);
        value = combine(value, other);
        continue;
      }
    }
    const auto* words = reinterpret_cast<const unsigned*>(&value);
    auto* other_words = reinterpret_cast<unsigned*>(&other);
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / 4); i++) other_words[i] = __shfl_xor_sync(kFullWarp, words[i], offset);
    value = combine(value, other);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Combines the values of a block of kThreads; every thread gets the result. `scratch`: kThreads / 32 values in shared memory,
// free again after the block's next barrier.
template <int kThreads, typename V, typename Combine>
__device__ __forceinline__ V block_reduce(V value, V identity, Combine combine, V* scratch) {
  constexpr int kWarps = kThreads / 32;
  value = warp_reduce(value, combine);
  if constexpr (kWarps == 1) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < kWarps ? scratch[threadIdx.x % 32] : identity;
  return warp_reduce(value, combine);
}

}  // namespace packops

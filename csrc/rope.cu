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

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/device.cuh"
#include "rope_launch.h"

namespace packops {
namespace {

// ---- Vectors of W elements, moved by one instruction, turned as floats.

template <int kBytes>
struct Bits;
template <>
struct Bits<16> {
  using type = uint4;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};

template <typename T, int W>
struct Vec {
  using Storage = typename Bits<W * sizeof(T)>::type;
  union {
    Storage bits;
    T element[W];
  };
  __device__ Vec() {}
  // Every byte is used once: evict it first.
  __device__ void load(const T* p) { bits = __ldcs(reinterpret_cast<const Storage*>(p)); }
  __device__ void store(T* p) const { __stcs(reinterpret_cast<Storage*>(p), bits); }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(half_t x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(double x) { return float(x); }
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16_t from_float<bf16_t>(float x) {
  return bf16_t{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline half_t from_float<half_t>(float x) {
  return half_t{__half_as_ushort(__float2half_rn(x))};
}

// ---- Positions and tables.

__device__ inline int64_t integer_at(const void* data, DType dtype, int64_t i) {
  return dtype == DType::i32 ? __ldg(static_cast<const int32_t*>(data) + i) : __ldg(static_cast<const long long*>(data) + i);
}

// kOutside: the token belongs to no document. kBad: no such row in the table.
constexpr int64_t kOutside = -1, kBad = -2;

__device__ inline int64_t checked(const RopeParams& p, int64_t position) {
  return position >= 0 && position < p.table_rows ? position : kBad;
}

// The start of the document of token t, or kOutside; all lanes of a warp ask together about the same t. Keeps
// cu[low] <= t < cu[high]; whatever cu_seqlens holds, it reads entries 0 to num_documents only.
__device__ inline int64_t document_start(const RopeParams& p, int64_t t) {
  const int lane = threadIdx.x % 32;
  auto bound = [&](int64_t i) { return integer_at(p.cu_seqlens, p.cu_dtype, i * p.cu_stride); };
  if (t >= bound(p.num_documents) || t < bound(0)) return kOutside;
  int64_t low = 0, high = p.num_documents;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, probe = low + lane * step;
    const unsigned below = __ballot_sync(~0u, probe < high && bound(probe) <= t);
    const int last = below ? 31 - __clz(below) : 0;
    high = min(high, low + (last + 1) * step);
    low += last * step;
  }
  return bound(low);
}

template <int N>
__device__ inline void load_row(const void* table, DType dtype, int64_t i, float (&out)[N]) {
  auto read = [&](auto type) {
    using T = decltype(type);
    constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    const T* p = static_cast<const T*>(table) + i;
    if (reinterpret_cast<uintptr_t>(p) % (kStep * sizeof(T)) == 0) {
      using Storage = typename Bits<kStep * sizeof(T)>::type;
#pragma unroll
      for (int j = 0; j < N; j += kStep) {
        union {
          Storage bits;
          T element[kStep];
        } v;
        v.bits = __ldg(reinterpret_cast<const Storage*>(p + j));
#pragma unroll
        for (int u = 0; u < kStep; u++) out[j + u] = to_float(v.element[u]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) out[j] = to_float(p[j]);
    }
  };
  switch (dtype) {
    case DType::f32: return read(float{});
    case DType::bf16: return read(bf16_t{});
    case DType::f16: return read(half_t{});
    default: return read(double{});
  }
}

// ---- The kernel. W: elements per vector; kUnroll: heads per thread.

template <typename T, int W, bool kInterleaved, int kUnroll>
__global__ void __launch_bounds__(512) RopeKernel(const __grid_constant__ RopeParams p, const __grid_constant__ RopeLaunch launch) {
  extern __shared__ int64_t start_of[];  // cu_seqlens: the document's start of each token of the block

  const int64_t group = blockIdx.x / launch.chunks;
  const int chunk = blockIdx.x % launch.chunks;
  const int64_t first = group * launch.tokens_per_block, tokens = p.batch * p.tokens;
  int local, item;
  if (launch.token_inner) {
    const int walk = threadIdx.x / launch.lanes;
    local = walk % launch.tokens_per_block;
    item = walk / launch.tokens_per_block * launch.lanes + threadIdx.x % launch.lanes;
  } else {
    local = threadIdx.x / launch.items_per_block;
    item = threadIdx.x % launch.items_per_block;
  }
  const int heads = int(p.q.heads + p.k.heads), slots = (heads + kUnroll - 1) / kUnroll;
  const bool in_block = local < launch.tokens_per_block && item < launch.items_per_block;
  item += chunk * launch.items_per_block;
  const int slot = item / launch.lanes, lane = item % launch.lanes;
  const int64_t t = first + local;
  const bool active = in_block && t < tokens && slot < slots;

  int64_t batch = 0, token = t;
  if (p.batch > 1 && active) {
    if (tokens <= 0x7fffffff) batch = uint32_t(t) / uint32_t(p.tokens);
    else batch = t / p.tokens;
    token = t - batch * p.tokens;
  }

  // Where this thread's two vectors lie in a head.
  const int half = p.rotary_dim / 2, turning = half / W;
  const bool turns = lane < turning;
  int offset_a, offset_b;
  bool has_b = true;
  if (turns) {
    offset_a = p.rotary_offset + (kInterleaved && W == 1 ? 2 * lane : lane * W);
    offset_b = kInterleaved && W == 1 ? offset_a + 1 : offset_a + half;
  } else {
    const int passing = (p.head_dim - p.rotary_dim) / W, pairs = launch.lanes - turning;
    auto place = [&](int i) { return i * W < p.rotary_offset ? i * W : i * W + p.rotary_dim; };
    offset_a = place(lane - turning);
    offset_b = place(lane - turning + pairs);
    has_b = lane - turning + pairs < passing;
  }

  Vec<T, W> a[kUnroll], b[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int head = slot + u * slots;
    if (active && head < heads) {
      const bool is_q = head < p.q.heads;
      const RopeHeads& side = is_q ? p.q : p.k;
      const T* x = static_cast<const T*>(side.in) + batch * side.in_batch + token * side.in_token +
                   (is_q ? head : head - p.q.heads) * side.in_head;
      a[u].load(x + offset_a);
      if (has_b) b[u].load(x + offset_b);
    }
  }

  int64_t position = token;
  if (p.cu_seqlens) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int i = warp; i < launch.tokens_per_block; i += warps) {
      const int64_t start = document_start(p, min(first + i, tokens - 1));
      if (threadIdx.x % 32 == 0) start_of[i] = start;
    }
    __syncthreads();
    if (!active) return;
    const int64_t start = start_of[local];
    position = start == kOutside ? kOutside : t - start;
  }
  if (!active) return;
  if (position != kOutside) {
    if (p.position_ids && !p.mrope)
      position = integer_at(p.position_ids, p.position_dtype, batch * p.position_batch + token * p.position_token);
    position = p.per_token_table ? token : checked(p, position);
  }
  if (position == kOutside && p.in_place) return;

  if (turns && position != kOutside) {
    float cos[W], sin[W];
    bool bad = position == kBad;
    // The first pair of each run of pairs this thread turns.
    constexpr int kRun = kInterleaved && W > 1 ? W / 2 : W;
    const int pair = lane * kRun;
    if (p.mrope) {
      int64_t row[3];
      bad = false;
#pragma unroll
      for (int axis = 0; axis < 3; axis++) {
        row[axis] = checked(p, integer_at(p.position_ids, p.position_dtype,
                                          axis * p.position_axis + batch * p.position_batch + token * p.position_token));
        bad |= row[axis] == kBad;
      }
      if (!bad) {
#pragma unroll
        for (int j = 0; j < W; j++) {
          const int i = kInterleaved && W > 1 && j >= kRun ? half / 2 + pair + j - kRun : pair + j;
          const int axis = rope_mrope_axis(p, i);
          const int64_t r = axis == 0 ? row[0] : axis == 1 ? row[1] : row[2];
          float c[1], s[1];
          load_row(p.cos, p.table_dtype, r * p.cos_row + i, c);
          load_row(p.sin, p.table_dtype, r * p.sin_row + i, s);
          cos[j] = c[0];
          sin[j] = s[0];
        }
      }
    } else if (!bad) {
      const int64_t table_batch = p.per_token_table ? batch : 0;
      const int64_t cos_row = table_batch * p.cos_batch + position * p.cos_row, sin_row = table_batch * p.sin_batch + position * p.sin_row;
      if constexpr (kInterleaved && W > 1) {
        float run[kRun];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          load_row(p.cos, p.table_dtype, cos_row + r * (half / 2) + pair, run);
#pragma unroll
          for (int j = 0; j < kRun; j++) cos[r * kRun + j] = run[j];
          load_row(p.sin, p.table_dtype, sin_row + r * (half / 2) + pair, run);
#pragma unroll
          for (int j = 0; j < kRun; j++) sin[r * kRun + j] = run[j];
        }
      } else {
        load_row(p.cos, p.table_dtype, cos_row + pair, cos);
        load_row(p.sin, p.table_dtype, sin_row + pair, sin);
      }
    }
    if (p.transposed) {
#pragma unroll
      for (int j = 0; j < W; j++) sin[j] = -sin[j];
    }

    const T fault = from_float<T>(p.transposed ? 0.f : __int_as_float(0x7fc00000));
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      auto turn = [](T& x, T& y, float c, float s) {
        const float fx = to_float(x), fy = to_float(y);
        x = from_float<T>(fx * c - fy * s);
        y = from_float<T>(fy * c + fx * s);
      };
      if (bad) {
#pragma unroll
        for (int j = 0; j < W; j++) a[u].element[j] = b[u].element[j] = fault;
      } else if constexpr (kInterleaved && W > 1) {
#pragma unroll
        for (int j = 0; j < kRun; j++) {
          turn(a[u].element[2 * j], a[u].element[2 * j + 1], cos[j], sin[j]);
          turn(b[u].element[2 * j], b[u].element[2 * j + 1], cos[kRun + j], sin[kRun + j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < W; j++) turn(a[u].element[j], b[u].element[j], cos[j], sin[j]);
      }
    }
  }

#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int head = slot + u * slots;
    if (head < heads) {
      const bool is_q = head < p.q.heads;
      const RopeHeads& side = is_q ? p.q : p.k;
      T* y = static_cast<T*>(side.out) + batch * side.out_batch + token * side.out_token +
             (is_q ? head : head - p.q.heads) * side.out_head;
      a[u].store(y + offset_a);
      if (has_b) b[u].store(y + offset_b);
    }
  }
}

// ---- Launchers.

template <typename T, int W, bool kInterleaved>
void launch_unrolled(const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  const int shared = p.cu_seqlens ? launch.tokens_per_block * int(sizeof(int64_t)) : 0;
  const dim3 grid(static_cast<unsigned>(launch.blocks)), block(launch.threads);
  switch (launch.unroll) {
    case 4: return RopeKernel<T, W, kInterleaved, 4><<<grid, block, shared, stream>>>(p, launch);
    case 2: return RopeKernel<T, W, kInterleaved, 2><<<grid, block, shared, stream>>>(p, launch);
    default: return RopeKernel<T, W, kInterleaved, 1><<<grid, block, shared, stream>>>(p, launch);
  }
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

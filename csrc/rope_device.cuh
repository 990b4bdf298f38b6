// What rope.cu and qk_norm_rope.cu share on the device: positions, heads, table rows, the turning itself, and the launch.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "rope.h"
#include "rope_launch.h"

namespace packops {

__device__ inline float to_float(double x) { return float(x); }

__device__ inline int64_t integer_at(const void* data, DType dtype, int64_t i) {
  return dtype == DType::i32 ? __ldg(static_cast<const int32_t*>(data) + i) : __ldg(static_cast<const long long*>(data) + i);
}

// N numbers of a float table, in vectors where they are aligned.
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

// ---- Tokens.

// t = batch * tokens + token.
struct RopeToken {
  int64_t batch, token;
};

__device__ inline RopeToken rope_token(const RopeParams& p, int64_t t) {
  if (p.batch == 1) return {0, t};
  const int64_t batch = p.batch * p.tokens <= 0x7fffffff ? int64_t(uint32_t(t) / uint32_t(p.tokens)) : t / p.tokens;
  return {batch, t - batch * p.tokens};
}

// A position that is none. kOutside: the token belongs to no document and does not turn. kBad: the table has no such row.
constexpr int64_t kOutside = -1, kBad = -2;

// The start of the document of token t, or kOutside. All lanes of a warp ask together about one t, and look in 32 places at a
// time. Keeps cu[low] <= t < cu[high]; whatever cu_seqlens holds, only its entries are read.
__device__ inline int64_t document_start(const RopeParams& p, int64_t t, int lane) {
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

// Fills start_of[0, count) for the tokens from `first` on; all `threads` of the block take part. A barrier must follow.
__device__ inline void find_documents(const RopeParams& p, int64_t first, int count, int64_t* start_of, int thread, int threads) {
  const int64_t last = p.batch * p.tokens - 1;
  const int warps = threads / 32, warp = thread / 32, lane = thread % 32;
  if (warp == warps) return;  // not a whole one
  for (int i = warp; i < count; i += warps) {
    const int64_t start = document_start(p, min(first + i, last), lane);
    if (lane == 0) start_of[i] = start;
  }
}

__device__ inline int64_t checked(const RopeParams& p, int64_t position) {
  return position >= 0 && position < p.table_rows ? position : kBad;
}

// What position_ids say of a token, on each axis; asked for early and looked at late.
template <bool kMrope>
struct RopePositionId {
  int64_t axis[kMrope ? 3 : 1];

  __device__ void ask(const RopeParams& p, RopeToken at) {
    if (!p.position_ids) return;
    const int64_t i = at.batch * p.position_batch + at.token * p.position_token;
    axis[0] = integer_at(p.position_ids, p.position_dtype, i);
    if constexpr (kMrope) {
      axis[1] = integer_at(p.position_ids, p.position_dtype, i + p.position_axis);
      axis[2] = integer_at(p.position_ids, p.position_dtype, i + 2 * p.position_axis);
    }
  }
};

// The table row of a token (of the first axis for M-RoPE), kOutside or kBad. start: of its document, where there is cu_seqlens.
template <bool kMrope>
__device__ inline int64_t rope_position(const RopeParams& p, const RopePositionId<kMrope>& id, RopeToken at, int64_t start) {
  if (p.cu_seqlens && start == kOutside) return kOutside;
  if (p.per_token_table) return at.token;
  if (p.position_ids) return checked(p, id.axis[0]);
  return checked(p, p.cu_seqlens ? at.batch * p.tokens + at.token - start : at.token);
}

template <typename T>
__device__ inline const T* head_in(const RopeHeads& side, RopeToken at, int head) {
  return static_cast<const T*>(side.in) + at.batch * side.in_batch + at.token * side.in_token + head * side.in_head;
}
template <typename T>
__device__ inline T* head_out(const RopeHeads& side, RopeToken at, int head) {
  return static_cast<T*>(side.out) + at.batch * side.out_batch + at.token * side.out_token + head * side.out_head;
}

// ---- Lanes. A lane of a head is two vectors of W features. Half pairs are vectors R / 2 apart. Interleaved pairs lie inside
// vectors, taken from the same places, so that both kinds touch memory alike; only W = 1 takes its pair from neighbours.

struct RopeLane {
  int a, b;           // where the vectors start
  bool turns, has_b;  // a lane that only passes features through may have one vector
};

template <int W, bool kInterleaved>
__device__ inline RopeLane rope_lane(const RopeParams& p, int lane, int lanes) {
  const int half = p.rotary_dim / 2, turning = half / W;
  if (lane < turning) {
    const int a = p.rotary_offset + (kInterleaved && W == 1 ? 2 * lane : lane * W);
    return {a, kInterleaved && W == 1 ? a + 1 : a + half, true, true};
  }
  const int passing = (p.head_dim - p.rotary_dim) / W, first = lane - turning, second = first + lanes - turning;
  auto place = [&](int i) { return i * W < p.rotary_offset ? i * W : i * W + p.rotary_dim; };
  return {place(first), place(second), false, second < passing};
}

template <int W, bool kInterleaved, bool kMrope>
struct RopeCoefficients {
  static constexpr int kRun = kInterleaved && W > 1 ? W / 2 : W;  // consecutive pairs
  float cos[W], sin[W];
  bool bad;

  // position: not kOutside.
  __device__ void load(const RopeParams& p, RopeToken at, const RopePositionId<kMrope>& id, int64_t position, int lane) {
    const int half = p.rotary_dim / 2, pair = lane * kRun;
    bad = position == kBad;
    if constexpr (kMrope) {
      const int64_t row[3] = {position, checked(p, id.axis[1]), checked(p, id.axis[2])};
      bad |= row[1] == kBad || row[2] == kBad;
      if (bad) return;
      // A vector of every axis, and of each pair what its axis says: cheaper than looking pairs up one by one.
#pragma unroll
      for (int r = 0; r < W / kRun; r++) {
        const int first = pair + r * (half / 2);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
          float c[kRun], s[kRun];
          load_row(p.cos, p.table_dtype, row[axis] * p.cos_row + first, c);
          load_row(p.sin, p.table_dtype, row[axis] * p.sin_row + first, s);
#pragma unroll
          for (int j = 0; j < kRun; j++) {
            if (rope_mrope_axis(p, first + j) == axis) {
              cos[r * kRun + j] = c[j];
              sin[r * kRun + j] = s[j];
            }
          }
        }
      }
    } else if (!bad) {
      const int64_t batch = p.per_token_table ? at.batch : 0;
      const int64_t cos_at = batch * p.cos_batch + position * p.cos_row + pair,
                    sin_at = batch * p.sin_batch + position * p.sin_row + pair;
      float run[kRun];
#pragma unroll
      for (int r = 0; r < W / kRun; r++) {
        load_row(p.cos, p.table_dtype, cos_at + r * (half / 2), run);
#pragma unroll
        for (int j = 0; j < kRun; j++) cos[r * kRun + j] = run[j];
        load_row(p.sin, p.table_dtype, sin_at + r * (half / 2), run);
#pragma unroll
        for (int j = 0; j < kRun; j++) sin[r * kRun + j] = run[j];
      }
    }
    if (p.transposed) {
#pragma unroll
      for (int j = 0; j < W; j++) sin[j] = -sin[j];
    }
  }

  // Turns the pairs of both vectors. Where the table has no row: NaN, or a gradient of 0.
  __device__ void turn(const RopeParams& p, float (&a)[W], float (&b)[W]) const {
    // Spelled out, so that vectors of every width fuse the same product and give the same bits.
    auto pair = [&](float& x, float& y, int j) {
      const float turned = __fmaf_rn(x, cos[j], -__fmul_rn(y, sin[j]));
      y = __fmaf_rn(y, cos[j], __fmul_rn(x, sin[j]));
      x = turned;
    };
    if (bad) {
      const float fault = p.transposed ? 0.f : __int_as_float(0x7fc00000);
#pragma unroll
      for (int j = 0; j < W; j++) a[j] = b[j] = fault;
    } else if constexpr (kInterleaved && W > 1) {
#pragma unroll
      for (int j = 0; j < kRun; j++) {
        pair(a[2 * j], a[2 * j + 1], j);
        pair(b[2 * j], b[2 * j + 1], kRun + j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < W; j++) pair(a[j], b[j], j);
    }
  }
};

// ---- Launching a kernel(params, launch, first batch row) over the grid of rope_launch.h.

template <auto kKernel, typename Params>
void launch_rope(const Params& params, const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  const int tokens = launch.tokens_per_block, slots = launch.slots_per_block;
  const dim3 block(launch.lanes_per_block, launch.token_inner ? tokens : slots, launch.token_inner ? slots : tokens);
  const int shared = p.cu_seqlens ? tokens * int(sizeof(int64_t)) : 0;
  constexpr int64_t kMostBatch = 65535;
  for (int64_t first = 0; first < p.batch; first += kMostBatch) {
    const dim3 grid(unsigned(launch.token_blocks), launch.lane_chunks * launch.slot_chunks,
                    unsigned(std::min(kMostBatch, p.batch - first)));
    packops::launch(kKernel, grid, block, shared, stream, params, launch, first);
  }
}

}  // namespace packops

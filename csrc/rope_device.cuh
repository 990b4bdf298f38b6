// What rope.cu and qk_norm_rope.cu share on the device: positions, heads, rows of the table, the rotation, and the launch.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "rope.h"
#include "rope_launch.h"

namespace packops {

inline namespace on_device {  // see vec.cuh
__device__ inline float to_float(double x) { return float(x); }
}  // namespace on_device

// ---- Float tables: cosines and sines, weights of a norm. A thread issues all its loads before it converts the first value: a
// conversion waits for its load, and would delay every later load.

// How a table is read. The same for all its rows, so decided once.
struct TableFormat {
  DType dtype;
  bool vectors;  // else number by number, converted at once: fp64, runs that are not aligned, or numbers that are not neighbours
  int step;      // from one number of a run to the next

  // For runs of N numbers. addresses: of the tables; strides: between runs, in numbers. Several are ored: only low bits matter.
  template <int N>
  static __device__ TableFormat of(DType dtype, uintptr_t addresses, int64_t strides, int step = 1) {
    const uint32_t size = dtype == DType::f32 ? 4 : 2, vector = N * size < 16 ? N * size : 16;
    return {dtype, dtype != DType::f64 && step == 1 && (uint32_t(addresses) | uint32_t(strides) * size) % vector == 0, step};
  }
};

// N numbers of a row of a table, format.step columns apart.
template <int N>
struct TableRun {
  uint32_t words[N];  // raw, 16-bit numbers packed into the first half of the words; or floats, if read number by number

  __device__ void load(const void* table, TableFormat format, int64_t i) {
    if (!format.vectors) {
      switch (format.dtype) {
        case DType::f32: return load_numbers(static_cast<const float*>(table) + i, format.step);
        case DType::bf16: return load_numbers(static_cast<const bf16_t*>(table) + i, format.step);
        case DType::f16: return load_numbers(static_cast<const half_t*>(table) + i, format.step);
        default: return load_numbers(static_cast<const double*>(table) + i, format.step);
      }
    }
    if (format.dtype == DType::f32) load_vectors<N * 4>(static_cast<const float*>(table) + i);
    else load_vectors<N * 2>(static_cast<const uint16_t*>(table) + i);
  }

  __device__ void to_floats(TableFormat format, float (&out)[N]) const {
    if (!format.vectors || format.dtype == DType::f32) {
#pragma unroll
      for (int j = 0; j < N; j++) out[j] = __uint_as_float(words[j]);
    } else if (format.dtype == DType::bf16) {
      unpack_halves(bf16_t{}, out);
    } else {
      unpack_halves(half_t{}, out);
    }
  }

 private:
  template <typename T>
  __device__ void load_numbers(const T* p, int step) {
#pragma unroll
    for (int j = 0; j < N; j++) words[j] = __float_as_uint(to_float(p[j * step]));
  }
  template <int kBytes>
  __device__ void load_vectors(const void* p) {
    constexpr int kStep = kBytes < 16 ? kBytes : 16;
    using Storage = typename Bits<kStep>::type;
#pragma unroll
    for (int i = 0; i < kBytes / kStep; i++) {
      const Storage bits = __ldg(static_cast<const Storage*>(p) + i);
      if constexpr (kStep == 16) {
        words[4 * i] = bits.x, words[4 * i + 1] = bits.y, words[4 * i + 2] = bits.z, words[4 * i + 3] = bits.w;
      } else if constexpr (kStep == 8) {
        words[0] = bits.x, words[1] = bits.y;
      } else {
        words[0] = bits;
      }
    }
  }
  template <typename T>
  __device__ void unpack_halves(T, float (&out)[N]) const {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const float2 pair = unpack2(words[j / 2], T{});
      out[j] = pair.x;
      if (j + 1 < N) out[j + 1] = pair.y;
    }
  }
};

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

// Not positions. kOutside: the token belongs to no document and is not rotated. kBad: the table has no such row.
constexpr int64_t kOutside = -1, kBad = -2;

// The start of the document of token t, or kOutside. A warp searches together for one t, 32 places at a time. Invariant:
// cu[low] <= t < cu[high]. Whatever cu_seqlens holds, only its entries are read.
__device__ inline int64_t document_start(const RopeParams& p, int64_t t, int lane) {
  auto bound = [&](int64_t i) { return boundary(p.axis, i); };
  if (t >= bound(p.axis.documents) || t < bound(0)) return kOutside;
  int64_t low = 0, high = p.axis.documents;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, probe = low + lane * step;
    const unsigned below = __ballot_sync(~0u, probe < high && bound(probe) <= t);
    const int last = below ? 31 - __clz(below) : 0;
    high = min(high, low + (last + 1) * step);
    low += last * step;
  }
  return bound(low);
}

// Fills start_of[0, count) for the tokens from `first` on. Called by all `threads` of the block; a barrier must follow.
__device__ inline void find_documents(const RopeParams& p, int64_t first, int count, int64_t* start_of, int thread, int threads) {
  const int64_t last = p.batch * p.tokens - 1;
  const int warps = threads / 32, warp = thread / 32, lane = thread % 32;
  if (warp == warps) return;  // not a whole warp
  for (int i = warp; i < count; i += warps) {
    const int64_t start = document_start(p, min(first + i, last), lane);
    if (lane == 0) start_of[i] = start;
  }
}

// The table rows of a token, one per axis. The first is kOutside for padding, or kBad if any of them is. start: of the token's
// document, with cu_seqlens. Load after the heads: loads awaited in a later block share a scoreboard, so an earlier load would
// complete with the last head, and the rows of the table would follow a full latency later.
template <bool kMrope>
struct RopePosition {
  static constexpr int kAxes = kMrope ? 3 : 1;
  int64_t row[kAxes];

  __device__ RopePosition(const RopeParams& p, RopeToken at, int64_t start) {
    if (kMrope) at.token = min(at.token, p.tokens - 1);  // threads past the last token help with the table, too
    const auto checked = [&](int64_t x) { return x >= 0 && x < p.table_rows ? x : kBad; };
    if (p.axis.cu_seqlens && start == kOutside) {
      row[0] = kOutside;
    } else if (p.per_token_table) {
      row[0] = at.token;
    } else if (p.position_ids) {
      const int64_t i = at.batch * p.position_batch + at.token * p.position_token;
#pragma unroll
      for (int axis = 0; axis < kAxes; axis++)
        row[axis] = integer_at(p.position_ids, p.position_dtype, i + axis * p.position_axis);
#pragma unroll
      for (int axis = 0; axis < kAxes; axis++)
        if (checked(row[axis]) == kBad) row[0] = kBad;
    } else {
      row[0] = checked(p.axis.cu_seqlens ? at.batch * p.tokens + at.token - start : at.token);
    }
  }
  __device__ bool outside() const { return row[0] == kOutside; }
};

// The heads of a slot (see rope_launch.h): neighbouring heads of q, or of k.
struct RopeSlot {
  RopeHeads side;
  int head, count;
  bool is_q;
};

__device__ inline RopeSlot rope_slot(const RopeParams& p, const RopeLaunch& launch, int slot) {
  const bool is_q = slot < launch.q_slots;
  const RopeHeads side = is_q ? p.q : p.k;
  const int head = (is_q ? slot : slot - launch.q_slots) * launch.unroll;
  return {side, head, min(launch.unroll, int(side.heads) - head), is_q};
}

// The heads of a thread of rope_kernel: one of q or k, and those `slots of that side` further on, so that neighbouring threads
// have neighbouring heads. q or k is chosen number by number: choosing a struct would load its members by a pointer, one more
// latency before the first head. kNarrow: strides fit into 31 bits, so a product is one instruction.
template <typename T, bool kNarrow>
struct RopeSlots {
  using Stride = std::conditional_t<kNarrow, int32_t, int64_t>;
  bool is_q;
  int slot, slots, heads;

  __device__ RopeSlots(const RopeParams& p, const RopeLaunch& launch, int of_token)
      : is_q(of_token < launch.q_slots),
        slot(is_q ? of_token : of_token - launch.q_slots),
        slots(is_q ? launch.q_slots : launch.slots - launch.q_slots),
        heads(is_q ? int(p.q.heads) : int(p.k.heads)) {}
  __device__ bool has(int u) const { return slot + u * slots < heads; }
  __device__ const T* input(const RopeParams& p, RopeToken at) const {
    const auto* q = static_cast<const T*>(p.q.in) + at.batch * p.q.in_batch;
    const auto* k = static_cast<const T*>(p.k.in) + at.batch * p.k.in_batch;
    return (is_q ? q : k) + (times(at.token, is_q ? p.q.in_token : p.k.in_token) + times(slot, is_q ? p.q.in_head : p.k.in_head));
  }
  __device__ T* output(const RopeParams& p, RopeToken at) const {
    auto* q = static_cast<T*>(p.q.out) + at.batch * p.q.out_batch;
    auto* k = static_cast<T*>(p.k.out) + at.batch * p.k.out_batch;
    return (is_q ? q : k) +
           (times(at.token, is_q ? p.q.out_token : p.k.out_token) + times(slot, is_q ? p.q.out_head : p.k.out_head));
  }
  // Elements from one of the thread's heads to the next.
  __device__ int64_t input_step(const RopeParams& p) const { return times(slots, is_q ? p.q.in_head : p.k.in_head); }
  __device__ int64_t output_step(const RopeParams& p) const { return times(slots, is_q ? p.q.out_head : p.k.out_head); }

 private:
  static __device__ int64_t times(int64_t count, int64_t stride) { return int64_t(Stride(count)) * Stride(stride); }
};

template <typename T>
__device__ inline const T* head_in(const RopeHeads& side, RopeToken at, int head) {
  return static_cast<const T*>(side.in) + at.batch * side.in_batch + at.token * side.in_token + head * side.in_head;
}
template <typename T>
__device__ inline T* head_out(const RopeHeads& side, RopeToken at, int head) {
  return static_cast<T*>(side.out) + at.batch * side.out_batch + at.token * side.out_token + head * side.out_head;
}

// ---- Lanes. A lane of a head is two vectors of W features, R / 2 apart. Half pairs are the vectors' elements of one index.
// Interleaved pairs lie inside the vectors, so that both kinds access memory alike. Only for W = 1 is an interleaved pair two
// neighbours.

struct RopeLane {
  int a, b;           // where the vectors start
  bool turns, has_b;  // a lane that only copies features may have one vector
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

// The cosines and sines of a lane of a token in shared memory, aligned as vectors.
struct RopeShared {
  float *cos, *sin;
};

template <int W, bool kInterleaved>
struct RopeCoefficients {
  static constexpr int kRun = kInterleaved && W > 1 ? W / 2 : W;  // consecutive pairs
  float cos[W], sin[W];
  bool bad;  // the table has no such row

  static __device__ int first_pair(const RopeParams& p, int lane, int run) { return lane * kRun + run * (p.rotary_dim / 4); }

  static __device__ TableFormat format(const RopeParams& p) {
    return TableFormat::of<kRun>(p.table_dtype, reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin),
                                 p.cos_batch | p.cos_row | p.sin_batch | p.sin_row, p.table_step);
  }

  // position: not outside. With M-RoPE the numbers come from shared memory, where share() put them before a barrier.
  __device__ void load(const RopeParams& p, RopeToken at, const RopePosition<false>& position, int lane, RopeShared) {
    load_rows(p, at, position, lane, format(p));
  }
  __device__ void load_rows(const RopeParams& p, RopeToken at, const RopePosition<false>& position, int lane,
                            TableFormat format) {
    const int64_t row = position.row[0];
    bad = row == kBad;
    if (bad) return;
    constexpr int kRuns = W / kRun;
    const int64_t batch = p.per_token_table ? at.batch : 0, cos_base = batch * p.cos_batch, sin_base = batch * p.sin_batch;
    TableRun<kRun> cos_run[kRuns], sin_run[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; r++) {
      const int column = first_pair(p, lane, r) * format.step;
      cos_run[r].load(p.cos, format, cos_base + row * p.cos_row + column);
      sin_run[r].load(p.sin, format, sin_base + row * p.sin_row + column);
    }
#pragma unroll
    for (int r = 0; r < kRuns; r++) {
      float c[kRun], s[kRun];
      cos_run[r].to_floats(format, c);
      sin_run[r].to_floats(format, s);
#pragma unroll
      for (int j = 0; j < kRun; j++) set(p, r * kRun + j, c[j], s[j]);
    }
  }

  __device__ void load(const RopeParams& p, RopeToken, const RopePosition<true>& position, int, RopeShared shared) {
    bad = position.row[0] == kBad;
    if (bad) return;
    constexpr int kStep = W < 4 ? W : 4;
#pragma unroll
    for (int i = 0; i < W; i += kStep) {
      Vec<float, kStep> c, s;
      c.load(shared.cos + i);
      s.load(shared.sin + i);
#pragma unroll
      for (int j = 0; j < kStep; j++) set(p, i + j, c.element[j], s.element[j]);
    }
  }

  // M-RoPE takes pairs from the rows of three axes, and neighbouring pairs may have different axes, which rules out vectors. So
  // the threads of a token look its pairs up once for all heads of the block: each takes every `step`-th pair of its lane from
  // `first` on.
  static __device__ void share(const RopeParams& p, const RopePosition<true>& position, int lane, RopeShared shared,
                               uint32_t first, uint32_t step) {
    if (position.row[0] < 0 || lane * W >= p.rotary_dim / 2) return;
    for (uint32_t j = first; j < W; j += step) {
      const float2 number = mrope_number(p, position, lane, j);
      shared.cos[j] = number.x;
      shared.sin[j] = number.y;
    }
  }
  // The same without shared memory, for the wide kernels, which are rarely run with M-RoPE.
  __device__ void load_each(const RopeParams& p, const RopePosition<true>& position, int lane) {
    bad = position.row[0] == kBad;
    if (bad) return;
#pragma unroll
    for (int j = 0; j < W; j++) {
      const float2 number = mrope_number(p, position, lane, j);
      set(p, j, number.x, number.y);
    }
  }

  // Rotates the pairs of both vectors. If `bad`, features become fault() instead.
  __device__ void turn(float (&a)[W], float (&b)[W]) const {
    // Explicit fused products: vectors of every width give the same bits.
    auto pair = [&](float& x, float& y, int j) {
      const float turned = __fmaf_rn(x, cos[j], -__fmul_rn(y, sin[j]));
      y = __fmaf_rn(y, cos[j], __fmul_rn(x, sin[j]));
      x = turned;
    };
    if constexpr (kInterleaved && W > 1) {
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
  // Whether the table would be misread (RopeTable): half a table that holds every number twice, or a full-width one with two numbers
  // for the lane's first pair. Asking takes a few latencies, and every thread would find the same. So the first block alone asks,
  // when its work is done, and the others pay nothing, not even registers. A single row may repeat itself by chance, or on the
  // diagonal of an image's patches, whose rows and columns have the same frequencies. So several are asked, neighbours among them.
  static __device__ __noinline__ bool finds_misread(const RopeParams& p, int64_t batch, int lane) {
    if (p.table == RopeTable::half || p.transposed || p.table_rows == 0) return false;
    const int64_t last = p.table_rows - 1;
    const auto sine = [&](int64_t row, int column) {
      TableRun<1> number;
      number.load(p.sin, {p.table_dtype, false, 1},
                  (p.per_token_table ? batch : 0) * p.sin_batch + min(row, last) * p.sin_row + column);
      return __uint_as_float(number.words[0]);
    };
    if (p.table == RopeTable::full) {
      const int column = first_pair(p, lane, 0) * p.table_step, twin = column + (kInterleaved ? 1 : p.rotary_dim / 2);
      bool found = false;
#pragma unroll 1
      for (const int64_t row : {int64_t(1), last}) found |= sine(row, column) != sine(row, twin);
      return found;
    }
    RopeRepetition repetition;
#pragma unroll 1
    for (const int64_t row : {last / 2, last / 2 + 1, int64_t(1), last, max(last - 1, int64_t(0))})
      if (repetition.possible()) repetition.add_row(p.rotary_dim / 2, [&](int i) { return sine(row, i); });
    return repetition.found();
  }

  // NaN, or a gradient of 0.
  static __device__ float fault(const RopeParams& p) { return p.transposed ? 0.f : __int_as_float(0x7fc00000); }

 private:
  __device__ void set(const RopeParams& p, int j, float c, float s) {
    cos[j] = c;
    sin[j] = p.transposed ? -s : s;
  }
  // Cosine and sine of a lane's pair j. No branch here, so the wait covers these loads only (see RopePosition).
  static __device__ float2 mrope_number(const RopeParams& p, const RopePosition<true>& position, int lane, uint32_t j) {
    const int pair = first_pair(p, lane, j / kRun) + j % kRun, axis = rope_mrope_axis(p, pair);
    const int64_t row = axis == 0 ? position.row[0] : axis == 1 ? position.row[1] : position.row[2];
    const int column = pair * p.table_step;
    const int64_t c = row * p.cos_row + column, s = row * p.sin_row + column;
    if (p.table_dtype == DType::f64)
      return {to_float(static_cast<const double*>(p.cos)[c]), to_float(static_cast<const double*>(p.sin)[s])};
    const auto bits = [&](const void* table, int64_t i) -> uint32_t {
      return p.table_dtype == DType::f32 ? __ldg(static_cast<const uint32_t*>(table) + i)
                                         : __ldg(static_cast<const uint16_t*>(table) + i);
    };
    const auto number = [&](uint32_t x) {
      const float of_bf16 = unpack2(x, bf16_t{}).x, of_half = unpack2(x, half_t{}).x;
      return p.table_dtype == DType::f32 ? __uint_as_float(x) : p.table_dtype == DType::bf16 ? of_bf16 : of_half;
    };
    const uint32_t cos_bits = bits(p.cos, c), sin_bits = bits(p.sin, s);
    return {number(cos_bits), number(sin_bits)};
  }
};

// ---- Launching a kernel(params, launch, first batch row) over the grid of rope_launch.h.

template <auto kKernel, typename Params>
void launch_rope(const Params& params, const RopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  const int tokens = launch.tokens_per_block, slots = launch.slots_per_block;
  const dim3 block(launch.lanes_per_block, launch.token_inner ? tokens : slots, launch.token_inner ? slots : tokens);
  const int shared = rope_shared_bytes(p, launch);
  constexpr int64_t kMostBatch = 65535;
  for (int64_t first = 0; first < p.batch; first += kMostBatch) {
    const dim3 grid(unsigned(launch.token_blocks), launch.lane_chunks * launch.slot_chunks,
                    unsigned(std::min(kMostBatch, p.batch - first)));
    packops::launch(kKernel, grid, block, shared, stream, params, launch, first);
  }
}

}  // namespace packops

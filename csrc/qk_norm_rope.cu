// RMS norm + RoPE on CUDA, forward and backward: formulas in qk_norm_rope.h.
//
// Bound: memory. Forward reads and writes every head once, 2 (Hq + Hk) D element_size bytes per token; backward reads x and g and
// writes dx, 3 (Hq + Hk) D element_size. The mean of squares is computed again in the backward pass, which has x at hand, rather
// than stored. Weight gradients: each block keeps fp32 sums of its tokens and leaves them as one row of partials; a second, tiny
// kernel adds the rows in a fixed order. No atomics, so the same bits at every run.
//
// Layout: see qk_norm_rope_launch.h. The forward kernel is that of rope.cu with a sum over the threads of a head in the middle.
// It issues the loads of heads, weights, positions and table rows before it uses any of them; so does each round of the backward
// kernel. The sums of all heads of a thread are reduced together, and the floats are unpacked again afterwards (forget) to save
// registers.
#include "qk_norm_rope.h"

#include "common/device.cuh"
#include "common/partials.cuh"
#include "qk_norm_rope_launch.h"
#include "rope_device.cuh"

namespace packops {
namespace {

// q or k, as its blocks see it.
struct Job {
  RopeHeads x, grad;
  const void* weight;
  float* partial;
  int64_t block, blocks;  // index and number of this job's blocks
};

__device__ inline Job job_of(const QkNormRopeParams& p, const QkNormRopeLaunch& launch) {
  if (blockIdx.x < launch.q_blocks)
    return {p.rope.q, p.q_grad, p.q_weight, static_cast<float*>(p.q_partial), blockIdx.x, launch.q_blocks};
  return {p.rope.k,       p.k_grad, p.k_weight, static_cast<float*>(p.k_partial), int64_t(blockIdx.x) - launch.q_blocks,
          launch.k_blocks};
}

// The norm's weights at the two vectors of a lane.
template <int W>
class NormWeights {
 public:
  explicit __device__ NormWeights(const QkNormRopeParams& p) : zero_centered(p.zero_centered) {
    format =
        TableFormat::of<W>(p.weight_dtype, reinterpret_cast<uintptr_t>(p.q_weight) | reinterpret_cast<uintptr_t>(p.k_weight), 0);
  }
  // first: index of the head's first weight.
  __device__ void load(const void* weight, int64_t first, RopeLane place) {
    run_a.load(weight, format, first + place.a);
    if (place.has_b) run_b.load(weight, format, first + place.b);
  }
  __device__ void to_floats(RopeLane place, float (&a)[W], float (&b)[W]) const {
    run_a.to_floats(format, a);
    run_b.to_floats(format, b);
#pragma unroll
    for (int j = 0; j < W; j++) {
      if (zero_centered) a[j] += 1.f, b[j] += 1.f;
      if (!place.has_b) b[j] = 0.f;
    }
  }

 private:
  bool zero_centered;
  TableFormat format;
  TableRun<W> run_a, run_b;
};

template <int W>
__device__ inline float dot(const float (&a)[W], const float (&b)[W]) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < W; j++) sum += a[j] * b[j];
  return sum;
}

// N sums over a group of threads, interleaved: one after the other would take N times the latency.
template <int N>
__device__ inline void group_sum(float (&x)[N], int group) {
  for (int step = group / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(~0u, x[i], step);
  }
}

// ---- Narrow: a head lies in the registers of a group of threads of one warp.

template <typename T, int W, bool kInterleaved, bool kMrope, int kUnroll>
__global__ void __launch_bounds__(2 * kNormBlockThreads, 2)  // 96 registers
    qk_norm_rope_forward_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ RopeLaunch launch,
                                const int64_t first_batch) {
  // As in rope.cu.
  auto* numbers = dynamic_shared<float>();
  const int sines = kMrope ? launch.tokens_per_block * launch.lanes_per_block * W : 0;
  auto* start_of = reinterpret_cast<int64_t*>(numbers + 2 * sines);
  const RopeParams& rope = p.rope;
  const int lane = threadIdx.x, group = launch.lanes_per_block;
  const int local = launch.token_inner ? threadIdx.y : threadIdx.z;
  const int slot_in_block = launch.token_inner ? threadIdx.z : threadIdx.y;
  const int slot = blockIdx.y * launch.slots_per_block + slot_in_block;
  const int64_t first = int64_t(blockIdx.x) * launch.tokens_per_block;
  const RopeToken at{first_batch + blockIdx.z, first + local};
  const bool active = at.token < rope.tokens && slot < launch.slots && lane < launch.lanes;
  const RopeLane place = rope_lane<W, kInterleaved>(rope, min(lane, launch.lanes - 1), launch.lanes);
  const RopeSlot heads = rope_slot(rope, launch, slot);

  Vec<T, W> xa[kUnroll], xb[kUnroll];
  NormWeights<W> weights(p);
  const T* x = head_in<T>(heads.side, at, heads.head);
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    xa[u].fill(0.f);
    xb[u].fill(0.f);
    if (active && u < heads.count) xa[u].load_streaming(x + u * heads.side.in_head + place.a);
    if (active && u < heads.count && place.has_b) xb[u].load_streaming(x + u * heads.side.in_head + place.b);
  }
  if (active) weights.load(heads.is_q ? p.q_weight : p.k_weight, 0, place);
  if (rope.axis.cu_seqlens) {
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    find_documents(rope, at.batch * rope.tokens + first, launch.tokens_per_block, start_of, thread, launch.threads());
    __syncthreads();
  }
  bool outside = true, turns = false;
  RopeCoefficients<W, kInterleaved> coefficients;
  if (kMrope || active) {
    const RopePosition<kMrope> position(rope, at, rope.axis.cu_seqlens ? start_of[local] : 0);
    numbers += (local * launch.lanes_per_block + lane) * W;
    const RopeShared shared{numbers, numbers + sines};
    if constexpr (kMrope) {
      coefficients.share(rope, position, lane, shared, slot_in_block, launch.slots_per_block);
      __syncthreads();
    }
    outside = !active || position.outside();
    turns = place.turns && !outside;
    if (turns) coefficients.load(rope, at, position, lane, shared);
  }

  float square[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    float a[W], b[W];
    xa[u].to_floats(a);
    xb[u].to_floats(b);
    square[u] = dot(a, a) + dot(b, b);
    forget(xa[u].bits);
    forget(xb[u].bits);
  }
  group_sum(square, group);

  const float inverse_dim = 1.f / rope.head_dim, eps = float(p.eps);  // after the loads: a division takes time
  if (!outside) {
    float weight_a[W], weight_b[W];
    weights.to_floats(place, weight_a, weight_b);
    if (turns && coefficients.bad) {
      turns = false;
#pragma unroll
      for (int j = 0; j < W; j++) weight_a[j] = weight_b[j] = coefficients.fault(rope);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      float a[W], b[W];
      xa[u].to_floats(a);
      xb[u].to_floats(b);
      const float r = rsqrtf(square[u] * inverse_dim + eps);
#pragma unroll
      for (int j = 0; j < W; j++) {
        a[j] *= r * weight_a[j];
        b[j] *= r * weight_b[j];
      }
      if (turns) coefficients.turn(a, b);
      xa[u].from_floats(a);
      xb[u].from_floats(b);
    }
  }

  if (!active) return;
  T* y = head_out<T>(heads.side, at, heads.head);
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    if (u < heads.count) xa[u].store_streaming(y + u * heads.side.out_head + place.a);
    if (u < heads.count && place.has_b) xb[u].store_streaming(y + u * heads.side.out_head + place.b);
  }
  if (blockIdx.x == 0 && place.turns && !outside && coefficients.finds_misread(rope, at.batch, lane)) {
    xa[0].fill(coefficients.fault(rope));
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (u >= heads.count) continue;
      xa[0].store_streaming(y + u * heads.side.out_head + place.a);
      xa[0].store_streaming(y + u * heads.side.out_head + place.b);
    }
  }
}

template <typename T, bool kInterleaved, bool kMrope, int kUnroll>
__global__ void __launch_bounds__(128, qk_norm_narrow_blocks(sizeof(T)))
    qk_norm_rope_backward_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ QkNormRopeLaunch launch) {
  constexpr int W = 4;
  auto* numbers = dynamic_shared<float>();
  const int sines = kMrope ? launch.threads * W : 0;
  auto* start_of = reinterpret_cast<int64_t*>(numbers + 2 * sines);
  const Job job = job_of(p, launch);
  const RopeParams& rope = p.rope;
  const int heads = int(job.x.heads), slots = (heads + kUnroll - 1) / kUnroll, groups = launch.threads / launch.group;
  const int slots_per_block = min(slots, groups), chunks = (slots + slots_per_block - 1) / slots_per_block;
  const int tokens_per_block = groups / slots_per_block;
  const int lane = threadIdx.x % launch.group, in_block = threadIdx.x / launch.group;
  const int local = in_block / slots_per_block, slot_in_chunk = in_block % slots_per_block;
  const bool has_lane = lane < launch.lanes;
  const RopeLane place = rope_lane<W, kInterleaved>(rope, has_lane ? lane : 0, launch.lanes);
  const bool has_b = has_lane && place.has_b;
  const int64_t tokens = rope.batch * rope.tokens;
  const float inverse_dim = 1.f / rope.head_dim, eps = float(p.eps);

  float weight_a[W] = {}, weight_b[W] = {}, sum_a[W] = {}, sum_b[W] = {};
  if (has_lane) {
    NormWeights<W> weights(p);
    weights.load(job.weight, 0, place);
    weights.to_floats(place, weight_a, weight_b);
  }

  // From one of the thread's heads to the next, and from the first vector of a head to the second.
  const int64_t x_step = slots * job.x.in_head, g_step = slots * job.grad.in_head, y_step = slots * job.x.out_head;
  const int to_b = place.b - place.a;

  // Block i takes chunks i, i + blocks, ... of the chunks of all tokens.
  const int blocks = int(job.blocks), step = blocks / chunks * tokens_per_block, chunk_step = blocks % chunks;
  int chunk = int(job.block) % chunks;
  int64_t first = int(job.block) / chunks * tokens_per_block;
  while (first < tokens) {
    const int64_t t = first + local;
    const int slot = chunk * slots_per_block + slot_in_chunk;
    const bool has_token = local < tokens_per_block && t < tokens, active = has_token && has_lane && slot < slots;
    const RopeToken at = has_token ? rope_token(rope, t) : RopeToken{0, 0};

    Vec<T, W> xa[kUnroll], xb[kUnroll], ga[kUnroll], gb[kUnroll];
    const T *x = head_in<T>(job.x, at, slot) + place.a, *g = head_in<T>(job.grad, at, slot) + place.a;
#pragma unroll
    for (int u = 0; u < kUnroll; u++, x += x_step, g += g_step) {
      xa[u].fill(0.f);
      xb[u].fill(0.f);
      ga[u].fill(0.f);
      gb[u].fill(0.f);
      if (active && slot + u * slots < heads) {
        xa[u].load_streaming(x);
        ga[u].load_streaming(g);
        if (has_b) {
          xb[u].load_streaming(x + to_b);
          gb[u].load_streaming(g + to_b);
        }
      }
    }

    if (kMrope || rope.axis.cu_seqlens) __syncthreads();  // what the previous round shared has been read
    if (rope.axis.cu_seqlens) {
      find_documents(rope, first, tokens_per_block, start_of, threadIdx.x, launch.threads);
      __syncthreads();
    }
    bool outside = true, turns = false;
    RopeCoefficients<W, kInterleaved> coefficients;
    if (kMrope || active) {
      const RopePosition<kMrope> position(rope, at, rope.axis.cu_seqlens && has_token ? start_of[local] : 0);
      float* mine = numbers + (local * launch.group + lane) * W;
      const RopeShared shared{mine, mine + sines};
      if constexpr (kMrope) {
        if (has_token) coefficients.share(rope, position, lane, shared, slot_in_chunk, slots_per_block);
        __syncthreads();
      }
      outside = !active || position.outside();
      turns = place.turns && !outside;
      if (turns) coefficients.load(rope, at, position, lane, shared);
    }

    if (turns && coefficients.bad) {
      turns = false;
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        ga[u].fill(coefficients.fault(rope));
        gb[u].fill(coefficients.fault(rope));
      }
    }

    T* y = head_out<T>(job.x, at, slot) + place.a;
#pragma unroll
    for (int u = 0; u < kUnroll; u++, y += y_step) {
      float a[W], b[W], ha[W], hb[W];
      xa[u].to_floats(a);
      xb[u].to_floats(b);
      ga[u].to_floats(ha);
      gb[u].to_floats(hb);
      if (turns) coefficients.turn(ha, hb);
      // mean(h w n) = r mean(h w x), so both sums are reduced together.
      float sums[2] = {dot(a, a) + dot(b, b), 0.f};
#pragma unroll
      for (int j = 0; j < W; j++) sums[1] = fmaf(ha[j] * weight_a[j], a[j], fmaf(hb[j] * weight_b[j], b[j], sums[1]));
      group_sum(sums, launch.group);
      if (!active || slot + u * slots >= heads) continue;
      // Tokens outside of documents must not reach the weight's gradient, not even as 0 times NaN.
      if (outside) {
        xa[u] = ga[u];
        xb[u] = gb[u];
      } else {
        const float r = rsqrtf(sums[0] * inverse_dim + eps), mean = sums[1] * inverse_dim * r;
#pragma unroll
        for (int j = 0; j < W; j++) {
          a[j] *= r;
          b[j] *= r;
          sum_a[j] += ha[j] * a[j];
          sum_b[j] += hb[j] * b[j];
          a[j] = r * (ha[j] * weight_a[j] - a[j] * mean);
          b[j] = r * (hb[j] * weight_b[j] - b[j] * mean);
        }
        xa[u].from_floats(a);
        xb[u].from_floats(b);
      }
      xa[u].store_streaming(y);
      if (has_b) xb[u].store_streaming(y + to_b);
    }
    first += step;
    chunk += chunk_step;
    if (chunk >= chunks) {
      chunk -= chunks;
      first += tokens_per_block;
    }
  }

  griddepcontrol_launch_dependents();
  // Adds the groups' sums, in the order of the groups.
  __syncthreads();
  if (has_lane) {
    float* mine = numbers + in_block * rope.head_dim;
#pragma unroll
    for (int j = 0; j < W; j++) {
      mine[place.a + j] = sum_a[j];
      if (has_b) mine[place.b + j] = sum_b[j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rope.head_dim; i += blockDim.x) {
    float total = 0.f;
    for (int g = 0; g < groups; g++) total += numbers[g * rope.head_dim + i];
    job.partial[job.block * rope.head_dim + i] = total;
  }
}

// ---- Wide: a block per domain (a head, or all heads of a token), read twice.

// Two sums over the block; every thread gets them. scratch: 64 floats.
__device__ inline float2 block_sum(float x, float y, float* scratch) {
  float sums[] = {x, y};
  group_sum(sums, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = sums[0];
    scratch[32 + threadIdx.x / 32] = sums[1];
  }
  __syncthreads();
  x = y = 0.f;
  for (int w = 0; w < int(blockDim.x) / 32; w++) {
    x += scratch[w];
    y += scratch[32 + w];
  }
  return {x, y};
}

template <typename T, int W, bool kInterleaved, bool kMrope, bool kBackward>
__global__ void __launch_bounds__(256, qk_norm_wide_blocks(kMrope))
    qk_norm_rope_wide_kernel(const __grid_constant__ QkNormRopeParams p, const __grid_constant__ QkNormRopeLaunch launch) {
  __shared__ float scratch[64];
  __shared__ int64_t start_of[1];
  const Job job = job_of(p, launch);
  const RopeParams& rope = p.rope;
  const int heads = int(job.x.heads), domain_heads = p.across_heads ? heads : 1, domains = heads / domain_heads;
  const int items = domain_heads * launch.lanes;
  const int64_t units = rope.batch * rope.tokens * domains, size = int64_t(domain_heads) * rope.head_dim;
  const float inverse_size = 1.f / float(size), eps = float(p.eps);

  // This block's row of partials; each element belongs to one thread.
  float* sums = kBackward ? job.partial + job.block * size : nullptr;
  if constexpr (kBackward) {
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const RopeLane place = rope_lane<W, kInterleaved>(rope, item % launch.lanes, launch.lanes);
      float* mine = sums + item / launch.lanes * rope.head_dim;
      for (int j = 0; j < W; j++) {
        mine[place.a + j] = 0.f;
        if (place.has_b) mine[place.b + j] = 0.f;
      }
    }
  }

  for (int64_t unit = job.block; unit < units; unit += job.blocks) {
    const int64_t t = unit / domains;
    const int first_head = int(unit % domains) * domain_heads;
    const RopeToken at = rope_token(rope, t);
    if (rope.axis.cu_seqlens) {
      __syncthreads();
      find_documents(rope, t, 1, start_of, threadIdx.x, launch.threads);
      __syncthreads();
    }
    const RopePosition<kMrope> position(rope, at, rope.axis.cu_seqlens ? start_of[0] : 0);
    if (position.outside()) {
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
        const int head = first_head + int(i / rope.head_dim), feature = int(i % rope.head_dim);
        head_out<T>(job.x, at, head)[feature] = head_in<T>(kBackward ? job.grad : job.x, at, head)[feature];
      }
      continue;
    }

    // One lane: x, the weight, and the gradient rotated back.
    RopeLane place;
    RopeCoefficients<W, kInterleaved> coefficients;
    float a[W], b[W], weight_a[W], weight_b[W], ha[W], hb[W];
    bool turns;
    auto load = [&](int item) {
      const int head = item / launch.lanes, lane = item % launch.lanes;
      place = rope_lane<W, kInterleaved>(rope, lane, launch.lanes);
      turns = place.turns;
      Vec<T, W> xa, xb, ga, gb;
      xb.fill(0.f);
      gb.fill(0.f);
      const T* x = head_in<T>(job.x, at, first_head + head);
      xa.load(x + place.a);
      if (place.has_b) xb.load(x + place.b);
      if constexpr (kBackward) {
        const T* g = head_in<T>(job.grad, at, first_head + head);
        ga.load(g + place.a);
        if (place.has_b) gb.load(g + place.b);
      }
      NormWeights<W> weights(p);
      weights.load(job.weight, int64_t(head) * rope.head_dim, place);
      if (turns) {
        if constexpr (kMrope) coefficients.load_each(rope, position, lane);
        else coefficients.load(rope, at, position, lane, {});
      }
      xa.to_floats(a);
      xb.to_floats(b);
      weights.to_floats(place, weight_a, weight_b);
      if constexpr (kBackward) {
        ga.to_floats(ha);
        gb.to_floats(hb);
      }
      if (turns && coefficients.bad) {
        turns = false;
        for (float (*faulty)[W] : {kBackward ? &ha : &weight_a, kBackward ? &hb : &weight_b})
          for (float& x : *faulty) x = coefficients.fault(rope);
      }
      if (kBackward && turns) coefficients.turn(ha, hb);
    };

    float squares = 0.f, products = 0.f;
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      load(item);
      squares += dot(a, a) + dot(b, b);
      if constexpr (kBackward) {
#pragma unroll
        for (int j = 0; j < W; j++) products += ha[j] * weight_a[j] * a[j] + hb[j] * weight_b[j] * b[j];
      }
    }
    const float2 total = block_sum(squares, products, scratch);
    const float r = rsqrtf(total.x * inverse_size + eps), mean = total.y * r * inverse_size;

    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      load(item);
      const int head = item / launch.lanes;
      if constexpr (kBackward) {
        float* mine = sums + head * rope.head_dim;
#pragma unroll
        for (int j = 0; j < W; j++) {
          a[j] *= r;
          b[j] *= r;
          mine[place.a + j] += ha[j] * a[j];
          if (place.has_b) mine[place.b + j] += hb[j] * b[j];
          a[j] = r * (ha[j] * weight_a[j] - a[j] * mean);
          b[j] = r * (hb[j] * weight_b[j] - b[j] * mean);
        }
      } else {
#pragma unroll
        for (int j = 0; j < W; j++) {
          a[j] *= r * weight_a[j];
          b[j] *= r * weight_b[j];
        }
        if (turns) coefficients.turn(a, b);
      }
      Vec<T, W> va, vb;
      va.from_floats(a);
      vb.from_floats(b);
      if (at.token == 0 && place.turns && coefficients.finds_misread(rope, at.batch, item % launch.lanes)) {
        va.fill(coefficients.fault(rope));
        vb.fill(coefficients.fault(rope));
      }
      T* y = head_out<T>(job.x, at, first_head + head);
      va.store_streaming(y + place.a);
      if (place.has_b) vb.store_streaming(y + place.b);
    }
  }
}

// ---- Adds rows of partials: block y = 0 for q, 1 for k.

__global__ void __launch_bounds__(kSumColumns* kSumRows) weight_gradient_kernel(const __grid_constant__ QkNormRopeParams p) {
  griddepcontrol_wait();
  const bool is_q = blockIdx.y == 0;
  add_partials(static_cast<const float*>(is_q ? p.q_partial : p.k_partial), is_q ? p.q_partials : p.k_partials,
               qk_norm_weight_size(p, is_q ? p.rope.q : p.rope.k), is_q ? p.q_weight_grad : p.k_weight_grad, p.weight_dtype);
}

// ---- Launchers.

template <typename T, int W, bool kInterleaved, bool kMrope>
void launch_forward(const QkNormRopeParams& p, const RopeLaunch& launch, cudaStream_t stream) {
  if constexpr (W * sizeof(T) == 16) {
    if (launch.unroll == 4)
      return launch_rope<qk_norm_rope_forward_kernel<T, W, kInterleaved, kMrope, 4>>(p, p.rope, launch, stream);
    if (launch.unroll == 2)
      return launch_rope<qk_norm_rope_forward_kernel<T, W, kInterleaved, kMrope, 2>>(p, p.rope, launch, stream);
  }
  launch_rope<qk_norm_rope_forward_kernel<T, W, kInterleaved, kMrope, 1>>(p, p.rope, launch, stream);
}

template <typename T, int W, bool kInterleaved, bool kMrope>
void launch_wide(const QkNormRopeParams& p, const QkNormRopeLaunch& launch, cudaStream_t stream) {
  const unsigned blocks = unsigned(launch.q_blocks + launch.k_blocks);
  if (p.backward())
    packops::launch(qk_norm_rope_wide_kernel<T, W, kInterleaved, kMrope, true>, blocks, launch.threads, 0, stream, p, launch);
  else packops::launch(qk_norm_rope_wide_kernel<T, W, kInterleaved, kMrope, false>, blocks, launch.threads, 0, stream, p, launch);
}

template <typename T, bool kInterleaved, bool kMrope>
void launch_backward(const QkNormRopeParams& p, const QkNormRopeLaunch& launch, cudaStream_t stream) {
  const int groups = launch.threads / launch.group;
  const int shared =
      std::max(groups * p.rope.head_dim * int(sizeof(float)),
               (kMrope ? 2 * launch.threads * launch.width * int(sizeof(float)) : 0) + groups * int(sizeof(int64_t)));
  packops::launch(qk_norm_rope_backward_kernel<T, kInterleaved, kMrope, qk_norm_narrow_unroll(sizeof(T))>,
                  unsigned(launch.q_blocks + launch.k_blocks), launch.threads, shared, stream, p, launch);
}

template <typename T, bool kInterleaved, bool kMrope>
void launch_kernel(const QkNormRopeParams& p, const QkNormRopeLaunch& launch, cudaStream_t stream) {
  if (!launch.narrow) {
    if (launch.width == 1) return launch_wide<T, 1, kInterleaved, kMrope>(p, launch, stream);
    return launch_wide<T, 4, kInterleaved, kMrope>(p, launch, stream);
  }
  if (p.backward()) return launch_backward<T, kInterleaved, kMrope>(p, launch, stream);
  if constexpr (sizeof(T) == 2)
    if (launch.forward.width == 8) return launch_forward<T, 8, kInterleaved, kMrope>(p, launch.forward, stream);
  launch_forward<T, 4, kInterleaved, kMrope>(p, launch.forward, stream);
}

template <typename T>
void launch_pairs(const QkNormRopeParams& p, const QkNormRopeLaunch& launch, cudaStream_t stream) {
  const bool mrope = p.rope.mrope;
  if (p.rope.interleaved)
    return mrope ? launch_kernel<T, true, true>(p, launch, stream) : launch_kernel<T, true, false>(p, launch, stream);
  return mrope ? launch_kernel<T, false, true>(p, launch, stream) : launch_kernel<T, false, false>(p, launch, stream);
}

}  // namespace

cudaError_t qk_norm_rope_cuda_partials(QkNormRopeParams& p) {
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  const QkNormRopeLaunch launch = choose_qk_norm_rope_launch(p, device);
  p.q_partials = launch.q_blocks;
  p.k_partials = launch.k_blocks;
  return cudaSuccess;
}

cudaError_t qk_norm_rope_cuda(const QkNormRopeParams& p, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  const QkNormRopeLaunch launch = choose_qk_norm_rope_launch(p, device);
  const bool has_rows = launch.q_blocks + launch.k_blocks > 0;
  if (has_rows) dispatch_float<false>(p.rope.dtype, [&](auto type) { launch_pairs<decltype(type)>(p, launch, stream); });
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess || !p.backward()) return error;
  const int64_t columns = std::max(qk_norm_weight_size(p, p.rope.q), p.k_weight ? qk_norm_weight_size(p, p.rope.k) : 0);
  return launch_with({.follows = has_rows && device.overlaps_launches()}, weight_gradient_kernel,
                     dim3(blocks_for_partials(columns), p.k_weight ? 2 : 1), dim3(kSumColumns * kSumRows), 0, stream, p);
}

}  // namespace packops

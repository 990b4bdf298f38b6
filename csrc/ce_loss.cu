// Cross entropy on CUDA: the interface and the formulas of ce_loss.h.
//
// Bytes of device memory per bf16 logit: 2 for the loss; 4 for loss and gradient (read once, written once); 2 in an ignored row
// (the zeros of its gradient). The bound is memory bandwidth: the design keeps loads in flight.
//
// 1. prepare (ce_loss_prepare.cuh): each row's target and scale, and an order of the rows in which counted rows come first, so
// that
//    the work is balanced wherever the ignored rows are.
// 2. rows, one of three kernels (ce_loss_launch.h chooses, ce_loss_maths.cuh has the maths):
//    staged: two rows fit into an SM's shared memory. A block keeps its row there between the pass that reduces it and the pass
//    that
//      writes its gradient, while other blocks of the SM load.
//    resident (ce_loss_resident.cuh): longer rows, sm_90. Persistent clusters of blocks share a row, in rings of shared memory.
//    streaming: every architecture, and rows that no cluster can hold. A block reads its row twice, the second time from the L2
//    if
//      that is large enough.
// 3. reduce: the sum of the rows' losses, in a fixed order.
// These launches overlap where device and code allow it: see griddepcontrol_wait.
//
// All reductions are fixed trees: the bits of a row depend on the row alone.
#include "ce_loss.h"

#include <atomic>
#include <type_traits>

#include "ce_loss_launch.h"
#include "ce_loss_prepare.cuh"
#include "ce_loss_resident.cuh"
#include "common/device.cuh"
#include "common/launch.cuh"

namespace packops {
namespace {

// ----------------------------------------------------------------------------------------------------------- reduce

__global__ void __launch_bounds__(kTile) reduce_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kTile / 32];
  griddepcontrol_wait();
  float sum = 0;
#pragma unroll 4
  for (int64_t t = threadIdx.x; t < p.rows; t += kTile) {
    // All three are loaded at once: after a branch, the second would wait for the first.
    const float loss = state(p.scale, t) * state(p.row_loss, t);
    sum += p.target[t] == kIgnored ? 0.f : loss;
  }
  sum = block_reduce<kTile>(sum, 0.f, Add<float>{}, scratch);
  if (threadIdx.x == 0) state(p.loss, 0) = sum;
}

// The loss of each document, for the statistics. One block per document.
__global__ void __launch_bounds__(kTile) sequence_loss_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kTile / 32];
  const Workspace w(p);
  griddepcontrol_wait();
  for (int64_t d = blockIdx.x; d < p.axis.documents; d += gridDim.x) {
    float sum = 0;
    const int64_t end = bound(p, d + 1);
    for (int64_t t = bound(p, d) + threadIdx.x; t < end; t += kTile)
      sum += p.target[t] == kIgnored ? 0.f : token_weight(p, t) * state(p.row_loss, t);
    sum = block_reduce<kTile>(sum, 0.f, Add<float>{}, scratch);
    if (threadIdx.x == 0) state(p.sequence_loss, d) = sum * w.document_inverse[d];
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------------------- shards

// sum_c w_c over the classes of all shards. Every thread of the block gets it.
template <int kThreads>
__device__ __forceinline__ float sum_class_weights(const CeLossParams& p, float (&scratch)[kThreads / 32]) {
  if (!p.class_weight) return float(class_count(p));
  float sum = 0;
  for (int64_t c = threadIdx.x; c < class_count(p); c += kThreads) sum += class_weight(p, c - p.first_class);
  return block_reduce<kThreads>(sum, 0.f, Add<float>{}, scratch);
}

constexpr int kCombineThreads = 128;

// Combines the shards' partial results into each row's state and loss, one thread per row. Always in the order of the shards, so
// every process gets the same bits.
template <typename T, int kFeatures>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ CeLossParams p) {
  __shared__ float scratch[kCombineThreads / 32];
  const RowMaths<T, kFeatures> maths(p, kFeatures & kUniform ? sum_class_weights<kCombineThreads>(p, scratch) : 0.f);
  const int64_t t = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (t >= p.rows) return;
  const int32_t target = p.target[t];
  if (target < 0) return write_ignored_row(p, t, target);
  const auto* shards = static_cast<const float*>(p.partials);
  const int64_t size = partial_size(p);
  PlainPartial<T> row;
  float end = 0;
  bool in_order = true;
  for (int64_t s = 0; s < p.shards; s++) {
    const float* shard = shards + s * size;
    row.max = fmaxf(row.max, shard[kPartialMax * p.rows + t]);
    row.weighted += shard[kPartialWeighted * p.rows + t];
    row.target += shard[kPartialTarget * p.rows + t];  // 0 but in one shard
    in_order = in_order && shard[size - 2] == end;
    end += shard[size - 1];
  }
  for (int64_t s = 0; s < p.shards; s++) {
    const float* shard = shards + s * size;
    row.sum += shard[kPartialSum * p.rows + t] * RowExp<T>::ratio(shard[kPartialMax * p.rows + t], row.max);
  }
  if (!in_order || end != float(class_count(p))) row.sum = NAN;
  write_row<kFeatures>(p, maths, t, row, column_of(p, target));
}

// ----------------------------------------------------------------------------------------------------------- staged

// A block keeps its row in shared memory: loss and gradient from one read. A thread copies only the vectors that it uses itself,
// so it waits for its own copies alone, and its registers stay free. While one block reduces and writes, the other blocks of the
// SM load.
constexpr int kStagedUnroll = 4;

// first_wave: that many blocks start while rows are still being prepared, and guess theirs: the order is not known yet, but without
// ignored rows it is that of the blocks. Logits are older than the preparation, so they may be read.
template <typename T, int kFeatures, int kThreads>
__global__ void __launch_bounds__(kThreads, staged_blocks(kThreads))
    staged_kernel(const __grid_constant__ CeLossParams p, const unsigned first_wave) {
  using Maths = RowMaths<T, kFeatures>;
  using Partial = typename Maths::Partial;
  constexpr int kWarps = kThreads / 32, kStep = kThreads * kVec<T>;
  static_assert(kThreads >= RowPart<T>::kMostHead + kVec<T>);
  auto* kept = dynamic_shared<uint4>();
  __shared__ Partial of_warps[kWarps];
  const int thread = threadIdx.x, lane = thread % 32;
  const auto copy = [&](const RowPart<T>& row) {
    const T* body = row.row + row.column();
    for (int v = thread; v < row.count; v += kThreads) cp_async_16(kept + v, body + int64_t(v) * kVec<T>);
  };
  const bool guesses = blockIdx.x < first_wave;
  if (guesses) copy(RowPart<T>(p, blockIdx.x, 1, 0));
  griddepcontrol_wait();
  const RowEntry entry = Workspace(p).order[blockIdx.x];
  const int64_t t = entry.row;
  const int32_t y = entry.target;
  const bool guessed = guesses && t == blockIdx.x && y >= 0;
  if (guesses && !guessed) cp_async_wait_all();
  T* out = row_of<T>(p.grad, p.grad_layout, t);
  if (y < 0) {
    if (thread == 0) write_ignored_row(p, t, y);
    return zero_row(out, p.vocab, thread, kThreads);
  }
  const RowPart<T> all(p, t, 1, 0);
  const int64_t column = all.column();
  if (!guessed) copy(all);

  const int64_t edge = all.edge(p.vocab, thread);
  const float edge_raw = edge >= 0 ? to_float(all.row[edge]) : 0.f;
  const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
  const float target = thread == 0 || edge == y ? maths.transform_at(all.row, y) : 0.f;
  const float scale = state(p.scale, t);
  cp_async_wait_all();

  Partial part;
  uint4 raw[kStagedUnroll];
  int v = thread, valid = 0;
#pragma unroll 1
  for (; v + (kStagedUnroll - 1) * kThreads < all.count; v += kStagedUnroll * kThreads) {
#pragma unroll
    for (int k = 0; k < kStagedUnroll; k++) raw[k] = kept[v + k * kThreads];
    maths.add(part, raw, column + int64_t(v) * kVec<T>, kStep);
  }
#pragma unroll
  for (int k = 0; k < kStagedUnroll - 1; k++)
    if (v + k * kThreads < all.count) raw[k] = kept[v + k * kThreads], valid = k + 1;
  maths.add(part, raw, column + int64_t(v) * kVec<T>, kStep, valid);
  if (edge >= 0) {
    const float x[1] = {edge == y ? target : maths.transform(edge_raw)};
    maths.add(part, x, edge);
  }
  part.template reduce_over_warp<kFeatures>();
  if (lane == 0) of_warps[thread / 32] = part;
  __syncthreads();  // from here on the gradient may overwrite the row
  part = lane < kWarps ? of_warps[lane] : Partial{};
  part.template reduce_over_warp<kFeatures>();
  if (thread == 0) {
    part.target = target;
    write_row<kFeatures>(p, maths, t, part, y);
  }

  const RowGradient<T, kFeatures> gradient(maths, y, part.max, part.sum, scale);
#pragma unroll 2
  for (v = thread; v < all.count; v += kThreads)
    store_streaming(out + column + int64_t(v) * kVec<T>, gradient.others(kept[v], column + int64_t(v) * kVec<T>));
  if (edge >= 0) out[edge] = from_float<T>(edge == y ? gradient.target(target) : gradient.other(edge_raw, edge));
  const int in_vectors = y - int32_t(column);  // the target's place among the vectors' elements
  if (in_vectors >= 0 && in_vectors < all.count * kVec<T> && in_vectors / kVec<T> % kThreads == thread)
    out[y] = from_float<T>(gradient.target(maths.transform_at(reinterpret_cast<const T*>(kept), in_vectors)));
}

// -------------------------------------------------------------------------------------------------------- streaming

constexpr int kStreamThreads = 512;
constexpr int kStreamUnroll = 4;    // 16-byte loads in flight per thread
constexpr int kBackwardBlocks = 4;  // per SM

// Calls on_vectors(raw vectors, column of the first, columns between them) and on_element(raw, column) for a thread's share of a
// row.
template <typename T, typename OnVectors, typename OnElement>
__device__ __forceinline__ void for_row(const T* row, int64_t vocab, OnVectors on_vectors, OnElement on_element) {
  constexpr int kStep = kStreamThreads * kVec<T>;
  const Span<T> span(row, vocab);
  const T* body = row + span.head;
  int i = threadIdx.x;
  for (; i + (kStreamUnroll - 1) * kStreamThreads < span.vectors; i += kStreamUnroll * kStreamThreads) {
    uint4 raw[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; u++) raw[u] = load_cached(body + int64_t(i + u * kStreamThreads) * kVec<T>);
    on_vectors(raw, span.head + int64_t(i) * kVec<T>, kStep);
  }
  for (; i < span.vectors; i += kStreamThreads) {
    const uint4 raw[1] = {load_cached(body + int64_t(i) * kVec<T>)};
    on_vectors(raw, span.head + int64_t(i) * kVec<T>, kStep);
  }
  if (int(threadIdx.x) < span.head) on_element(row[threadIdx.x], int64_t(threadIdx.x));
  if (int(threadIdx.x) < span.tail) on_element(row[vocab - span.tail + threadIdx.x], vocab - span.tail + threadIdx.x);
}

// Writes a row's gradient from the target's x'. `out` may be the row itself: a thread writes only what it has read.
template <typename T, int kFeatures>
__device__ __forceinline__ void stream_gradient(T* out, const T* row, int64_t vocab, const RowGradient<T, kFeatures>& gradient,
                                                float target) {
  const auto of_element = [&](T raw, int64_t c) {
    return from_float<T>(c == gradient.y ? gradient.target(target) : gradient.other(to_float(raw), c));
  };
  const bool same_alignment = ((reinterpret_cast<uintptr_t>(out) ^ reinterpret_cast<uintptr_t>(row)) & 15) == 0;
  if (same_alignment) {
    for_row<T>(
        row, vocab,
        [&](const auto& raw, int64_t c, int step) {
#pragma unroll
          for (int k = 0; k < int(std::extent_v<std::remove_reference_t<decltype(raw)>>); k++, c += step) {
            store_streaming(out + c, gradient.others(raw[k], c));
            if (gradient.in_vector(c)) out[gradient.y] = from_float<T>(gradient.target(target));
          }
        },
        [&](T raw, int64_t c) { out[c] = of_element(raw, c); });
  } else {
    for (int64_t c = threadIdx.x; c < vocab; c += kStreamThreads) out[c] = of_element(row[c], c);
  }
}

template <typename T, int kFeatures>
__global__ void __launch_bounds__(kStreamThreads) stream_forward_kernel(const __grid_constant__ CeLossParams p) {
  using Maths = RowMaths<T, kFeatures>;
  __shared__ typename Maths::Partial scratch[kStreamThreads / 32];
  __shared__ float target;  // the target's x', read before the gradient may overwrite it
  griddepcontrol_wait();
  const int64_t t = blockIdx.x;
  const int32_t target_class = p.target[t], y = column_of(p, target_class);
  if (target_class < 0) {
    if (threadIdx.x == 0) write_ignored_row(p, t, target_class);
    if (p.grad) zero_row(row_of<T>(p.grad, p.grad_layout, t), p.vocab, threadIdx.x, kStreamThreads);
    return;
  }
  const T* row = row_of<T>(p.logits, p.logits_layout, t);
  const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
  typename Maths::Partial part;
  for_row<T>(
      row, p.vocab, [&](const auto& raw, int64_t c, int step) { maths.add(part, raw, c, step); },
      [&](T raw, int64_t c) {
        const float x[1] = {c == y ? maths.transform_at(row, c) : maths.transform(to_float(raw))};
        maths.add(part, x, c);
      });
  if (threadIdx.x == 0) target = is_here(p, y) ? maths.transform_at(row, y) : 0.f;
  part = block_reduce<kStreamThreads>(part, typename Maths::Partial{}, Add<typename Maths::Partial>{}, scratch);
  if (threadIdx.x == 0) {
    part.target = target;
    write_row<kFeatures>(p, maths, t, part, y);
  }
  if (p.grad) {
    const RowGradient<T, kFeatures> gradient(maths, y, part.max, part.sum, state(p.scale, t));
    stream_gradient<T, kFeatures>(row_of<T>(p.grad, p.grad_layout, t), row, p.vocab, gradient, target);
  }
}

// Writes the gradient of one row with a whole block. `target` is in shared memory.
template <typename T, int kFeatures>
__device__ __forceinline__ void backward_row(const CeLossParams& p, int64_t t, float incoming, float class_weight_sum,
                                             float& target) {
  if (p.grad_holds_gradient && incoming == 1.f) return;
  T* out = row_of<T>(p.grad, p.grad_layout, t);
  const int32_t y = column_of(p, p.target[t]);
  if (p.target[t] < 0) return zero_row(out, p.vocab, threadIdx.x, kStreamThreads);
  if (!p.logits) {
    for_row<T>(
        out, p.vocab,
        [&](const auto& raw, int64_t c, int step) {
#pragma unroll
          for (int k = 0; k < int(std::extent_v<std::remove_reference_t<decltype(raw)>>); k++, c += step) {
            float x[kVec<T>];
            unpack<T>(raw[k], x);
#pragma unroll
            for (int i = 0; i < kVec<T>; i++) x[i] *= incoming;
            store_streaming(out + c, pack<T>(x));
          }
        },
        [&](T raw, int64_t c) { out[c] = from_float<T>(to_float(raw) * incoming); });
    return;
  }
  const RowMaths<T, kFeatures> maths(p, class_weight_sum);
  const RowGradient<T, kFeatures> gradient(maths, y, state(p.row_max, t), state(p.row_sum, t), incoming * state(p.scale, t));
  const T* row = row_of<T>(p.logits, p.logits_layout, t);
  __syncthreads();  // `target` of the previous row was read
  if (threadIdx.x == 0) target = is_here(p, y) ? maths.transform_at(row, y) : 0.f;
  __syncthreads();
  stream_gradient<T, kFeatures>(out, row, p.vocab, gradient, target);
}

// A few blocks per SM walk over the rows. If grad_output is 1, as after loss.backward(), nothing is left to do, and a block per
// row would take longer to find that out.
template <typename T, int kFeatures>
__global__ void __launch_bounds__(kStreamThreads) stream_backward_kernel(const __grid_constant__ CeLossParams p) {
  const RowLayout& l = p.grad_output_layout;
  const auto* grad_output = static_cast<const float*>(p.grad_output);
  if (p.grad_holds_gradient && l.outer == 0 && l.step == 0 && *grad_output == 1.f) return;
  __shared__ float scratch[kStreamThreads / 32], target;
  const float class_weight_sum = kFeatures & kUniform ? sum_class_weights<kStreamThreads>(p, scratch) : 0.f;
  for (int64_t t = blockIdx.x; t < p.rows; t += gridDim.x)
    backward_row<T, kFeatures>(p, t, grad_output[(t / l.inner) * l.outer + (t % l.inner) * l.step], class_weight_sum, target);
}

// ------------------------------------------------------------------------------------------------------------- host

template <typename T, int kFeatures, int kThreads>
cudaError_t launch_staged(const CeLossParams& p, const CeLossLaunch& launch, const Device& device, cudaStream_t stream) {
  constexpr auto kKernel = staged_kernel<T, kFeatures, kThreads>;
  if (const cudaError_t error = allow_shared<kKernel>(device.index, most_staged_bytes(device)); error != cudaSuccess)
    return error;
  const bool overlaps = device.overlaps_launches();
  const int64_t wave = overlaps ? int64_t(device.multiprocessors) * launch.blocks_per_sm : 0;
  return launch_with({0, overlaps}, kKernel, unsigned(p.rows), kThreads, launch.shared_bytes, stream, p,
                     unsigned(std::min(wave, p.rows)));
}

template <typename T, int kFeatures, bool kGrad>
cudaError_t launch_resident(const CeLossParams& p, const CeLossLaunch& launch, const Device& device, cudaStream_t stream) {
  constexpr auto kKernel = resident_kernel<T, kFeatures, kGrad>;
  constexpr int kThreads = Roles<kGrad, kFeatures>::kThreads;

  // Persistent blocks must all be on the device at once. Asked once per device and cluster size.
  static std::atomic<int> cache[kMaxDevices][kMaxCluster + 1];
  auto& resident_clusters = cache[device.index % kMaxDevices][launch.cluster];
  int clusters = resident_clusters.load(std::memory_order_acquire);
  if (clusters == 0) {
    cudaError_t error = allow_shared<kKernel>(device.index, device.shared_per_block);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(launch.cluster), 1, 1};
    const unsigned most_blocks = unsigned(device.multiprocessors) * resident_blocks(kGrad) / launch.cluster * launch.cluster;
    const cudaLaunchConfig_t config = {dim3(most_blocks), dim3(kThreads), size_t(launch.shared_bytes), stream, &attribute, 1};
    error = cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config);
    if (error != cudaSuccess) return error;
    if (clusters == 0) return cudaErrorInvalidConfiguration;
    resident_clusters.store(clusters, std::memory_order_release);
  }
  const unsigned blocks = unsigned(std::min<int64_t>(clusters, p.rows)) * launch.cluster;
  return launch_with({launch.cluster, device.overlaps_launches()}, kKernel, blocks, kThreads, launch.shared_bytes, stream, p,
                     launch.stages);
}

template <typename T, int kFeatures>
cudaError_t launch_rows(const CeLossParams& p, const Device& device, cudaStream_t stream) {
  static_assert(sizeof(typename RowMaths<T, kFeatures>::Partial) == ce_loss_partial_bytes(Features(kFeatures)));
  const CeLossLaunch launch = choose_ce_loss_launch(p, device);
  switch (launch.path) {
    case CeLossPath::staged:
      return launch.threads == 128 ? launch_staged<T, kFeatures, 128>(p, launch, device, stream)
                                   : launch_staged<T, kFeatures, 256>(p, launch, device, stream);
    case CeLossPath::resident:
      return p.grad ? launch_resident<T, kFeatures, true>(p, launch, device, stream)
                    : launch_resident<T, kFeatures, false>(p, launch, device, stream);
    default:
      return launch_with({0, device.overlaps_launches()}, stream_forward_kernel<T, kFeatures>, unsigned(p.rows), kStreamThreads,
                         0, stream, p);
  }
}

// Calls f(type, features) with the element type and the features that the problem needs.
template <typename F>
void dispatch(const CeLossParams& p, F&& f) {
  dispatch_float<false>(p.logits_dtype, [&](auto type) {
    switch (ce_loss_features(p)) {
      case kPlain: return f(type, std::integral_constant<int, kPlain>{});
      case kScale: return f(type, std::integral_constant<int, kScale>{});
      case kUniform: return f(type, std::integral_constant<int, kUniform>{});
      case kSoftcap: return f(type, std::integral_constant<int, kSoftcap>{});
      default: return f(type, std::integral_constant<int, kEverything>{});
    }
  });
}

cudaError_t prepare(const CeLossParams& p, const Device& device, cudaStream_t stream) {
  if (const int cluster = prepare_cluster(p.rows, needs_documents(p), device))
    return cluster == 1
               ? launch_with({}, prepare_kernel<false>, 1, kTile, sizeof(Scratch), stream, p)
               : launch_with({cluster, false}, prepare_kernel<true>, unsigned(cluster), kTile, sizeof(Scratch), stream, p);
  const unsigned tiles = unsigned((p.rows + kTile - 1) / kTile);
  const LaunchOptions next{0, device.overlaps_launches()};
  cudaError_t error = launch_with({}, prepare_targets_kernel, tiles, kTile, 0, stream, p);
  if (error == cudaSuccess && needs_documents(p) && p.axis.documents > 0)
    error =
        launch_with(next, prepare_documents_kernel, unsigned(std::min<int64_t>(p.axis.documents, 65536)), kTile, 0, stream, p);
  if (error == cudaSuccess) error = launch_with(next, prepare_totals_kernel, 1, kTile, 0, stream, p);
  if (error == cudaSuccess) error = launch_with(next, prepare_scales_kernel, tiles, kTile, 0, stream, p);
  return error;
}

}  // namespace

int64_t ce_loss_workspace(const CeLossParams& p) { return Workspace(p).size; }

cudaError_t ce_loss_prepare_cuda(const CeLossParams& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  return error == cudaSuccess ? prepare(p, device, stream) : error;
}

cudaError_t ce_loss_forward_cuda(const CeLossParams& p, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if ((error = prepare(p, device, stream)) != cudaSuccess) return error;
  if (p.rows > 0) {
    dispatch(p, [&](auto type, auto features) { error = launch_rows<decltype(type), features()>(p, device, stream); });
    if (error != cudaSuccess) return error;
  }
  if (p.partial) return cudaSuccess;
  const LaunchOptions next{0, device.overlaps_launches()};
  if (p.reduction != Reduction::none && (error = launch_with(next, reduce_kernel, 1, kTile, 0, stream, p)) != cudaSuccess)
    return error;
  if (p.sequence_loss && p.axis.documents > 0)
    error = launch_with(next, sequence_loss_kernel, unsigned(std::min<int64_t>(p.axis.documents, 65536)), kTile, 0, stream, p);
  return error;
}

cudaError_t ce_loss_combine_cuda(const CeLossParams& p, cudaStream_t stream) {
  if (p.rows > 0) {
    const auto blocks = unsigned((p.rows + kCombineThreads - 1) / kCombineThreads);
    dispatch_float<false>(p.logits_dtype, [&](auto type) {  // softcap and scale are in the partials already
      if (p.label_smoothing != 0) launch(combine_kernel<decltype(type), kUniform>, blocks, kCombineThreads, 0, stream, p);
      else launch(combine_kernel<decltype(type), kPlain>, blocks, kCombineThreads, 0, stream, p);
    });
  }
  if (p.reduction != Reduction::none) launch(reduce_kernel, 1, kTile, 0, stream, p);
  return cudaGetLastError();
}

cudaError_t ce_loss_backward_cuda(const CeLossParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const auto blocks = unsigned(std::min<int64_t>(p.rows, int64_t(device.multiprocessors) * kBackwardBlocks));
  dispatch(p, [&](auto type, auto features) {
    launch(stream_backward_kernel<decltype(type), features()>, blocks, kStreamThreads, 0, stream, p);
  });
  return cudaGetLastError();
}

}  // namespace packops

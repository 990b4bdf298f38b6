// A packed axis whose documents share prefixes, on the GPU; packed_forest.h has the rule.
//
// First one warp a segment: it walks up to the root for the position of the segment's first token, and reads on through the
// segments after it, 32 at a time, to the first that does not continue it. Then one thread a token: a binary search finds its
// segment, as in metadata.cu. Bytes moved: 4 to 28 written a token. The launches are the bound.
#include "packed_forest.h"

#include "common/launch.cuh"

namespace packops {

namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;

template <typename Index, typename Parent>
__global__ void __launch_bounds__(kThreads) segments_kernel(const __grid_constant__ PackedForestParams p) {
  const Index* cu_seqlens = static_cast<const Index*>(p.axis.cu_seqlens);
  const Parent* parents = static_cast<const Parent*>(p.parents);
  const int64_t segments = p.axis.documents;
  const auto bound = [&](int64_t i) { return int32_t(max(int64_t(0), min(p.tokens, int64_t(cu_seqlens[i])))); };
  const int lane = int(threadIdx.x) % 32;
  const int64_t segment = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (segment > segments) return;
  if (segment == segments) {
    if (lane == 0) p.trees[segment] = bound(segments);
    return;
  }

  int64_t start = 0;
  // A parent comes before its child, so that even malformed parents end the walk.
  for (int64_t child = segment, parent = parents[segment]; lane == 0 && parent >= 0 && parent < child;
       child = parent, parent = parents[parent])
    start += max(bound(parent + 1) - bound(parent), 0);

  int64_t after = segments, root = parents[segment] < 0 ? segment : segments;  // what follows the subtree, and the next root
  for (int64_t first = segment + 1; first < segments && (after == segments || root == segments); first += 32) {
    const int64_t other = first + lane, parent = other < segments ? int64_t(parents[other]) : segments;
    const unsigned leaves = __ballot_sync(kWarp, parent < segment), roots = __ballot_sync(kWarp, parent < 0);
    if (after == segments && leaves) after = first + __ffs(leaves) - 1;
    if (root == segments && roots) root = first + __ffs(roots) - 1;
  }
  if (lane == 0) {
    p.segment_starts[segment] = int32_t(min(start, p.tokens));
    p.segment_ends[segment] = bound(after);
    p.trees[segment] = bound(root);
  }
}

template <typename Index>
__global__ void __launch_bounds__(kThreads) tokens_kernel(const __grid_constant__ PackedForestParams p) {
  const Documents<Index> segments(p.axis);
  const int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= p.tokens) return;
  const int64_t segment = segments.find(token);
  const bool is_padding = segment == segments.count;
  const int32_t position = int32_t(token - segments.begin(segment, token)) + (is_padding ? 0 : p.segment_starts[segment]);
  const int32_t end = is_padding ? 0 : p.segment_ends[segment];
  p.positions[token] = position;
  p.ends[token] = end;
  if (p.position_ids) p.position_ids[token] = position;
  if (p.seq_idx) p.seq_idx[token] = is_padding ? -1 : int32_t(segment);

  // Segments that begin within the run; past the last boundary there is padding.
  int32_t least = end, most = end;
  const int64_t run = min(token + kForestRun, p.tokens), last = segments.cu_seqlens[segments.count];
  for (int64_t s = segment + 1; s < segments.count && segments.cu_seqlens[s] < min(run, last); s++) {
    if (segments.cu_seqlens[s] == segments.cu_seqlens[s + 1]) continue;
    least = min(least, p.segment_ends[s]);
    most = max(most, p.segment_ends[s]);
  }
  p.nearest[token] = run > last ? 0 : least;
  p.furthest[token] = most;
}

template <typename Index, typename Parent>
void launch_forest(const PackedForestParams& p, cudaStream_t stream) {
  const auto blocks = [](int64_t count, int per_block) { return dim3(unsigned((count + per_block - 1) / per_block)); };
  launch(segments_kernel<Index, Parent>, blocks(p.axis.documents + 1, kThreads / 32), dim3(kThreads), 0, stream, p);
  if (p.tokens > 0) launch(tokens_kernel<Index>, blocks(p.tokens, kThreads), dim3(kThreads), 0, stream, p);
}

}  // namespace

cudaError_t packed_forest_cuda(const PackedForestParams& p, cudaStream_t stream) {
  if (p.axis.index_dtype == DType::i32) {
    p.parent_dtype == DType::i32 ? launch_forest<int32_t, int32_t>(p, stream) : launch_forest<int32_t, int64_t>(p, stream);
  } else {
    p.parent_dtype == DType::i32 ? launch_forest<int64_t, int32_t>(p, stream) : launch_forest<int64_t, int64_t>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace packops

// A packed axis whose documents share prefixes, on the GPU; packed_forest.h has the rule.
//
// First one warp a segment: it walks up to the root for the position of the segment's first token, and reads on through the
// segments after it, 32 at a time, to the first that does not continue it. Then one thread a token: a binary search finds its
// segment, as in metadata.cu. Bytes moved: 8 to 20 written a token. The launches are the bound.
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

  // A parent comes before its child, so that even malformed parents end every walk, and no root lies in another's subtree.
  const auto parent_of = [&](int64_t child) {
    return int64_t(parents[child]) < child ? max(int64_t(parents[child]), int64_t(-1)) : -1;
  };
  int64_t position = 0;
  for (int64_t parent = parent_of(segment); lane == 0 && parent >= 0; parent = parent_of(parent))
    position += max(bound(parent + 1) - bound(parent), 0);

  int64_t after = segments, root = parent_of(segment) < 0 ? segment : segments;  // what follows the subtree, and the next root
  for (int64_t first = segment + 1; first < segments && (after == segments || root == segments); first += 32) {
    const int64_t other = first + lane, parent = other < segments ? parent_of(other) : segments;
    const unsigned leaves = __ballot_sync(kWarp, parent < segment), roots = __ballot_sync(kWarp, parent < 0);
    if (after == segments && leaves) after = first + __ffs(leaves) - 1;
    if (root == segments && roots) root = first + __ffs(roots) - 1;
  }
  if (lane == 0) {
    p.segments[segment] = {bound(segment), bound(segment + 1), int32_t(min(position, p.tokens)), int32_t(parent_of(segment))};
    p.subtree_ends[segment] = bound(after);
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
  const int32_t position = int32_t(token - segments.begin(segment, token)) + (is_padding ? 0 : p.segments[segment].position);
  p.positions[token] = position;
  p.ends[token] = is_padding ? 0 : p.subtree_ends[segment];
  if (p.position_ids) p.position_ids[token] = position;
  if (p.seq_idx) p.seq_idx[token] = is_padding ? -1 : int32_t(segment);
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

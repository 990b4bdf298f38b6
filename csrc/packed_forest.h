// A packed axis whose documents share prefixes: the plain interface that packed_forest.cu and packed_forest_cpu.cpp implement.
//
// cu_seqlens cuts the axis into segments, and a segment continues parents[s], or nothing (-1). Segments stand in depth-first
// order, so a segment and all that continue it are one range of tokens. Hence one number says who sees a token:
//
//   token q sees token k  if and only if  k <= q < ends[k]      ends[k]: where the subtree of k's segment ends
//
// A document is the path from a root to a segment, and a token's position is its place on that path. The trees are what documents
// are without shared prefixes: trees[s] = cu_seqlens of the next root at or after segment s, so that trees is a cu_seqlens in
// which every segment that is no root is an empty document.
#pragma once

#include <cstdint>

#include "common/documents.h"
#include "common/dtype.h"

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packops {

struct alignas(16) ForestSegment {
  int32_t begin = 0, end = 0;  // its tokens
  int32_t position = 0;        // of its first token
  int32_t parent = -1;
};

struct PackedForestParams {
  PackedAxis axis;                // its documents are the segments
  int64_t tokens = 0;             // fewer than 2^30
  const void* parents = nullptr;  // (segments,) contiguous, i32 or i64
  DType parent_dtype = DType::i32;
  ForestSegment* segments = nullptr;  // (segments,)
  int32_t* subtree_ends = nullptr;    // (segments,) where a segment and all that continue it end
  int32_t* trees = nullptr;           // (segments + 1,)

  // Each (tokens,). Padding is one trailing document that nobody sees: its ends are 0.
  int64_t* position_ids = nullptr;  // null: not wanted
  int32_t* seq_idx = nullptr;       // the segment, -1 for padding; null: not wanted
  int32_t* positions = nullptr;     // position_ids in 32 bits
  int32_t* ends = nullptr;
};

// Everything but position_ids and seq_idx lies in one array of so many int32.
inline constexpr int kForestPerSegment = 6, kForestPerToken = 2;
constexpr int64_t forest_numbers(int64_t segments, int64_t tokens) {
  return kForestPerSegment * segments + 1 + kForestPerToken * tokens;
}

inline void set_forest_numbers(PackedForestParams& p, int32_t* numbers) {  // aligned to 16 bytes
  static_assert(sizeof(ForestSegment) == 4 * sizeof(int32_t));
  const int64_t segments = p.axis.documents;
  p.segments = reinterpret_cast<ForestSegment*>(numbers);
  p.subtree_ends = numbers + 4 * segments;
  p.trees = p.subtree_ends + segments;
  p.positions = p.trees + segments + 1;
  p.ends = p.positions + p.tokens;
}

// The first segment whose parent is not -1 or a segment that is open there (itself an ancestor of the segment before, or that
// segment); -1 if parents are well formed. Host memory.
int64_t first_malformed_parent(const PackedForestParams& params);

// cu_seqlens and parents must be well formed.
void packed_forest_cpu(const PackedForestParams& params);

#ifdef PACKOPS_WITH_CUDA
// Memory-safe whatever cu_seqlens and parents hold.
cudaError_t packed_forest_cuda(const PackedForestParams& params, cudaStream_t stream);
#endif

}  // namespace packops

// Attention within the documents of a packed row: the plain interface of attention.cu and attention_cpu.cpp.
//
//   score = scale q k, or softcap tanh(scale q k / softcap)      of a query and every key that it sees
//   lse = log2 Σ e^score      p = e^score / 2^lse      out = Σ p v
//
//   delta = grad_out out      grad_score = p (grad_out v - delta)      g = grad_score d score / d (q k)
//   grad_v = Σ p grad_out      grad_k = Σ g q      grad_q = Σ g k
//
// (Dao, FlashAttention-2, 2023, algorithms 1 and 2.) A query sees the keys of its document, with `causal` those that are not
// later, with `window` the last `window` of these, its own included. Documents that share prefixes are the paths of a tree
// (packed_forest.h): cu_seqlens then cuts segments, and a query sees the keys k <= query < ends[k]. Query heads h of one group,
// h / (heads / kv_heads), share a head of keys and values. Tokens past the last document are padding: they see nothing, and their
// outputs and gradients are 0.
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/documents.h"
#include "common/dtype.h"

namespace packops {

// Neighbouring tokens of one document, at most kAttentionRows. Tokens of padding have an empty document; unused tiles no tokens.
// With shared prefixes, of one segment; document_end is then where its subtree ends.
struct AttentionTile {
  int32_t begin = 0, end = 0;  // its tokens
  int32_t document_begin = 0, document_end = 0;
  int32_t document = 0;  // its place in cu_seqlens
};
inline constexpr int64_t kAttentionTileNumbers = sizeof(AttentionTile) / sizeof(int32_t);
inline constexpr int kAttentionRows = 64;
// Heads that the CUDA kernels take: a row of one is whole chunks of 16 bytes.
inline constexpr int64_t kAttentionHeadDimStep = 8, kAttentionMostHeadDim = 256;
constexpr bool attention_takes(int64_t head_dim) {
  return head_dim > 0 && head_dim <= kAttentionMostHeadDim && head_dim % kAttentionHeadDimStep == 0;
}

// (tokens, heads, head_dim), contiguous in the last dimension; strides in elements.
struct Heads {
  const void* data = nullptr;
  int64_t token = 0, head = 0;
};

// Of a packed axis whose documents share prefixes: packed_forest.h. Null without.
struct ForestSegment;
struct SharedPrefixes {
  const ForestSegment* segments = nullptr;              // (documents,)
  const int32_t* subtree_ends = nullptr;                // (documents,)
  const int32_t* trees = nullptr;                       // (documents + 1,)
  const int32_t *positions = nullptr, *ends = nullptr;  // (tokens,)
  explicit constexpr operator bool() const { return segments != nullptr; }
};

struct AttentionParams {
  Heads q, k, v;
  int64_t tokens = 0;  // fewer than 2^30
  int32_t heads = 1, kv_heads = 1, head_dim = 64;
  DType dtype = DType::bf16;
  bool causal = true;
  int64_t window = 0;             // 0: none; only with causal
  double scale = 1, softcap = 0;  // 0: none
  PackedAxis axis;
  SharedPrefixes prefixes;  // only with causal

  // Forward writes these, backward reads them. out is contiguous; lse, fp32 (fp64), is (parts, heads, tokens): to base 2, -inf where
  // nothing is seen; and on the CPU, where there are two parts, what its rounding left. CUDA: see store_lse.
  void* out = nullptr;
  void* lse = nullptr;

  // Backward. Gradients are contiguous.
  Heads grad_out;
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;

  // CUDA: what the kernels tell each other.
  AttentionTile* tiles = nullptr;  // attention_tiles(tokens, documents) of them; backward reads the forward's
  int32_t* longest = nullptr;      // tokens of the longest root where documents share prefixes; backward reads the forward's
  float* delta = nullptr;          // (heads, tokens), backward
  float* parts = nullptr;          // sums, attention_parts(p, backward) numbers: see QuerySums and KeysWork
  int32_t* added = nullptr;        // (tiles, heads, 2): how many blocks have added to each half of them, backward
  unsigned* drawn = nullptr;       // how many items of work the blocks for long documents have taken in this pass
  int32_t long_from = 0;           // tokens beyond which a document is long; 0: each kernel's own (attention_launch.h)
};

// No more tiles than these are needed: a document of n tokens has at most n / kAttentionRows + 1, and so has the padding.
constexpr int64_t attention_tiles(int64_t tokens, int64_t documents) { return tokens / kAttentionRows + documents + 1; }

// Units are a document (a tree), or the padding, of one head of keys and values: (documents + 1) * kv_heads of them; [begin, end) is done.
// cu_seqlens must be well formed.
void attention_cpu(const AttentionParams& params, int64_t begin, int64_t end);
void attention_backward_cpu(const AttentionParams& params, int64_t begin, int64_t end);

#ifdef PACKOPS_WITH_CUDA
// f16 and bf16, head_dim as attention_takes; data and strides multiples of 16 bytes. Memory-safe whatever cu_seqlens holds.
cudaError_t attention_cuda(const AttentionParams& params, cudaStream_t stream);
cudaError_t attention_backward_cuda(const AttentionParams& params, cudaStream_t stream);
// How many numbers `parts` needs; 0: neither it nor `added` is used.
int64_t attention_parts(const AttentionParams& params, bool backward);
#endif

}  // namespace packops

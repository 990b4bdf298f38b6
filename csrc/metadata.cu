// Metadata of a packed axis on the GPU; formulas in metadata.h.
//
// One thread per token, so that every store is coalesced. A token finds its document by binary search in cu_seqlens, which a warp
// reads as broadcasts from the L1: log2(documents) dependent loads. Bytes per token: 12 written for the metadata; one label read
// and one written for the labels. Below a million tokens launch latency is the bound, so nothing is vectorised.
// The only atomics are integer additions, one per document and warp, whose order does not change the counts.
#include "metadata.h"

#include "common/launch.cuh"

namespace packops {

namespace {

constexpr int kThreads = 256;

int64_t blocks_for(int64_t tokens) { return (tokens + kThreads - 1) / kThreads; }

template <typename Index>
__global__ void __launch_bounds__(kThreads) metadata_kernel(Documents<Index> documents, int64_t tokens,
                                                            int64_t* __restrict__ position_ids, int32_t* __restrict__ seq_idx) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= tokens) return;
  const int64_t document = documents.find(token);
  position_ids[token] = token - documents.begin(document, token);
  seq_idx[token] = document < documents.count ? static_cast<int32_t>(document) : -1;
}

template <typename Index, typename Label>
__global__ void __launch_bounds__(kThreads)
    labels_kernel(Documents<Index> documents, int64_t tokens, const Label* __restrict__ labels, int64_t label_stride,
                  Label ignored, bool shift, Label* __restrict__ target, unsigned long long* __restrict__ counts) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool is_token = token < tokens;  // the other threads stay for the warp votes below
  const int64_t document = is_token ? documents.find(token) : documents.count;
  const int64_t neighbour = shift ? token + 1 : token - 1;  // label and prediction must be in one document
  const bool is_scored =
      document < documents.count && neighbour >= 0 && neighbour < tokens && documents.find(neighbour) == document;
  const Label value = is_scored ? labels[(shift ? neighbour : token) * label_stride] : ignored;
  if (is_token) target[token] = value;

  constexpr unsigned kWarp = 0xffffffffu;
  const unsigned counted = __ballot_sync(kWarp, value != ignored);
  const unsigned peers = __match_any_sync(kWarp, static_cast<long long>(document));
  const bool is_leader = (threadIdx.x & 31) == __ffs(peers) - 1;
  const int number = __popc(peers & counted);
  if (is_leader && number > 0) atomicAdd(counts + document, static_cast<unsigned long long>(number));
}

template <typename Index>
void launch_metadata(const MetadataParams& p, cudaStream_t stream) {
  launch(metadata_kernel<Index>, unsigned(blocks_for(p.tokens)), kThreads, 0, stream, Documents<Index>(p.axis), p.tokens,
         p.position_ids, p.seq_idx);
}

template <typename Index, typename Label>
void launch_labels(const LabelsParams& p, cudaStream_t stream) {
  launch(labels_kernel<Index, Label>, unsigned(blocks_for(p.tokens)), kThreads, 0, stream, Documents<Index>(p.axis), p.tokens,
         static_cast<const Label*>(p.labels), p.label_stride, static_cast<Label>(p.ignore_index), p.shift,
         static_cast<Label*>(p.target), reinterpret_cast<unsigned long long*>(p.counts));
}

}  // namespace

cudaError_t packed_metadata_cuda(const MetadataParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  p.axis.index_dtype == DType::i32 ? launch_metadata<int32_t>(p, stream) : launch_metadata<int64_t>(p, stream);
  return cudaGetLastError();
}

cudaError_t packed_labels_cuda(const LabelsParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  if (p.axis.index_dtype == DType::i32) {
    p.label_dtype == DType::i32 ? launch_labels<int32_t, int32_t>(p, stream) : launch_labels<int32_t, int64_t>(p, stream);
  } else {
    p.label_dtype == DType::i32 ? launch_labels<int64_t, int32_t>(p, stream) : launch_labels<int64_t, int64_t>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace packops

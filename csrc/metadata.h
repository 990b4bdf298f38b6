// Metadata of a packed axis, made where cu_seqlens lives: the plain interface that metadata.cu and metadata_cpu.cpp implement.
//
// For token t of document s = [cu_seqlens[s], cu_seqlens[s + 1]):
//   position_ids[t] = t - cu_seqlens[s]        seq_idx[t] = s
// Padding, the tokens at or past cu_seqlens[count], is one trailing document: positions restart at 0, seq_idx is -1.
//
//   target[t] = labels[t + 1] (shift), or labels[t] (no shift: a model shifts later)
//   ... but ignore_index where that would score a token of one document against another: a document's last token (shift), its
//   first one (no shift), and padding. counts[s] = number of target[t] != ignore_index over document s, the same either way.
#pragma once

#include <cstdint>

#include "common/documents.h"
#include "common/dtype.h"

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packops {

struct MetadataParams {
  PackedAxis axis;
  int64_t tokens = 0;
  int64_t* position_ids = nullptr;  // (tokens,)
  int32_t* seq_idx = nullptr;       // (tokens,)
};

struct LabelsParams {
  PackedAxis axis;
  int64_t tokens = 0;
  const void* labels = nullptr;  // (tokens,), i32 or i64
  DType label_dtype = DType::i64;
  int64_t label_stride = 1;
  int64_t ignore_index = -100;
  bool shift = true;
  void* target = nullptr;     // (tokens,) contiguous, of label_dtype
  int64_t* counts = nullptr;  // (documents,); CUDA adds to it, so it starts at zero
};

// CPU kernels write documents [begin, end); document number axis.documents is the padding. cu_seqlens must be well formed.
void packed_metadata_cpu(const MetadataParams& params, int64_t begin, int64_t end);
void packed_labels_cpu(const LabelsParams& params, int64_t begin, int64_t end);

#ifdef PACKOPS_WITH_CUDA
// Memory-safe whatever cu_seqlens holds.
cudaError_t packed_metadata_cuda(const MetadataParams& params, cudaStream_t stream);
cudaError_t packed_labels_cuda(const LabelsParams& params, cudaStream_t stream);
#endif

}  // namespace packops

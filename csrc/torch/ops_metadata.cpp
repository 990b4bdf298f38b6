// packed_metadata and packed_labels: checks, allocation, registration.
#include <tuple>

#include "metadata.h"
#include "torch/documents.h"
#include "torch/register.h"
#include "torch/stream.h"

namespace packops {

namespace {

// Documents a thread takes at least, so that it has about 32768 tokens to write.
int64_t grain(int64_t documents, int64_t tokens) { return 1 + 32768 * (documents + 1) / (tokens + 1); }

struct Metadata {
  CheckedDocuments checked;
  Tensor position_ids, seq_idx;
  MetadataParams params;
};

Metadata prepare_metadata(const Tensor& cu_seqlens, int64_t total_tokens) {
  PACKOPS_CHECK(total_tokens >= 0, ValueError, "packed_metadata: total_tokens must not be negative, got ", total_tokens);
  CheckedDocuments checked = check_documents("packed_metadata", cu_seqlens, total_tokens, "itself", cu_seqlens);
  Tensor position_ids = allocate(cu_seqlens, {total_tokens}, ScalarType::Long);
  Tensor seq_idx = allocate(cu_seqlens, {total_tokens}, ScalarType::Int);
  MetadataParams params{checked.axis, total_tokens, position_ids.mutable_data_ptr<int64_t>(),
                        seq_idx.mutable_data_ptr<int32_t>()};
  return {checked, position_ids, seq_idx, params};
}

std::tuple<Tensor, Tensor> packed_metadata(const Tensor& cu_seqlens, int64_t total_tokens) {
  const Metadata metadata = prepare_metadata(cu_seqlens, total_tokens);
  if (cu_seqlens.is_cpu()) {
    const int64_t documents = metadata.params.axis.documents;
    torch::stable::parallel_for(0, documents + 1, grain(documents, total_tokens),
                                [&](int64_t begin, int64_t end) { packed_metadata_cpu(metadata.params, begin, end); });
  }
#ifdef PACKOPS_WITH_CUDA
  else {
    const CudaScope scope(cu_seqlens);
    check_cuda(packed_metadata_cuda(metadata.params, scope.stream()), "packed_metadata");
  }
#endif
  return {metadata.position_ids, metadata.seq_idx};
}

struct Labels {
  CheckedDocuments checked;
  Tensor target, counts;
  LabelsParams params;
};

Labels prepare_labels(const Tensor& labels, const Tensor& cu_seqlens, bool shift, int64_t ignore_index) {
  const DType dtype = index_dtype(labels, "packed_labels", "labels");
  PACKOPS_CHECK(labels.dim() == 1, ValueError, "packed_labels: labels must have shape (tokens,), got ", shape_of(labels));
  PACKOPS_CHECK(dtype == DType::i64 || ignore_index == static_cast<int32_t>(ignore_index), ValueError,
                "packed_labels: ignore_index must fit the int32 labels, got ", ignore_index);
  CheckedDocuments checked = check_documents("packed_labels", cu_seqlens, labels.size(0), "labels", labels);
  Tensor target = allocate(labels, {labels.size(0)});
  Tensor counts = allocate_zeros(cu_seqlens, {checked.axis.documents}, ScalarType::Long);
  LabelsParams params{checked.axis,
                      labels.size(0),
                      labels.const_data_ptr(),
                      dtype,
                      labels.stride(0),
                      ignore_index,
                      shift,
                      target.mutable_data_ptr(),
                      counts.mutable_data_ptr<int64_t>()};
  return {checked, target, counts, params};
}

std::tuple<Tensor, Tensor> packed_labels(const Tensor& labels, const Tensor& cu_seqlens, bool shift, int64_t ignore_index) {
  const Labels prepared = prepare_labels(labels, cu_seqlens, shift, ignore_index);
  if (labels.is_cpu()) {
    const int64_t documents = prepared.params.axis.documents;
    torch::stable::parallel_for(0, documents + 1, grain(documents, labels.size(0)),
                                [&](int64_t begin, int64_t end) { packed_labels_cpu(prepared.params, begin, end); });
  }
#ifdef PACKOPS_WITH_CUDA
  else {
    const CudaScope scope(labels);
    check_cuda(packed_labels_cuda(prepared.params, scope.stream()), "packed_labels");
  }
#endif
  return {prepared.target, prepared.counts};
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
  m.def("packed_metadata(Tensor cu_seqlens, SymInt total_tokens) -> (Tensor position_ids, Tensor seq_idx)");
  m.def(
      "packed_labels(Tensor labels, Tensor cu_seqlens, *, bool shift=True, int ignore_index=-100) "
      "-> (Tensor target, Tensor counts)");
}

PACKOPS_KERNELS(m) {
  m.impl("packed_metadata", TORCH_BOX(&packops::packed_metadata));
  m.impl("packed_labels", TORCH_BOX(&packops::packed_labels));
}

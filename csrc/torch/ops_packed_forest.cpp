// packed_forest: checks, allocation, registration.
#include <tuple>

#include "torch/forest.h"
#include "torch/register.h"

namespace packops {

namespace {

constexpr const char* kOp = "packed_metadata";  // what Python calls it

std::tuple<Tensor, Tensor, Tensor> packed_forest(const Tensor& cu_seqlens, int64_t total_tokens, const Tensor& parents) {
  PACKOPS_CHECK(total_tokens >= 0, ValueError, kOp, ": total_tokens must not be negative, got ", total_tokens);
  const CheckedDocuments segments = check_documents(kOp, cu_seqlens, total_tokens, "itself", cu_seqlens);
  const Tensor position_ids = allocate(cu_seqlens, {total_tokens}, ScalarType::Long);
  const Tensor seq_idx = allocate(cu_seqlens, {total_tokens}, ScalarType::Int);
  PackedForestParams p;
  p.axis = segments.axis;
  p.tokens = total_tokens;
  p.position_ids = position_ids.mutable_data_ptr<int64_t>();
  p.seq_idx = seq_idx.mutable_data_ptr<int32_t>();
  Tensor numbers = make_forest(kOp, p, parents, cu_seqlens);
  const int64_t first = numbers.numel() - total_tokens;
  return {position_ids, seq_idx, contiguous_copy(torch::stable::narrow(numbers, 0, first, total_tokens))};
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
  m.def(
      "packed_forest(Tensor cu_seqlens, SymInt total_tokens, Tensor parents) "
      "-> (Tensor position_ids, Tensor seq_idx, Tensor ends)");
}

PACKOPS_KERNELS(m) { m.impl("packed_forest", TORCH_BOX(&packops::packed_forest)); }

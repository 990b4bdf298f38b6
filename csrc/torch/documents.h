// cu_seqlens as an argument of an op: one set of checks and one wording for all of them.
#pragma once

#include "common/documents.h"
#include "torch/allocate.h"
#include "torch/dispatch.h"

namespace packops {

// A packed axis, with the tensor that its pointer leads to.
struct CheckedDocuments {
  Tensor cu_seqlens;
  PackedAxis axis;
};

// `like`: the tensor on whose device cu_seqlens must be, `tokens` the length of its packed axis. On the CPU the values are checked;
// on CUDA that would wait for the device, so the kernels are safe whatever they hold.
inline CheckedDocuments check_documents(const char* op, const Tensor& cu_seqlens, int64_t tokens, const char* like_name,
                                        const Tensor& like) {
  check_device(op, "cu_seqlens", cu_seqlens, like_name, like);
  const DType dtype = index_dtype(cu_seqlens, op, "cu_seqlens");
  PACKOPS_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, ValueError, op,
                ": cu_seqlens must have shape (documents + 1,), got ", shape_of(cu_seqlens));
  const Tensor read = as_contiguous(cu_seqlens);
  const PackedAxis axis{read.const_data_ptr(), dtype, read.size(0) - 1};
  if (read.is_cpu()) {
    const int64_t bad = first_malformed_boundary(axis, tokens);
    PACKOPS_CHECK(bad < 0, ValueError, op,
                  ": cu_seqlens must start at 0, not decrease, and end at or before the number of rows (", tokens,
                  "), got cu_seqlens[", bad, "] = ", boundary(axis, bad));
  }
  return {read, axis};
}

}  // namespace packops

// parents as an argument of an op: the checks, and what the kernels make of it (packed_forest.h).
#pragma once

#include <cstring>

#include "packed_forest.h"
#include "torch/documents.h"
#include "torch/stream.h"

namespace packops {

// Runs the kernels; the result is the tensor of a forest's numbers, to which p then points. Wants p.axis, that of the
// segments, and p.tokens.
inline Tensor make_forest(const char* op, PackedForestParams& p, const Tensor& parents, const Tensor& cu_seqlens) {
  const int64_t segments = p.axis.documents;
  check_device(op, "parents", parents, "cu_seqlens", cu_seqlens);
  p.parent_dtype = index_dtype(parents, op, "parents");
  PACKOPS_CHECK(parents.dim() == 1 && parents.size(0) == segments, ValueError, op,
                ": parents must have one number per segment of cu_seqlens, (", segments, ",), got shape ", shape_of(parents));
  PACKOPS_CHECK(p.tokens < int64_t(1) << 30, ValueError, op, ": shared prefixes want fewer than 2^30 tokens, got ", p.tokens);
  const Tensor read = as_contiguous(parents);
  p.parents = read.const_data_ptr();
  const Tensor numbers = allocate(cu_seqlens, {forest_numbers(segments, p.tokens)}, ScalarType::Int);
  set_forest_numbers(p, numbers.mutable_data_ptr<int32_t>());
  if (cu_seqlens.is_cpu()) {
    const int64_t bad = first_malformed_parent(p);
    PACKOPS_CHECK(bad < 0, ValueError, op,
                  ": parents must be -1 or, depth first, the segment before or one that it continues, got parents[", bad,
                  "] = ", integer_at(p.parents, p.parent_dtype, bad));
    packed_forest_cpu(p);
  }
#ifdef PACKOPS_WITH_CUDA
  else {
    const CudaScope scope(cu_seqlens);
    check_cuda(packed_forest_cuda(p, scope.stream()), op);
  }
#endif
  return numbers;
}

// Points p to the numbers that make_forest made before, where the caller has kept them. On the CPU others are refused.
inline void use_forest(const char* op, PackedForestParams& p, const Tensor& numbers, const Tensor& cu_seqlens) {
  const auto check = [&](bool is_right) { PACKOPS_CHECK(is_right, ValueError, op, ": forest must be that of the forward pass"); };
  check(numbers.numel() == forest_numbers(p.axis.documents, p.tokens) && numbers.scalar_type() == ScalarType::Int &&
        numbers.device() == cu_seqlens.device() &&
        reinterpret_cast<uintptr_t>(numbers.const_data_ptr()) % alignof(ForestSegment) == 0);
  set_forest_numbers(p, static_cast<int32_t*>(const_cast<void*>(numbers.const_data_ptr())));
  if (!cu_seqlens.is_cpu()) return;
  const Tensor parents = allocate(cu_seqlens, {p.axis.documents}, ScalarType::Int);
  for (int64_t s = 0; s < p.axis.documents; s++) parents.mutable_data_ptr<int32_t>()[s] = p.segments[s].parent;
  PackedForestParams again;
  again.axis = p.axis, again.tokens = p.tokens;
  const Tensor made = make_forest(op, again, parents, cu_seqlens);
  check(std::memcmp(made.const_data_ptr(), numbers.const_data_ptr(), sizeof(int32_t) * size_t(made.numel())) == 0);
}

}  // namespace packops

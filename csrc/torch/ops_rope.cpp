// Torch glue of RoPE: outputs, dispatch to the kernels of rope.h, registration. Arguments are checked in rope_args.h.
#include <tuple>

#include "rope.h"
#include "torch/register.h"
#include "torch/rope_args.h"
#include "torch/stream.h"

namespace packops {
namespace {

constexpr const char* kOp = "rope";

void run_cpu(const RopeParams& p) {
  check_rope_positions(kOp, p);
  const int64_t per_token = std::max<int64_t>((p.q.heads + p.k.heads) * p.head_dim, 1);
  torch::stable::parallel_for(0, p.batch * p.tokens, std::max<int64_t>(1, 32768 / per_token),
                              [&](int64_t begin, int64_t end) { rope_cpu(p, begin, end); });
}

void run(const RopeParams& p, const Tensor& q) {
  if (q.is_cpu()) return run_cpu(p);
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(q);
  check_cuda(rope_cuda(p, scope.stream()), kOp);
#endif
}

std::tuple<Tensor, OptionalTensor> rope_raw(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor position_ids,
                                            OptionalTensor cu_seqlens, ROPE_PARAMETERS, bool transposed) {
  const Layout dims = layout_of(kOp, q, layout);
  Tensor boundaries;
  RopeParams p = make_rope_params(q, k, cos, sin, {kOp, position_ids, cu_seqlens, ROPE_ARGUMENTS, transposed}, dims, boundaries);
  Tensor q_out = empty_heads_like(q);
  set_output(p.q, q_out, dims);
  OptionalTensor k_out;
  if (k) {
    k_out = empty_heads_like(*k);
    set_output(p.k, *k_out, dims);
  }
  run(p, q);
  return {q_out, k_out};
}

void rope_raw_(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor position_ids, OptionalTensor cu_seqlens,
               ROPE_PARAMETERS, bool transposed) {
  const Layout dims = layout_of(kOp, q, layout);
  Tensor boundaries;
  RopeParams p = make_rope_params(q, k, cos, sin, {kOp, position_ids, cu_seqlens, ROPE_ARGUMENTS, transposed}, dims, boundaries);
  p.in_place = true;
  check_in_place(kOp, q, k);
  set_output(p.q, q, dims);
  if (k) set_output(p.k, *k, dims);
  run(p, q);
}

std::tuple<Tensor, OptionalTensor> rope(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor position_ids,
                                        OptionalTensor cu_seqlens, ROPE_PARAMETERS) {
  return rope_raw(q, k, cos, sin, position_ids, cu_seqlens, ROPE_ARGUMENTS, false);
}

void rope_(Tensor q, OptionalTensor k, Tensor cos, Tensor sin, OptionalTensor position_ids, OptionalTensor cu_seqlens,
           ROPE_PARAMETERS) {
  rope_raw_(q, k, cos, sin, position_ids, cu_seqlens, ROPE_ARGUMENTS, false);
}

}  // namespace
}  // namespace packops

#define ROPE_TABLES "Tensor cos, Tensor sin, Tensor? position_ids=None, Tensor? cu_seqlens=None, "
#define RAW_OPTIONS ", bool transposed=False"  // the backward pass

PACKOPS_SCHEMAS(m) {
  m.def("rope(Tensor q, Tensor? k, " ROPE_TABLES "*, " ROPE_OPTIONS ") -> (Tensor, Tensor?)");
  m.def("_rope(Tensor q, Tensor? k, " ROPE_TABLES ROPE_OPTIONS RAW_OPTIONS ") -> (Tensor, Tensor?)");
  m.def("rope_(Tensor(a!) q, Tensor(b!)? k, " ROPE_TABLES "*, " ROPE_OPTIONS ") -> ()");
  m.def("_rope_(Tensor(a!) q, Tensor(b!)? k, " ROPE_TABLES ROPE_OPTIONS RAW_OPTIONS ") -> ()");
}

PACKOPS_KERNELS(m) {
  m.impl("rope", TORCH_BOX(&packops::rope));
  m.impl("_rope", TORCH_BOX(&packops::rope_raw));
  m.impl("rope_", TORCH_BOX(&packops::rope_));
  m.impl("_rope_", TORCH_BOX(&packops::rope_raw_));
}

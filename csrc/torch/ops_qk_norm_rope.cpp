// Torch glue of RMS norm + RoPE: outputs, dispatch to the kernels of qk_norm_rope.h, registration.
#include <tuple>

#include "qk_norm_rope.h"
#include "torch/register.h"
#include "torch/rope_args.h"
#include "torch/stream.h"

namespace packops {
namespace {

constexpr const char* kOp = "qk_norm_rope";

// Checks the weights, and decides whether the mean runs over a head or over all heads of a token.
void set_weights(QkNormRopeParams& p, const Tensor& q, const Tensor& q_weight, const OptionalTensor& k_weight, double eps,
                 bool zero_centered) {
  const RopeParams& rope = p.rope;
  PACKOPS_CHECK((rope.k.heads > 0 || rope.k.in) == k_weight.has_value(), ValueError, kOp,
                ": k and k_weight must be given together");
  auto check = [&](const Tensor& weight, const char* name) {
    check_device(kOp, name, weight, "q", q);
    PACKOPS_CHECK(!is_index(kernel_dtype(weight, kOp, name)) && weight.scalar_type() == q_weight.scalar_type(), TypeError, kOp,
                  ": ", name, " must be floating, in the dtype of q_weight, got ", dtype_of(weight));
    PACKOPS_CHECK(weight.dim() == 1 && weight.is_contiguous(), ValueError, kOp, ": ", name,
                  " must be a contiguous vector, got shape ", shape_of(weight));
  };
  check(q_weight, "q_weight");
  if (k_weight) check(*k_weight, "k_weight");
  const int64_t dim = rope.head_dim, q_size = q_weight.size(0), k_size = k_weight ? k_weight->size(0) : dim;
  const bool per_head = q_size == dim && k_size == dim;
  const bool across = q_size == rope.q.heads * dim && (!k_weight || k_size == rope.k.heads * dim);
  PACKOPS_CHECK(per_head || across, ValueError, kOp, ": q_weight and k_weight must have head_dim = ", dim,
                " elements each (a norm per head), or ", rope.q.heads * dim, " and ", rope.k.heads * dim,
                " (one norm across all heads), got ", q_size, " and ", k_weight ? k_size : 0);
  check_not_negative(kOp, "eps", eps);
  p.across_heads = !per_head;
  p.q_weight = q_weight.data_ptr();
  p.k_weight = k_weight ? k_weight->data_ptr() : nullptr;
  p.weight_dtype = kernel_dtype(q_weight, kOp, "q_weight");
  p.eps = eps;
  p.zero_centered = zero_centered;
}

void run_cpu(const QkNormRopeParams& p) {
  check_rope_positions(kOp, p.rope);
  torch::stable::parallel_for(0, qk_norm_rope_cpu_shares(p), 1,
                              [&](int64_t begin, int64_t end) { qk_norm_rope_cpu(p, begin, end); });
  if (p.backward()) qk_norm_rope_cpu_finish(p);
}

void run(const QkNormRopeParams& p, const Tensor& q) {
  if (q.is_cpu()) return run_cpu(p);
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(q);
  check_cuda(qk_norm_rope_cuda(p, scope.stream()), kOp);
#endif
}

std::tuple<Tensor, OptionalTensor> qk_norm_rope(Tensor q, OptionalTensor k, Tensor q_weight, OptionalTensor k_weight, Tensor cos,
                                                Tensor sin, OptionalTensor position_ids, OptionalTensor cu_seqlens, double eps,
                                                bool zero_centered, ROPE_PARAMETERS) {
  const Layout dims = layout_of(kOp, q, layout);
  Tensor boundaries;
  QkNormRopeParams p;
  p.rope = make_rope_params(q, k, cos, sin, {kOp, position_ids, cu_seqlens, ROPE_ARGUMENTS, false}, dims, boundaries);
  set_weights(p, q, q_weight, k_weight, eps, zero_centered);
  Tensor q_out = empty_heads_like(q);
  set_output(p.rope.q, q_out, dims);
  OptionalTensor k_out;
  if (k) {
    k_out = empty_heads_like(*k);
    set_output(p.rope.k, *k_out, dims);
  }
  run(p, q);
  return {q_out, k_out};
}

std::tuple<Tensor, OptionalTensor, Tensor, OptionalTensor> qk_norm_rope_backward(
    Tensor q_grad, OptionalTensor k_grad, Tensor q, OptionalTensor k, Tensor q_weight, OptionalTensor k_weight, Tensor cos,
    Tensor sin, OptionalTensor position_ids, OptionalTensor cu_seqlens, double eps, bool zero_centered, ROPE_PARAMETERS) {
  const Layout dims = layout_of(kOp, q, layout);
  Tensor boundaries;
  QkNormRopeParams p;
  p.rope = make_rope_params(q, k, cos, sin, {kOp, position_ids, cu_seqlens, ROPE_ARGUMENTS, true}, dims, boundaries);
  set_weights(p, q, q_weight, k_weight, eps, zero_centered);
  PACKOPS_CHECK(k.has_value() == k_grad.has_value(), ValueError, kOp, ": k and its gradient must be given together");
  check_like(kOp, "the gradient of q", q_grad, "q", q);
  p.q_grad = heads_of(kOp, q_grad, dims, "the gradient of q");

  Tensor dq = empty_heads_like(q), dq_weight = allocate(q_weight, q_weight.sizes()), q_partial, k_partial;
  OptionalTensor dk, dk_weight;
  set_output(p.rope.q, dq, dims);
  p.q_weight_grad = dq_weight.data_ptr();
  if (k) {
    check_like(kOp, "the gradient of k", *k_grad, "k", *k);
    p.k_grad = heads_of(kOp, *k_grad, dims, "the gradient of k");
    dk = empty_heads_like(*k);
    dk_weight = allocate(*k_weight, k_weight->sizes());
    set_output(p.rope.k, *dk, dims);
    p.k_weight_grad = dk_weight->data_ptr();
  }

  if (q.is_cpu()) p.q_partials = p.k_partials = qk_norm_rope_cpu_shares(p);
#ifdef PACKOPS_WITH_CUDA
  else {
    const CudaScope scope(q);
    check_cuda(qk_norm_rope_cuda_partials(p), kOp);
  }
#endif
  const auto sums = p.rope.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  const int64_t q_shape[2] = {p.q_partials, qk_norm_weight_size(p, p.rope.q)},
                k_shape[2] = {p.k_partials, qk_norm_weight_size(p, p.rope.k)};
  q_partial = allocate(q, {q_shape, 2}, sums);
  p.q_partial = q_partial.data_ptr();
  if (k) {
    k_partial = allocate(q, {k_shape, 2}, sums);
    p.k_partial = k_partial.data_ptr();
  }
  run(p, q);
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace
}  // namespace packops

#define QK_INPUTS "Tensor q, Tensor? k, Tensor q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? position_ids"
#define NORM_OPTIONS "float eps, bool zero_centered=False, "

PACKOPS_SCHEMAS(m) {
  m.def("qk_norm_rope(" QK_INPUTS "=None, Tensor? cu_seqlens=None, *, " NORM_OPTIONS ROPE_OPTIONS ") -> (Tensor, Tensor?)");
  // The same without autograd.
  m.def("_qk_norm_rope(" QK_INPUTS ", Tensor? cu_seqlens, " NORM_OPTIONS ROPE_OPTIONS ") -> (Tensor, Tensor?)");
  m.def("_qk_norm_rope_backward(Tensor q_grad, Tensor? k_grad, " QK_INPUTS ", Tensor? cu_seqlens, " NORM_OPTIONS ROPE_OPTIONS
        ") -> (Tensor, Tensor?, Tensor, Tensor?)");
}

PACKOPS_KERNELS(m) {
  m.impl("qk_norm_rope", TORCH_BOX(&packops::qk_norm_rope));
  m.impl("_qk_norm_rope", TORCH_BOX(&packops::qk_norm_rope));
  m.impl("_qk_norm_rope_backward", TORCH_BOX(&packops::qk_norm_rope_backward));
}

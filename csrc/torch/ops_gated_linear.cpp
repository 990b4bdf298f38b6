// The gate of a gated MLP: checks, allocation, registration.
#include <tuple>

#include "gated_linear.h"
#include "torch/activation.h"
#include "torch/allocate.h"
#include "torch/dispatch.h"
#include "torch/register.h"
#include "torch/rows.h"
#include "torch/stream.h"

namespace packops {
namespace {

constexpr const char* kOp = "gated_activation";

void check_rows(const Tensor& tensor, const char* name) {
  PACKOPS_CHECK(has_contiguous_rows(tensor), ValueError, kOp, ": the last dimension of ", name,
                " must be contiguous, got stride ", tensor.stride(tensor.dim() - 1));
}

// The problem, with the tensors that its pointers lead to.
struct Gated {
  GatedParams params;
  Tensor gate, up, grad;
};

Gated prepare(const Tensor& gate, const Tensor& up, const StringArgument& activation) {
  PACKOPS_CHECK(gate.dim() >= 1, ValueError, kOp, ": gate must have shape (..., columns), got a 0-d tensor");
  Gated g;
  GatedParams& p = g.params;
  p.dtype = float_dtype(gate, kOp, "gate");
  check_like(kOp, "up", up, "gate", gate);
  check_rows(gate, "gate");
  check_rows(up, "up");
  p.activation = activation_of(activation, kOp);
  p.columns = gate.size(gate.dim() - 1);
  p.rows = p.columns ? gate.numel() / p.columns : 0;
  g.gate = set_rows(gate, &p.gate, &p.gate_row);
  g.up = set_rows(up, &p.up, &p.up_row);
  return g;
}

Tensor output(const Tensor& gate, void** data) {
  Tensor out = allocate(gate, gate.sizes());
  *data = out.mutable_data_ptr();
  return out;
}

void run(const GatedParams& p, const Tensor& gate) {
  if (gate.is_cpu())
    return torch::stable::parallel_for(0, p.rows * p.columns, 16384,
                                       [&](int64_t begin, int64_t end) { gated_cpu(p, begin, end); });
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(gate);
  check_cuda(gated_cuda(p, scope.stream()), kOp);
#endif
}

Tensor gated_activation(Tensor gate, Tensor up, StringArgument activation) {
  Gated g = prepare(gate, up, activation);
  const Tensor product = output(gate, &g.params.product);
  run(g.params, gate);
  return product;
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> gated_activation_backward(Tensor grad, Tensor gate, Tensor up,
                                                                                     StringArgument activation, bool with_product,
                                                                                     bool with_gate, bool with_up) {
  Gated g = prepare(gate, up, activation);
  check_like(kOp, "grad", grad, "gate", gate);
  g.grad = set_rows(grad, &g.params.grad, &g.params.grad_row);
  OptionalTensor product, grad_gate, grad_up;
  if (with_product) product = output(gate, &g.params.product);
  if (with_gate) grad_gate = output(gate, &g.params.grad_gate);
  if (with_up) grad_up = output(gate, &g.params.grad_up);
  run(g.params, gate);
  return {product, grad_gate, grad_up};
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
  m.def("gated_activation(Tensor gate, Tensor up, *, str activation=\"silu\") -> Tensor");
  m.def("_gated_activation(Tensor gate, Tensor up, str activation) -> Tensor");  // the same without autograd
  m.def(
      "_gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str activation, bool with_product=True, "
      "bool with_gate=True, bool with_up=True) -> (Tensor? product, Tensor? grad_gate, Tensor? grad_up)");
}

PACKOPS_KERNELS(m) {
  m.impl("gated_activation", TORCH_BOX(&packops::gated_activation));
  m.impl("_gated_activation", TORCH_BOX(&packops::gated_activation));
  m.impl("_gated_activation_backward", TORCH_BOX(&packops::gated_activation_backward));
}

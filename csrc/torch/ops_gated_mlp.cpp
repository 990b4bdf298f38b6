// The products of a gated MLP with the gate in their epilogues, as parts that Python's op is made of: checks, allocation, registration.
// Hopper only. Operands that these products cannot take give None, and nothing is done.
#include <tuple>
#include <vector>

#include "gated_mlp.h"
#include "torch/activation.h"
#include "torch/allocate.h"
#include "torch/check.h"
#include "torch/register.h"
#include "torch/stream.h"

#ifdef PACKOPS_WITH_CUDA

namespace packops {
namespace {

constexpr const char* kOp = "gated_mlp";

using Three = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor>;

bool is_matrix(const Tensor& x, const Tensor& like, int64_t rows, int64_t columns) {
  return x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && x.is_contiguous() &&
         x.scalar_type() == like.scalar_type() && same_device(x, like);
}

// Sizes and dtype of a problem whose left operand is (..., terms) and whose results are (..., columns). False: not for these products.
bool prepare(GatedMlpParams& p, const Tensor& left, int64_t columns, const StringArgument& activation) {
  const ScalarType dtype = left.scalar_type();
  if (left.dim() < 1 || !left.is_contiguous() || (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)) return false;
  p.dtype = dtype == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  p.activation = activation_of(activation, kOp);
  p.terms = left.size(left.dim() - 1);
  p.columns = columns;
  p.tokens = p.terms ? left.numel() / p.terms : 0;
  return true;
}

Three products(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight, StringArgument activation, bool keep) {
  GatedMlpParams p;
  const int64_t columns = gate_weight.dim() == 2 ? gate_weight.size(0) : 0;
  if (!prepare(p, x, columns, activation) || !is_matrix(gate_weight, x, columns, p.terms) ||
      !is_matrix(up_weight, x, columns, p.terms))
    return {};
  p.x = x.data_ptr();
  p.gate_weight = gate_weight.data_ptr();
  p.up_weight = up_weight.data_ptr();
  const CudaScope scope(x);
  if (!gated_mlp_fits(p)) return {};
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  const Tensor product = allocate(x, sizes);
  p.product = product.mutable_data_ptr();
  OptionalTensor gate, up;
  if (keep) {
    p.gate = gate.emplace(allocate(x, sizes)).mutable_data_ptr();
    p.up = up.emplace(allocate(x, sizes)).mutable_data_ptr();
  }
  check_cuda(gated_mlp_cuda(p, scope.stream()), kOp);
  return {gate, up, product};
}

Three products_backward(const Tensor& grad, const Tensor& down_weight, const Tensor& gate, const Tensor& up,
                        StringArgument activation, bool with_product) {
  GatedMlpParams p;
  const int64_t columns = gate.dim() >= 1 ? gate.size(gate.dim() - 1) : 0;
  const auto is_input = [&](const Tensor& x) {
    return x.dim() == grad.dim() && x.is_contiguous() && x.scalar_type() == grad.scalar_type() && same_device(x, grad) &&
           x.numel() == p.tokens * columns && x.size(x.dim() - 1) == columns;
  };
  if (!prepare(p, grad, columns, activation) || !is_matrix(down_weight, grad, p.terms, columns) || !is_input(gate) ||
      !is_input(up))
    return {};
  p.grad = grad.data_ptr();
  p.down_weight = down_weight.data_ptr();
  p.gate = gate.data_ptr();
  p.up = up.data_ptr();
  const CudaScope scope(grad);
  if (!gated_mlp_fits(p)) return {};
  const Tensor grad_gate = allocate(gate, gate.sizes()), grad_up = allocate(gate, gate.sizes());
  OptionalTensor product;
  if (with_product) p.product = product.emplace(allocate(gate, gate.sizes())).mutable_data_ptr();
  p.grad_gate = grad_gate.mutable_data_ptr();
  p.grad_up = grad_up.mutable_data_ptr();
  check_cuda(gated_mlp_cuda(p, scope.stream()), kOp);
  return {product, grad_gate, grad_up};
}

}  // namespace
}  // namespace packops

#endif

PACKOPS_SCHEMAS(m) {
  m.def(
      "_gated_mlp_products(Tensor x, Tensor gate_weight, Tensor up_weight, str activation, bool keep=True) -> (Tensor? gate, "
      "Tensor? up, Tensor? product)");
  m.def(
      "_gated_mlp_products_backward(Tensor grad, Tensor down_weight, Tensor gate, Tensor up, str activation, bool with_product) "
      "-> (Tensor? product, Tensor? grad_gate, Tensor? grad_up)");
}

#ifdef PACKOPS_WITH_CUDA
PACKOPS_KERNELS_FOR(CUDA, m) {
  m.impl("_gated_mlp_products", TORCH_BOX(&packops::products));
  m.impl("_gated_mlp_products_backward", TORCH_BOX(&packops::products_backward));
}
#endif

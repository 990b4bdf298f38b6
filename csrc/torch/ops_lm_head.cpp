// The lm_head's products, the first with the softmax in its epilogue, as parts that Python's loops over chunks of rows are made of:
// checks, allocation, registration. Hopper only; _fits says whether these operands can be taken.
#include <optional>
#include <tuple>
#include <utility>

#include "lm_head.h"
#include "torch/allocate.h"
#include "torch/check.h"
#include "torch/register.h"
#include "torch/stream.h"

#ifdef PACKOPS_WITH_CUDA

namespace packops {
namespace {

constexpr const char* kOp = "lm_head";

bool is_16_bit(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half; }
bool has_dims(const Tensor& x, int64_t dims) { return x.dim() == dims && x.is_contiguous(); }

void check_rows(const OptionalTensor& x, const Tensor& hidden, ScalarType dtype, const char* name) {
  if (!x) return;
  PACKOPS_CHECK(has_dims(*x, 1) && x->size(0) == hidden.size(0) && x->scalar_type() == dtype && same_device(*x, hidden),
                ValueError, kOp, ": ", name, " must be contiguous, one number a row, got shape ", shape_of(*x), " of ",
                dtype_of(*x));
}

template <typename T>
T* data_of(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

LmHeadParams operands(const Tensor& hidden, const Tensor& weight) {
  LmHeadParams p;
  p.rows = hidden.size(0);
  p.vocab = weight.size(0);
  p.width = hidden.size(1);
  p.dtype = hidden.scalar_type() == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  p.hidden = hidden.data_ptr();
  p.weight = weight.data_ptr();
  return p;
}

bool fits(const Tensor& hidden, const Tensor& weight) {
  if (!is_16_bit(hidden) || weight.scalar_type() != hidden.scalar_type() || !same_device(weight, hidden) ||
      !has_dims(hidden, 2) || !has_dims(weight, 2) || weight.size(1) != hidden.size(1))
    return false;
  const CudaScope scope(hidden);
  return lm_head_fits(operands(hidden, weight));
}

LmHeadParams checked(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias) {
  PACKOPS_CHECK(fits(hidden, weight), NotImplementedError, kOp, ": no product for hidden ", shape_of(hidden), " of ",
                dtype_of(hidden), " and weight ", shape_of(weight), " on ", device_of(hidden));
  LmHeadParams p = operands(hidden, weight);
  PACKOPS_CHECK(!bias || (has_dims(*bias, 1) && bias->size(0) == p.vocab && bias->scalar_type() == hidden.scalar_type() &&
                          same_device(*bias, hidden)),
                ValueError, kOp, ": bias must be contiguous, of shape (vocab,) and hidden's dtype");
  p.bias = data_of<void>(bias);
  return p;
}

LmHeadParams checked(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                     double logit_scale, std::optional<double> softcap) {
  LmHeadParams p = checked(hidden, weight, bias);
  check_rows(target, hidden, ScalarType::Int, "target");
  p.target = static_cast<const int32_t*>(target.data_ptr());
  p.logit_scale = float(logit_scale);
  p.softcap = float(softcap.value_or(0));
  return p;
}

void set_out(LmHeadParams& p, const Tensor& out, const Tensor& hidden) {
  PACKOPS_CHECK(out.dim() == 2 && out.size(0) == p.rows && out.size(1) == p.vocab && out.scalar_type() == hidden.scalar_type() &&
                    same_device(out, hidden) && (p.vocab == 1 || out.stride(1) == 1) && out.stride(0) % 8 == 0 &&
                    out.stride(0) >= p.vocab && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0,
                ValueError, kOp,
                ": out must be (rows, vocab) of hidden's dtype with rows that begin at multiples of 16 bytes, got ",
                shape_of(out));
  p.out = out.data_ptr();
  p.out_stride = out.stride(0);
}

Tensor new_floats(const Tensor& like, int64_t count) { return allocate(like, {count}, ScalarType::Float); }

void run(LmHeadPass pass, LmHeadParams& p, const Tensor& hidden) {
  const CudaScope scope(hidden);
  Tensor workspace;
  if (pass == LmHeadPass::statistics) {
    workspace = new_floats(hidden, lm_head_workspace(p));
    p.workspace = static_cast<float*>(workspace.data_ptr());
  }
  check_cuda(lm_head_cuda(pass, p, scope.stream()), kOp);
}

void logits(Tensor out, const Tensor& hidden, const Tensor& weight, OptionalTensor bias) {
  LmHeadParams p = checked(hidden, weight, bias);
  set_out(p, out, hidden);
  run(LmHeadPass::logits, p, hidden);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const Tensor& hidden, const Tensor& weight, OptionalTensor bias,
                                                      const Tensor& target, double logit_scale, std::optional<double> softcap,
                                                      bool with_entropy) {
  LmHeadParams p = checked(hidden, weight, bias, target, logit_scale, softcap);
  Tensor log_prob = new_floats(hidden, p.rows), entropy = new_floats(hidden, with_entropy ? p.rows : 0);
  Tensor row_max = new_floats(hidden, p.rows), log_sum = new_floats(hidden, p.rows);
  p.log_prob = static_cast<float*>(log_prob.data_ptr());
  if (with_entropy) p.entropy = static_cast<float*>(entropy.data_ptr());
  p.row_max = static_cast<float*>(row_max.data_ptr());
  p.log_sum = static_cast<float*>(log_sum.data_ptr());
  run(LmHeadPass::statistics, p, hidden);
  return {log_prob, entropy, row_max, log_sum};
}

void gradient(Tensor out, const Tensor& hidden, const Tensor& weight, OptionalTensor bias, const Tensor& target,
              const Tensor& row_max, const Tensor& log_sum, OptionalTensor on_p, OptionalTensor on_p_log, OptionalTensor on_label,
              double logit_scale, std::optional<double> softcap) {
  LmHeadParams p = checked(hidden, weight, bias, target, logit_scale, softcap);
  set_out(p, out, hidden);
  const std::pair<const char*, const OptionalTensor> rows[] = {
      {"row_max", row_max}, {"log_sum", log_sum}, {"on_p", on_p}, {"on_p_log", on_p_log}, {"on_label", on_label}};
  for (const auto& [name, x] : rows) check_rows(x, hidden, ScalarType::Float, name);
  p.row_max = static_cast<float*>(row_max.data_ptr());
  p.log_sum = static_cast<float*>(log_sum.data_ptr());
  p.on_p = data_of<float>(on_p);
  p.on_p_log = data_of<float>(on_p_log);
  p.on_label = data_of<float>(on_label);
  run(LmHeadPass::gradient, p, hidden);
}

LmHeadWeightGradientParams operands(const Tensor& out, const Tensor& grad_logits, const Tensor& hidden) {
  LmHeadWeightGradientParams p;
  p.tokens = hidden.size(0);
  p.vocab = grad_logits.size(1);
  p.width = hidden.size(1);
  p.dtype = hidden.scalar_type() == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
  p.grad_logits = grad_logits.data_ptr();
  p.grad_logits_stride = grad_logits.stride(0);
  p.hidden = hidden.data_ptr();
  p.out = out.data_ptr();
  p.wide = out.scalar_type() == ScalarType::Float;
  return p;
}

bool weight_gradient_fits(const Tensor& out, const Tensor& grad_logits, const Tensor& hidden) {
  if (!is_16_bit(hidden) || grad_logits.scalar_type() != hidden.scalar_type() ||
      (out.scalar_type() != hidden.scalar_type() && out.scalar_type() != ScalarType::Float) ||
      !same_device(grad_logits, hidden) || !same_device(out, hidden) || !has_dims(hidden, 2) || !has_dims(out, 2) ||
      grad_logits.dim() != 2 || grad_logits.size(0) != hidden.size(0) || out.size(0) != grad_logits.size(1) ||
      out.size(1) != hidden.size(1) || (grad_logits.size(1) != 1 && grad_logits.stride(1) != 1) ||
      grad_logits.stride(0) < grad_logits.size(1))
    return false;
  const CudaScope scope(hidden);
  return lm_head_weight_gradient_fits(operands(out, grad_logits, hidden));
}

void weight_gradient(Tensor out, const Tensor& grad_logits, const Tensor& hidden, OptionalTensor factor, bool add) {
  PACKOPS_CHECK(weight_gradient_fits(out, grad_logits, hidden), NotImplementedError, kOp, ": no product for grad_logits ",
                shape_of(grad_logits), " and hidden ", shape_of(hidden), " of ", dtype_of(hidden), " into out ", shape_of(out),
                " of ", dtype_of(out), " on ", device_of(hidden));
  LmHeadWeightGradientParams p = operands(out, grad_logits, hidden);
  PACKOPS_CHECK(!add || p.wide, TypeError, kOp, ": out must be torch.float32 where it is added to, got ", dtype_of(out));
  PACKOPS_CHECK(!factor || (factor->numel() == 1 && factor->scalar_type() == ScalarType::Float && same_device(*factor, hidden)),
                ValueError, kOp, ": factor must be one number, fp32 and on hidden's device");
  p.add = add;
  p.factor = data_of<const float>(factor);
  const CudaScope scope(hidden);
  check_cuda(lm_head_weight_gradient_cuda(p, scope.stream()), kOp);
}

}  // namespace
}  // namespace packops

#endif

PACKOPS_SCHEMAS(m) {
  m.def("_lm_head_fits(Tensor hidden, Tensor weight) -> bool");
  m.def("_lm_head_logits_(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias) -> ()");
  m.def(
      "_lm_head_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, float logit_scale, float? softcap, bool "
      "entropy) -> (Tensor log_prob, Tensor row_entropy, Tensor row_max, Tensor log_sum)");
  m.def(
      "_lm_head_gradient_(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor row_max, Tensor "
      "log_sum, Tensor? on_p, Tensor? on_p_log, Tensor? on_label, float logit_scale, float? softcap) -> ()");
  m.def("_lm_head_weight_gradient_fits(Tensor out, Tensor grad_logits, Tensor hidden) -> bool");
  m.def("_lm_head_weight_gradient_(Tensor(a!) out, Tensor grad_logits, Tensor hidden, Tensor? factor, bool add) -> ()");
}

#ifdef PACKOPS_WITH_CUDA
PACKOPS_KERNELS_FOR(CUDA, m) {
  m.impl("_lm_head_fits", TORCH_BOX(&packops::fits));
  m.impl("_lm_head_logits_", TORCH_BOX(&packops::logits));
  m.impl("_lm_head_statistics", TORCH_BOX(&packops::statistics));
  m.impl("_lm_head_gradient_", TORCH_BOX(&packops::gradient));
  m.impl("_lm_head_weight_gradient_fits", TORCH_BOX(&packops::weight_gradient_fits));
  m.impl("_lm_head_weight_gradient_", TORCH_BOX(&packops::weight_gradient));
}
#endif

// RMS norm of rows: checks, allocation, registration.
#include <tuple>

#include "rms_norm.h"
#include "rms_norm_launch.h"
#include "torch/allocate.h"
#include "torch/dispatch.h"
#include "torch/register.h"
#include "torch/rows.h"
#include "torch/stream.h"

namespace packops {
namespace {

constexpr const char *kRmsNorm = "rms_norm", *kAddRmsNorm = "add_rms_norm";

// The problem, with the tensors that its pointers lead to.
struct RmsNorm {
  RmsNormParams params;
  Tensor x, weight, added, grad;
};

// Rows as they are, or a copy where they are uneven or, on CUDA, do not begin at 16 bytes.
Tensor set_aligned_rows(const Tensor& tensor, const void** data, int64_t* stride, DType dtype) {
  const Tensor rows = set_rows(tensor, data, stride);
  if (tensor.is_cpu() || (reinterpret_cast<uintptr_t>(*data) | uintptr_t(*stride * size_of(dtype))) % 16 == 0) return rows;
  return set_rows(contiguous_copy(rows), data, stride);
}

RmsNorm prepare(const char* op, const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  RmsNormParams p;
  p.dtype = float_dtype(x, op, "x");
  PACKOPS_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), ValueError, op,
                ": weight must have as many elements as a row of x, ", shape_of(x), ", got ", shape_of(weight));
  check_dtype(op, "weight", weight, "x", x);
  check_device(op, "weight", weight, "x", x);
  check_not_negative(op, "eps", eps);
  p.columns = weight.size(0);
  p.rows = p.columns ? x.numel() / p.columns : 0;
  p.eps = eps, p.zero_centered = zero_centered;
  PACKOPS_CHECK(x.is_cpu() || p.columns == 0 || rms_norm_fits(p.columns, p.dtype), ValueError, op,
                ": on CUDA the last dimension of x must be a multiple of ", 16 / size_of(p.dtype), " and at most ",
                rms_norm_most_columns(p.dtype), ", got ", p.columns);
  RmsNorm norm{p, set_aligned_rows(x, &p.x, &p.x_row, p.dtype), as_contiguous(weight), {}, {}};
  int64_t unused = 0;
  norm.weight = set_aligned_rows(norm.weight, &p.weight, &unused, p.dtype);
  norm.params = p;
  return norm;
}

void set_added(const char* op, const char* name, const Tensor& added, const char* like_name, const Tensor& like, RmsNorm& norm) {
  check_like(op, name, added, like_name, like);
  norm.added = set_aligned_rows(added, &norm.params.added, &norm.params.added_row, norm.params.dtype);
}

void run(const char* op, const RmsNormParams& p, const Tensor& x) {
  if (p.columns == 0) return;
  if (x.is_cpu()) {
    torch::stable::parallel_for(0, rms_norm_cpu_shares(p), 1, [&](int64_t begin, int64_t end) { rms_norm_cpu(p, begin, end); });
    if (p.backward()) rms_norm_cpu_finish(p);
    return;
  }
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(x);
  check_cuda(rms_norm_cuda(p, scope.stream()), op);
#endif
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, bool zero_centered) {
  RmsNorm norm = prepare(kRmsNorm, x, weight, eps, zero_centered);
  const Tensor y = allocate(x, x.sizes());
  norm.params.out = y.mutable_data_ptr();
  run(kRmsNorm, norm.params, x);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps, bool zero_centered) {
  RmsNorm norm = prepare(kAddRmsNorm, x, weight, eps, zero_centered);
  set_added(kAddRmsNorm, "residual", residual, "x", x, norm);
  const Tensor y = allocate(x, x.sizes()), total = allocate(x, x.sizes());
  norm.params.out = y.mutable_data_ptr();
  norm.params.total = total.mutable_data_ptr();
  run(kAddRmsNorm, norm.params, x);
  return {y, total};
}

std::tuple<Tensor, Tensor> finish_backward(const char* op, RmsNorm norm, const Tensor& grad, const Tensor& x,
                                           const Tensor& weight) {
  RmsNormParams& p = norm.params;
  check_like(op, "grad", grad, "x", x);
  const Tensor weight_grad = allocate(weight, weight.sizes());
  p.weight_grad = weight_grad.mutable_data_ptr();
  norm.grad = set_aligned_rows(grad, &p.grad, &p.grad_row, p.dtype);
  if (x.is_cpu()) p.partials = rms_norm_cpu_shares(p);
#ifdef PACKOPS_WITH_CUDA
  else {
    const CudaScope scope(x);
    check_cuda(rms_norm_cuda_partials(p), op);
  }
#endif
  const Tensor partial = allocate(x, {p.partials, p.columns}, p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor dx = allocate(x, x.sizes());
  p.partial = partial.mutable_data_ptr();
  p.out = dx.mutable_data_ptr();
  run(op, p, x);
  return {dx, weight_grad};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, double eps, bool zero_centered) {
  return finish_backward(kRmsNorm, prepare(kRmsNorm, x, weight, eps, zero_centered), grad, x, weight);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(Tensor grad, Tensor grad_total, Tensor total, Tensor weight, double eps,
                                                 bool zero_centered) {
  RmsNorm norm = prepare(kAddRmsNorm, total, weight, eps, zero_centered);
  set_added(kAddRmsNorm, "grad_total", grad_total, "x", total, norm);
  return finish_backward(kAddRmsNorm, norm, grad, total, weight);
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
  m.def("rms_norm(Tensor x, Tensor weight, *, float eps, bool zero_centered=False) -> Tensor");
  m.def("_rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> Tensor");  // the same without autograd
  m.def(
      "_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool zero_centered) "
      "-> (Tensor grad_x, Tensor grad_weight)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, *, float eps, bool zero_centered=False) -> (Tensor y, Tensor "
      "total)");
  m.def("_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered) -> (Tensor y, Tensor total)");
  m.def(
      "_add_rms_norm_backward(Tensor grad, Tensor grad_total, Tensor total, Tensor weight, float eps, bool zero_centered) "
      "-> (Tensor grad_x, Tensor grad_weight)");
}

PACKOPS_KERNELS(m) {
  m.impl("add_rms_norm", TORCH_BOX(&packops::add_rms_norm));
  m.impl("_add_rms_norm", TORCH_BOX(&packops::add_rms_norm));
  m.impl("_add_rms_norm_backward", TORCH_BOX(&packops::add_rms_norm_backward));
  m.impl("rms_norm", TORCH_BOX(&packops::rms_norm));
  m.impl("_rms_norm", TORCH_BOX(&packops::rms_norm));
  m.impl("_rms_norm_backward", TORCH_BOX(&packops::rms_norm_backward));
}

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

constexpr const char* kOp = "rms_norm";

// The problem, with the tensors that its pointers lead to.
struct RmsNorm {
  RmsNormParams params;
  Tensor x, weight;
};

// Rows as they are, or a copy where they are uneven or, on CUDA, do not begin at 16 bytes.
Tensor set_aligned_rows(const Tensor& tensor, const void** data, int64_t* stride, DType dtype) {
  const Tensor rows = set_rows(tensor, data, stride);
  if (tensor.is_cpu() || (reinterpret_cast<uintptr_t>(*data) | uintptr_t(*stride * size_of(dtype))) % 16 == 0) return rows;
  return set_rows(contiguous_copy(rows), data, stride);
}

RmsNorm prepare(const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  RmsNormParams p;
  p.dtype = float_dtype(x, kOp, "x");
  PACKOPS_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), ValueError, kOp,
                ": weight must have as many elements as a row of x, ", shape_of(x), ", got ", shape_of(weight));
  check_dtype(kOp, "weight", weight, "x", x);
  check_device(kOp, "weight", weight, "x", x);
  check_not_negative(kOp, "eps", eps);
  p.columns = weight.size(0);
  p.rows = p.columns ? x.numel() / p.columns : 0;
  p.eps = eps, p.zero_centered = zero_centered;
  PACKOPS_CHECK(x.is_cpu() || p.columns == 0 || rms_norm_fits(p.columns, p.dtype), ValueError, kOp,
                ": on CUDA the last dimension of x must be a multiple of ", 16 / size_of(p.dtype), " and at most ",
                rms_norm_most_columns(p.dtype), ", got ", p.columns);
  RmsNorm norm{p, set_aligned_rows(x, &p.x, &p.x_row, p.dtype), as_contiguous(weight)};
  int64_t unused = 0;
  norm.weight = set_aligned_rows(norm.weight, &p.weight, &unused, p.dtype);
  norm.params = p;
  return norm;
}

void run(const RmsNormParams& p, const Tensor& x) {
  if (p.columns == 0) return;
  if (x.is_cpu()) {
    torch::stable::parallel_for(0, rms_norm_cpu_shares(p), 1, [&](int64_t begin, int64_t end) { rms_norm_cpu(p, begin, end); });
    if (p.backward()) rms_norm_cpu_finish(p);
    return;
  }
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(x);
  check_cuda(rms_norm_cuda(p, scope.stream()), kOp);
#endif
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, bool zero_centered) {
  RmsNorm norm = prepare(x, weight, eps, zero_centered);
  const Tensor y = allocate(x, x.sizes());
  norm.params.out = y.mutable_data_ptr();
  run(norm.params, x);
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, double eps, bool zero_centered) {
  RmsNorm norm = prepare(x, weight, eps, zero_centered);
  RmsNormParams& p = norm.params;
  check_like(kOp, "grad", grad, "x", x);
  const Tensor weight_grad = allocate(weight, weight.sizes());
  p.weight_grad = weight_grad.mutable_data_ptr();
  const Tensor rows = set_aligned_rows(grad, &p.grad, &p.grad_row, p.dtype);
  if (x.is_cpu()) p.partials = rms_norm_cpu_shares(p);
#ifdef PACKOPS_WITH_CUDA
  else {
    const CudaScope scope(x);
    check_cuda(rms_norm_cuda_partials(p), kOp);
  }
#endif
  const Tensor partial = allocate(x, {p.partials, p.columns}, p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor dx = allocate(x, x.sizes());
  p.partial = partial.mutable_data_ptr();
  p.out = dx.mutable_data_ptr();
  run(p, x);
  return {dx, weight_grad};
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
  m.def("rms_norm(Tensor x, Tensor weight, *, float eps, bool zero_centered=False) -> Tensor");
  m.def("_rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> Tensor");  // the same without autograd
  m.def(
      "_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool zero_centered) "
      "-> (Tensor grad_x, Tensor grad_weight)");
}

PACKOPS_KERNELS(m) {
  m.impl("rms_norm", TORCH_BOX(&packops::rms_norm));
  m.impl("_rms_norm", TORCH_BOX(&packops::rms_norm));
  m.impl("_rms_norm_backward", TORCH_BOX(&packops::rms_norm_backward));
}

// Rows times a factor, rounded once: checks, registration.
#include "scaled_rows.h"
#include "torch/dispatch.h"
#include "torch/overlap.h"
#include "torch/register.h"
#include "torch/rows.h"
#include "torch/stream.h"

namespace packops {
namespace {

constexpr const char* kOp = "scaled_rows";

// One number for each row: its data, which the tensor holds.
template <typename T>
const T* numbers_of_rows(const OptionalTensor& tensor, const char* name, ScalarType dtype, int64_t rows, const Tensor& out) {
  if (!tensor) return nullptr;
  PACKOPS_CHECK(tensor->numel() == rows && tensor->is_contiguous() && tensor->scalar_type() == dtype, ValueError, kOp, ": ", name,
                " must be contiguous, one ", torch::headeronly::toString(dtype), " for each of ", rows, " rows, got ",
                dtype_of(*tensor), " of shape ", shape_of(*tensor));
  check_device(kOp, name, *tensor, "out", out);
  return static_cast<const T*>(tensor->const_data_ptr());
}

void scaled_rows(Tensor out, const Tensor& x, OptionalTensor factor, OptionalTensor index, OptionalTensor target, bool add) {
  ScaledRowsParams p;
  p.x_dtype = float_dtype(x, kOp, "x");
  p.dtype = float_dtype(out, kOp, "out");
  check_device(kOp, "x", x, "out", out);
  PACKOPS_CHECK((p.x_dtype == DType::f64) == (p.dtype == DType::f64), TypeError, kOp,
                ": out must be float64 where x is, and only there, got ", dtype_of(out), " for ", dtype_of(x));
  PACKOPS_CHECK(out.dim() >= 1 && x.dim() >= 1 && out.is_contiguous(), ValueError, kOp,
                ": out and x must be rows, and out contiguous, got shapes ", shape_of(out), " and ", shape_of(x));
  p.columns = out.size(out.dim() - 1);
  PACKOPS_CHECK(x.size(x.dim() - 1) == p.columns && (index || x.numel() == out.numel()), ValueError, kOp,
                ": x must have the rows of out, ", shape_of(out), ", got ", shape_of(x));
  p.rows = p.columns ? out.numel() / p.columns : 0;
  if (p.rows == 0) return;

  const ScalarType wide = p.x_dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  p.factor_step = factor && factor->numel() != 1;
  p.factor = numbers_of_rows<void>(factor, "factor", wide, p.factor_step ? p.rows : 1, out);
  p.index = numbers_of_rows<int64_t>(index, "index", ScalarType::Long, p.rows, out);
  p.target = numbers_of_rows<int32_t>(target, "target", ScalarType::Int, p.rows, out);
  p.add = add;
  const Tensor rows = set_rows(x, &p.x, &p.x_row);
  p.out = out.mutable_data_ptr();
  const bool same = p.out == p.x && p.dtype == p.x_dtype && p.x_row == p.columns && !index;
  PACKOPS_CHECK(same || !share_memory(out, rows), ValueError, kOp, ": out must be x itself or share no memory with it");

  if (out.is_cpu()) {
    torch::stable::parallel_for(0, p.rows, 1 + 32768 / p.columns,
                                [&](int64_t begin, int64_t end) { scaled_rows_cpu(p, begin, end); });
    return;
  }
#ifdef PACKOPS_WITH_CUDA
  const CudaScope scope(out);
  check_cuda(scaled_rows_cuda(p, scope.stream()), kOp);
#endif
}

}  // namespace
}  // namespace packops

PACKOPS_SCHEMAS(m) {
  m.def(
      "_scaled_rows_(Tensor(a!) out, Tensor x, Tensor? factor=None, Tensor? index=None, Tensor? target=None, bool add=False) "
      "-> ()");
}

PACKOPS_KERNELS(m) { m.impl("_scaled_rows_", TORCH_BOX(&packops::scaled_rows)); }

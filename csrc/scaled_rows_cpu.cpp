// Rows times a factor, rounded once, on the CPU; formulas in scaled_rows.h. Bound by memory.
#include "scaled_rows.h"

#include <algorithm>
#include <type_traits>

#include "common/real.h"

namespace packops {
namespace {

template <typename In, typename Out>
void run(const ScaledRowsParams& p, int64_t begin, int64_t end) {
  using Real = std::conditional_t<std::is_same_v<In, double>, double, float>;
  for (int64_t r = begin; r < end; r++) {
    const In* x = static_cast<const In*>(p.x) + (p.index ? p.index[r] : r) * p.x_row;
    Out* out = static_cast<Out*>(p.out) + r * p.columns;
    if (p.target && p.target[r] < 0) {
      if (!p.add) std::fill_n(out, p.columns, Out{});
      continue;
    }
    const Real factor = p.factor ? static_cast<const Real*>(p.factor)[r * p.factor_step] : Real(1);
    if (p.add)
      for (int64_t c = 0; c < p.columns; c++) store(out[c], to_real(out[c]) + factor * to_real(x[c]));
    else
      for (int64_t c = 0; c < p.columns; c++) store(out[c], factor * to_real(x[c]));
  }
}

}  // namespace

void scaled_rows_cpu(const ScaledRowsParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f64) return run<double, double>(p, begin, end);
  dispatch_float<false>(p.x_dtype, [&](auto in) {
    dispatch_float<false>(p.dtype, [&](auto out) { run<decltype(in), decltype(out)>(p, begin, end); });
  });
}

}  // namespace packops

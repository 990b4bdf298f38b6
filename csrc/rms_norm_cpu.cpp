// RMS norm of rows on the CPU: the formulas of rms_norm.h, one row at a time, in fp32 (fp64 for fp64). Plain code, because it is
// the reference for rms_norm.cu.
#include "rms_norm.h"

#include <algorithm>
#include <cmath>

#include "common/real.h"

namespace packops {
namespace {

constexpr int64_t kShares = 64;

template <typename T>
void run_share(const RmsNormParams& p, int64_t share) {
  using Real = decltype(to_real(T{}));
  const T* weight = static_cast<const T*>(p.weight);
  Real* sums = static_cast<Real*>(p.partial) + share * p.columns;
  const Real one = p.zero_centered;
  const int64_t shares = rms_norm_cpu_shares(p), begin = p.rows * share / shares, end = p.rows * (share + 1) / shares;
  if (p.backward()) std::fill(sums, sums + p.columns, Real(0));
  for (int64_t row = begin; row < end; row++) {
    const T *x = static_cast<const T*>(p.x) + row * p.x_row, *grad = static_cast<const T*>(p.grad) + row * p.grad_row;
    const T* added = p.added ? static_cast<const T*>(p.added) + row * p.added_row : nullptr;
    T* out = static_cast<T*>(p.out) + row * p.columns;
    if (p.total) {
      T* total = static_cast<T*>(p.total) + row * p.columns;
      for (int64_t i = 0; i < p.columns; i++) store(total[i], to_real(x[i]) + to_real(added[i]));
      x = total;
    }
    double square = 0, product = 0;  // fp64: a single sum over a row would lose digits in fp32
    for (int64_t i = 0; i < p.columns; i++) square += double(to_real(x[i])) * to_real(x[i]);
    const Real r = Real(1 / std::sqrt(square / double(p.columns) + p.eps));
    if (!p.backward()) {
      for (int64_t i = 0; i < p.columns; i++) store(out[i], to_real(x[i]) * r * (to_real(weight[i]) + one));
      continue;
    }
    for (int64_t i = 0; i < p.columns; i++) product += double(to_real(grad[i])) * (to_real(weight[i]) + one) * to_real(x[i]);
    const Real mean = r * Real(product / double(p.columns));
    for (int64_t i = 0; i < p.columns; i++) {
      const Real n = to_real(x[i]) * r, g = to_real(grad[i]);
      sums[i] += g * n;
      const Real dx = r * (g * (to_real(weight[i]) + one) - n * mean);
      store(out[i], added ? dx + to_real(added[i]) : dx);
    }
  }
}

}  // namespace

int64_t rms_norm_cpu_shares(const RmsNormParams& p) { return std::max<int64_t>(1, std::min(kShares, p.rows)); }

void rms_norm_cpu(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_float<true>(p.dtype, [&](auto type) {
    for (int64_t share = begin; share < end; share++) run_share<decltype(type)>(p, share);
  });
}

void rms_norm_cpu_finish(const RmsNormParams& p) {
  dispatch_float<true>(p.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = decltype(to_real(T{}));
    const Real* partial = static_cast<const Real*>(p.partial);
    for (int64_t i = 0; i < p.columns; i++) {
      Real sum = 0;
      for (int64_t share = 0; share < p.partials; share++) sum += partial[share * p.columns + i];
      store(static_cast<T*>(p.weight_grad)[i], sum);
    }
  });
}

}  // namespace packops

// The gate of a gated MLP on the CPU: the interface of gated_linear.h, one pass over all matrices. fp64 serves gradient checks
// only, so it is plain code. gated_linear_simd.h computes the other types, with the best instruction set of the machine.
#include "gated_linear_cpu.h"

#include <algorithm>

#define PACKOPS_SIMD_FILE "gated_linear_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

struct GateF64 {
  double share, slope;
};

GateF64 gate_of(Activation activation, double g) {
  constexpr double kPi = 3.14159265358979323846;
  if (activation == Activation::gelu) return {std::erfc(-g / std::sqrt(2.0)) / 2, std::exp(-g * g / 2) / std::sqrt(2 * kPi)};
  double x = g, derivative = 1;
  if (activation == Activation::gelu_tanh) {
    const double scale = 2 * std::sqrt(2 / kPi), cubic = 0.044715, square = std::min<double>(g * g, kGeluSquareLimit);
    x = scale * g * (1 + cubic * square);
    derivative = scale * (1 + 3 * cubic * square);
  }
  const double a = std::exp(-std::abs(x)), larger = 1 / (1 + a), smaller = a * larger;
  return {g < 0 ? smaller : larger, larger * smaller * derivative};
}

void run_f64(const GatedParams& p, int64_t row, int64_t column, int64_t count) {
  const auto s = gated_stretch_at<double>(p, row, column);
  for (int64_t i = 0; i < count; i++) {
    const GateF64 at = gate_of(p.activation, s.gate[i]);
    const double value = s.gate[i] * at.share;
    if (s.product) s.product[i] = value * s.up[i];
    if (s.grad_gate) s.grad_gate[i] = s.grad[i] * (s.up[i] * (at.share + s.gate[i] * at.slope));
    if (s.grad_up) s.grad_up[i] = s.grad[i] * value;
  }
}

void run(const GatedParams& p, int64_t row, int64_t column, int64_t count) {
  if (p.dtype == DType::f64) return run_f64(p, row, column, count);
  PACKOPS_BEST_ISA(gated_any)(p, row, column, count);
}

}  // namespace

void gated_cpu(const GatedParams& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / p.columns, column = begin % p.columns, count = std::min(end - begin, p.columns - column);
    run(p, row, column, count);
    begin += count;
  }
}

}  // namespace packops

// The gate of a gated MLP on the CPU against its formula in long double, on every instruction set; and how gated_linear.cu cuts
// its work.
#include <algorithm>

#include "gated_linear_cpu.h"
#include "gated_linear_launch.h"

#define PACKOPS_SIMD_FILE "gated_linear_simd.h"
#include "common/simd_targets.h"

#include "isa.h"

using namespace packops;

namespace {

constexpr Activation kAll[] = {Activation::silu, Activation::gelu_tanh, Activation::gelu};

struct Exact {
  double value, slope;  // f(g), f'(g)
};

Exact exact(Activation activation, long double g) {
  const long double pi = std::acos(-1.0L);
  if (activation == Activation::gelu) {
    const long double share = std::erfc(-g / std::sqrt(2.0L)) / 2;
    return {double(g * share), double(share + g * std::exp(-g * g / 2) / std::sqrt(2 * pi))};
  }
  const bool tanh = activation == Activation::gelu_tanh;
  const long double u = tanh ? 2 * std::sqrt(2 / pi) * (g + 0.044715L * g * g * g) : g;
  const long double du = tanh ? 2 * std::sqrt(2 / pi) * (1 + 3 * 0.044715L * g * g) : 1;
  const long double s = 1 / (1 + std::exp(-u)), rest = 1 / (1 + std::exp(u));
  return {double(g * s), double(s + g * s * rest * du)};
}

}  // namespace

CASE(every_instruction_set_is_exact_to_a_few_units) {
  for_each_isa([](CpuIsa isa) {
    for (Activation activation : kAll) {
      std::vector<float> gate, up, grad;
      for (float g = -20; g <= 20; g += 0.0137f) gate.push_back(g), up.push_back(1), grad.push_back(1);
      const int64_t count = int64_t(gate.size());  // no multiple of a vector
      CHECK(count % 16 != 0);
      std::vector<float> product(count + 1, 7), grad_gate(product), grad_up(product);
      GatedParams p;
      p.gate = gate.data(), p.up = up.data(), p.grad = grad.data();
      p.product = product.data(), p.grad_gate = grad_gate.data(), p.grad_up = grad_up.data();
      p.rows = 1, p.columns = count, p.activation = activation;
      PACKOPS_OF_ISA(isa, gated_any)(p, 0, 0, count);
      double worst = 0;
      for (int64_t i = 0; i < count; i++) {
        const Exact want = exact(activation, gate[i]);
        worst = std::max(worst, std::abs(product[i] - want.value) / (0.1 + std::abs(want.value)));
        worst = std::max(worst, std::abs(grad_gate[i] - want.slope) / (0.1 + std::abs(want.slope)));
        CHECK_EQ(grad_up[i], product[i]);
      }
      CHECK(worst < 1e-6);
      for (const auto* out : {&product, &grad_gate, &grad_up}) CHECK_EQ(out->back(), 7.f);  // somebody else's memory
    }
  });
}

CASE(threads_share_rows_anywhere) {
  // A range ends in the middle of a row; rows of the inputs lie apart, each by another gap, those of the outputs do not.
  constexpr int64_t kRows = 5, kColumns = 37, kGate = kColumns + 3, kUp = kColumns + 5, kGrad = kColumns + 1;
  check::Random random{1};
  std::vector<double> gate(kRows * kGate), up(kRows * kUp), grad(kRows * kGrad);
  for (auto* in : {&gate, &up, &grad})
    for (double& x : *in) x = random.normal();
  std::vector<double> outs[2][3];
  for (int64_t step : {kRows * kColumns, int64_t(29)}) {
    auto& out = outs[step == 29];
    for (auto& x : out) x.assign(kRows * kColumns, 7);
    GatedParams p;
    p.gate = gate.data(), p.up = up.data(), p.grad = grad.data();
    p.gate_row = kGate, p.up_row = kUp, p.grad_row = kGrad;
    p.product = out[0].data(), p.grad_gate = out[1].data(), p.grad_up = out[2].data();
    p.rows = kRows, p.columns = kColumns, p.dtype = DType::f64, p.activation = Activation::gelu_tanh;
    for (int64_t begin = 0; begin < kRows * kColumns; begin += step)
      gated_cpu(p, begin, std::min(begin + step, kRows * kColumns));
  }
  for (int i : {0, 1, 2}) CHECK(outs[0][i] == outs[1][i]);
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t c = 0; c < kColumns; c++) {
      const Exact want = exact(Activation::gelu_tanh, gate[r * kGate + c]);
      const double x = up[r * kUp + c], g = grad[r * kGrad + c];
      CHECK_CLOSE(outs[0][0][r * kColumns + c], want.value * x, 1e-14);
      CHECK_CLOSE(outs[0][1][r * kColumns + c], want.slope * x * g, 1e-14);
      CHECK_CLOSE(outs[0][2][r * kColumns + c], want.value * g, 1e-14);
    }
}

// ---- The choice of a launch.

namespace {

GatedParams problem(int64_t rows, int64_t columns, int64_t stride, bool backward, uintptr_t address = 0,
                    DType dtype = DType::bf16) {
  GatedParams p;
  p.dtype = dtype;
  const auto at = [&](int i) { return reinterpret_cast<void*>(uintptr_t(i) * (uintptr_t(1) << 40) + address); };
  p.gate = at(1), p.up = at(2), p.product = at(3);
  if (backward) p.grad = at(4), p.grad_gate = at(5), p.grad_up = at(6), p.grad_row = stride;
  p.gate_row = p.up_row = stride;
  p.rows = rows, p.columns = columns;
  return gated_as_one_row(p);
}

}  // namespace

CASE(a_launch_covers_every_element_and_little_else) {
  for (bool backward : {false, true})
    for (DType dtype : {DType::bf16, DType::f32})
      for (int64_t rows : {int64_t(1), int64_t(7), int64_t(16384), int64_t(1) << 22})
        for (int64_t columns : {1, 7, 48, 520, 4096, 8192, 8193, 28672})
          for (int64_t gap : {int64_t(0), columns}) {
            const GatedParams p = problem(rows, columns, columns + gap, backward, 0, dtype);
            const GatedLaunch launch = choose_gated_launch(p);
            const int64_t width = launch.threads_per_row * (16 / size_of(dtype)) * gated_unroll(backward);
            const int threads = launch.threads_per_row * launch.rows_per_block;
            CHECK(threads >= 1 && threads <= kGatedThreads);
            CHECK(int64_t(launch.column_blocks) * width >= p.columns);
            CHECK((int64_t(launch.column_blocks) - 1) * width < p.columns);
            CHECK(int64_t(launch.row_blocks) * launch.rows_per_block >= p.rows);
            CHECK((int64_t(launch.row_blocks) - 1) * launch.rows_per_block < p.rows);
            CHECK(int64_t(launch.column_blocks) * launch.row_blocks < (int64_t(1) << 31));
          }
}

CASE(a_launch_takes_vectors_where_addresses_allow) {
  const auto aligned = [](int64_t rows, int64_t columns, int64_t stride, uintptr_t address = 0) {
    return choose_gated_launch(problem(rows, columns, stride, true, address)).aligned;
  };
  CHECK(aligned(16384, 8192, 8192));
  CHECK(aligned(16384, 8192, 16384));     // halves of a fused projection
  CHECK(aligned(3, 8193, 8193));          // rows that follow each other are one
  CHECK(!aligned(3, 8193, 16386));        // and these are not
  CHECK(!aligned(16384, 8192, 8196));     // 8 bytes off in every second row
  CHECK(!aligned(16384, 8192, 8192, 8));  // all of it
  CHECK(aligned(1, 7, 9));                // one row: no stride matters
  CHECK(!aligned(4, 12, 16));             // the outputs' rows follow each other
  for (int64_t GatedParams::* stride : {&GatedParams::gate_row, &GatedParams::up_row, &GatedParams::grad_row}) {
    GatedParams p = problem(5, 64, 64, true);
    p.rows = 5, p.columns = 64;
    p.*stride = 68;
    CHECK(!choose_gated_launch(p).aligned);
    p.*stride = 72;
    CHECK(choose_gated_launch(p).aligned);
  }
}

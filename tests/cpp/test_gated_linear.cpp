// The gate of a gated MLP on the CPU against its formula, and how gated_linear.cu cuts its work.
#include "check.h"
#include "gated_linear_launch.h"

using namespace packops;

CASE(gate_and_its_derivatives) {
  check::Random random{1};
  std::vector<float> gate(257), up(257), grad(257), product(257), grad_gate(257), grad_up(257);
  for (size_t i = 0; i < gate.size(); i++) {
    gate[i] = float(i % 5 ? 3 * random.normal() : 60 * random.normal());
    up[i] = float(random.normal());
    grad[i] = float(random.normal());
  }
  GatedParams p{gate.data(), up.data(), grad.data(), 257, 257, 257, product.data(), grad_gate.data(), grad_up.data(), 1, 257};
  for (const Activation activation : {Activation::silu, Activation::gelu_tanh, Activation::gelu}) {
    p.activation = activation;
    gated_cpu(p, 0, 100);
    gated_cpu(p, 100, 257);
    const auto f = [&](double g) {
      if (activation == Activation::silu) return g / (1 + std::exp(-g));
      if (activation == Activation::gelu) return g * std::erfc(-g / std::sqrt(2.0)) / 2;
      return g / 2 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (g + 0.044715 * g * g * g)));
    };
    for (size_t i = 0; i < gate.size(); i++) {
      const double slope = (f(gate[i] + 1e-6) - f(gate[i] - 1e-6)) / 2e-6;
      CHECK_CLOSE(product[i], f(gate[i]) * up[i], 1e-6);
      CHECK_CLOSE(grad_up[i], grad[i] * f(gate[i]), 1e-6);
      CHECK_CLOSE(grad_gate[i], grad[i] * up[i] * slope, 1e-5);
    }
  }
}

CASE(every_element_has_a_thread) {
  alignas(16) static char data[16];
  for (const int64_t rows : {1, 3, 1000})
    for (const int64_t columns : {1, 7, 8, 2048, 8192, 8193, 100000})
      for (const bool backward : {false, true})
        for (const int size : {2, 4}) {
          GatedParams p;
          p.gate = p.up = data;
          p.grad = backward ? data : nullptr;
          p.product = data;
          p.gate_row = p.up_row = p.grad_row = p.columns = columns;
          p.rows = rows;
          const GatedLaunch launch = choose_gated_launch(p, size);
          const int64_t per_thread = 16 / size * gated_unroll(backward);
          CHECK(launch.threads_per_row * launch.rows_per_block <= kGatedThreads);
          CHECK(int64_t(launch.column_blocks) * launch.threads_per_row * per_thread >= columns);
          CHECK(int64_t(launch.column_blocks - 1) * launch.threads_per_row * per_thread < columns);
          CHECK(int64_t(launch.row_blocks) * launch.rows_per_block >= rows);
          CHECK_EQ(launch.aligned, rows == 1 || columns * size % 16 == 0);
          p.up = data + size;
          CHECK(!choose_gated_launch(p, size).aligned);
        }
}

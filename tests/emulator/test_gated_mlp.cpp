// The products of a gated MLP, emulated, against fp64 and the CPU's gate.
#include "gated_mlp.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "kernel_dtype.h"

using namespace packops;

namespace {

constexpr float kUntouched = 77;

template <typename T>
struct Matrix {
  int64_t rows, columns;
  std::vector<T> data;
  Matrix(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), data(size_t(rows * columns + 64), from_float<T>(kUntouched)) {}
  Matrix(int64_t rows, int64_t columns, double size, check::Random& random) : Matrix(rows, columns) {
    for (size_t i = 0; i < size_t(rows * columns); i++) data[i] = from_float<T>(float(size * random.normal()));
  }
  double operator()(int64_t i, int64_t j) const { return to_float(data[size_t(i * columns + j)]); }
  bool beyond_is_untouched() const {
    for (size_t i = size_t(rows * columns); i < data.size(); i++)
      if (to_float(data[i]) != kUntouched) return false;
    return true;
  }
};

template <typename T>
constexpr double kUnit = std::is_same_v<T, half_t> ? 0x1p-10 : 0x1p-7;  // one unit of a result where the two round differently

template <typename T>
int wrong_in(const Matrix<T>& found, const Matrix<T>& expected) {
  int wrong = !found.beyond_is_untouched();
  for (int64_t i = 0; i < found.rows; i++)
    for (int64_t j = 0; j < found.columns; j++) wrong += !check::close(found(i, j), expected(i, j), kUnit<T>);
  return wrong;
}

// The gate as the CPU computes it, of what the products were given or have made.
template <typename T>
struct Expected {
  Matrix<T> product, grad_gate, grad_up;
  Expected(const Matrix<T>& gate, const Matrix<T>& up, const Matrix<T>* grad, Activation activation)
      : product(gate.rows, gate.columns), grad_gate(product), grad_up(product) {
    GatedParams p;
    p.gate = gate.data.data(), p.up = up.data.data(), p.product = product.data.data();
    if (grad) p.grad = grad->data.data(), p.grad_gate = grad_gate.data.data(), p.grad_up = grad_up.data.data();
    p.rows = 1, p.columns = p.gate_row = p.up_row = p.grad_row = gate.rows * gate.columns;
    p.dtype = kType<T>, p.activation = activation;
    gated_cpu(p, 0, p.columns);
  }
};

template <typename T>
void forward(int64_t tokens, int64_t columns, int64_t terms, Activation activation) {
  check::Random random(uint64_t(tokens * 1000 + columns));
  const Matrix<T> x(tokens, terms, 2, random), gate_weight(columns, terms, 1 / std::sqrt(terms), random),
      up_weight(columns, terms, 1 / std::sqrt(terms), random);
  Matrix<T> gate(tokens, columns), up(gate), product(gate), exact_gate(gate), exact_up(gate);
  GatedMlpParams p;
  p.tokens = tokens, p.columns = columns, p.terms = terms, p.dtype = kType<T>, p.activation = activation;
  p.x = x.data.data(), p.gate_weight = gate_weight.data.data(), p.up_weight = up_weight.data.data();
  p.gate = gate.data.data(), p.up = up.data.data(), p.product = product.data.data();
  CHECK(gated_mlp_fits(p));
  CHECK_EQ(gated_mlp_cuda(p, nullptr), cudaSuccess);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < columns; j++) {
      double g = 0, u = 0;
      for (int64_t k = 0; k < terms; k++) g += x(t, k) * gate_weight(j, k), u += x(t, k) * up_weight(j, k);
      exact_gate.data[size_t(t * columns + j)] = from_float<T>(float(g));
      exact_up.data[size_t(t * columns + j)] = from_float<T>(float(u));
    }
  CHECK_EQ(wrong_in(gate, exact_gate), 0);
  CHECK_EQ(wrong_in(up, exact_up), 0);
  CHECK_EQ(wrong_in(product, Expected<T>(gate, up, nullptr, activation).product), 0);
}

template <typename T>
void backward(int64_t tokens, int64_t columns, int64_t terms, Activation activation, bool with_product = true) {
  check::Random random(uint64_t(tokens * 1000 + columns));
  const Matrix<T> grad(tokens, terms, 1, random), down_weight(terms, columns, 1 / std::sqrt(terms), random);
  Matrix<T> gate(tokens, columns, 3, random), up(tokens, columns, 3, random), product(tokens, columns), grad_gate(product),
      grad_up(product), inner(product);
  constexpr float kHuge[] = {1e30f, -1e30f, 65504.f, -65504.f, INFINITY, -INFINITY, NAN, 100.f, -100.f};
  for (size_t i = 0; i < 8; i++) gate.data[i] = from_float<T>(kHuge[i]);  // where formulas like to break
  GatedMlpParams p;
  p.tokens = tokens, p.columns = columns, p.terms = terms, p.dtype = kType<T>, p.activation = activation;
  p.grad = grad.data.data(), p.down_weight = down_weight.data.data(), p.gate = gate.data.data(), p.up = up.data.data();
  p.grad_gate = grad_gate.data.data(), p.grad_up = grad_up.data.data();
  p.product = with_product ? product.data.data() : nullptr;
  CHECK(gated_mlp_fits(p));
  CHECK_EQ(gated_mlp_cuda(p, nullptr), cudaSuccess);
  // The kernel's is not rounded in between. So that the difference is one unit, the CPU's gate gets it in fp32.
  Matrix<float> exact(tokens, columns), wide_gate(tokens, columns), wide_up(tokens, columns);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < columns; j++) {
      const size_t at = size_t(t * columns + j);
      double d = 0;
      for (int64_t k = 0; k < terms; k++) d += grad(t, k) * down_weight(k, j);
      exact.data[at] = float(d), wide_gate.data[at] = float(gate(t, j)), wide_up.data[at] = float(up(t, j));
    }
  const Expected<float> expected(wide_gate, wide_up, &exact, activation);
  const auto narrow = [&](const Matrix<float>& wide) {
    Matrix<T> made(tokens, columns);
    for (size_t i = 0; i < size_t(tokens * columns); i++) made.data[i] = from_float<T>(wide.data[i]);
    return made;
  };
  CHECK_EQ(wrong_in(grad_gate, narrow(expected.grad_gate)), 0);
  CHECK_EQ(wrong_in(grad_up, narrow(expected.grad_up)), 0);
  CHECK_EQ(wrong_in(product, with_product ? narrow(expected.product) : Matrix<T>(tokens, columns)), 0);
  if (!with_product) CHECK(to_float(product.data[0]) == kUntouched);
}

}  // namespace

CASE(gate_and_up) {
  if (!emulator::code_has_wgmma) return;
  forward<bf16_t>(1, 8, 8, Activation::silu);
  forward<half_t>(130, 104, 72, Activation::gelu_tanh);  // two blocks of rows, some columns in a second tile
  forward<bf16_t>(9, 200, 136, Activation::gelu_tanh);
  forward<bf16_t>(300, 488, 392, Activation::silu);  // several turns of each consumer, and of the ring in each
}

CASE(gradients_of_gate_and_up) {
  if (!emulator::code_has_wgmma) return;
  backward<bf16_t>(1, 8, 8, Activation::silu);
  backward<half_t>(130, 200, 72, Activation::gelu_tanh);
  backward<bf16_t>(65, 40, 136, Activation::gelu_tanh, false);
  backward<bf16_t>(300, 1000, 264, Activation::silu);
}

CASE(what_does_not_fit) {
  alignas(16) static char memory[64];
  GatedMlpParams p;
  p.tokens = 4, p.columns = 16, p.terms = 8, p.x = p.gate_weight = p.up_weight = memory;
  CHECK_EQ(gated_mlp_fits(p), emulator::code_has_wgmma);
  for (const auto& spoil : std::vector<void (*)(GatedMlpParams&)>{
           [](auto& q) { q.columns = 12; }, [](auto& q) { q.columns = 0; }, [](auto& q) { q.terms = 4; },
           [](auto& q) { q.dtype = DType::f32; }, [](auto& q) { q.activation = Activation::gelu; },
           [](auto& q) { q.x = memory + 2; }, [](auto& q) { q.gate_weight = memory + 8; },
           [](auto& q) { q.up_weight = memory + 8; }, [](auto& q) { q.grad = memory + 8; },
           [](auto& q) { q.down_weight = memory + 4; }, [](auto& q) { q.gate = memory + 8; },
           [](auto& q) { q.up = memory + 8; }}) {
    GatedMlpParams q = p;
    spoil(q);
    CHECK(!gated_mlp_fits(q));
  }
}

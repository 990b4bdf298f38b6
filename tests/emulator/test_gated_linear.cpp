// The CUDA kernel of the gate of a gated MLP, emulated, against that of the CPU.
#include "gated_linear.h"

#include <array>
#include <cstring>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "kernel_dtype.h"

using namespace packops;

namespace {

using Gaps = std::array<int64_t, 3>;  // elements between the rows of gate, up and the gradient
constexpr Gaps kNone = {0, 0, 0};
Gaps from(int64_t gap) { return {gap, gap + 8, gap + 16}; }

// In buffers that begin `offset` elements late. wanted: of product, grad_gate, grad_up; 0: forward.
template <typename T>
void compare(int64_t rows, int64_t columns, const Gaps& gaps, int64_t offset, Activation activation, int wanted) {
  check::Random random{uint64_t(rows * 1000 + columns)};
  std::vector<T> in[3], out[2][3];
  for (size_t i : {0, 1, 2}) {
    in[i].resize(size_t(rows * (columns + gaps[i]) + offset));
    for (T& v : in[i]) v = from_float<T>(float(3 * random.normal()));
  }
  for (size_t i = 0; i < 9 && i < in[0].size() - size_t(offset); i++) {  // where formulas like to break
    constexpr float kHuge[] = {1e30f, -1e30f, 65504.f, -65504.f, INFINITY, -INFINITY, NAN, 100.f, -100.f};
    in[0][size_t(offset) + i] = from_float<T>(kHuge[i]);
  }
  for (bool cuda : {false, true}) {
    for (auto& x : out[cuda]) x.assign(size_t(rows * columns + offset), from_float<T>(77));
    GatedParams p;
    p.gate = in[0].data() + offset, p.up = in[1].data() + offset;
    p.gate_row = columns + gaps[0], p.up_row = columns + gaps[1];
    if (wanted) p.grad = in[2].data() + offset, p.grad_row = columns + gaps[2];
    if (wanted == 0 || wanted & 1) p.product = out[cuda][0].data() + offset;
    if (wanted & 2) p.grad_gate = out[cuda][1].data() + offset;
    if (wanted & 4) p.grad_up = out[cuda][2].data() + offset;
    p.rows = rows, p.columns = columns, p.dtype = kType<T>, p.activation = activation;
    if (cuda) CHECK_EQ(gated_cuda(p, nullptr), cudaSuccess);
    else gated_cpu(p, 0, rows * columns);
  }
  // One unit of the result where the two round differently, and the fp32 noise of e^x.
  const double unit = sizeof(T) == 4 ? 4e-6 : std::is_same_v<T, half_t> ? 0x1p-10 : 0x1p-7;
  for (int i : {0, 1, 2}) {
    int wrong = 0;
    for (size_t j = 0; j < out[0][i].size(); j++) wrong += !check::close(to_float(out[1][i][j]), to_float(out[0][i][j]), unit);
    CHECK_EQ(wrong, 0);
  }
}

template <typename T>
void check_everything() {
  for (Activation activation : {Activation::silu, Activation::gelu_tanh, Activation::gelu})
    for (int wanted : {0, 7}) {
      compare<T>(3, 1031, kNone, 0, activation, wanted);  // one row of 3093, with a rest
      compare<T>(2, 2100, from(2100), 0, activation, wanted);
      compare<T>(5, 40, from(24), 0, activation, wanted);  // several rows in a block
      compare<T>(7, 33, from(1), 0, activation, wanted);   // rows off the alignment
      compare<T>(1, 300, kNone, 3, activation, wanted);    // all of it off
      compare<T>(300, 1, from(5), 0, activation, wanted);
      compare<T>(1, 1, kNone, 1, activation, wanted);
    }
  for (int wanted = 1; wanted < 7; wanted++) compare<T>(4, 72, from(8), 0, Activation::silu, wanted);
  for (const Gaps& one : {Gaps{8, 0, 0}, {0, 8, 0}, {0, 0, 8}}) compare<T>(5, 40, one, 0, Activation::silu, 7);
}

}  // namespace

CASE(every_layout_type_and_activation) {
  check_everything<float>();
  check_everything<half_t>();
  check_everything<bf16_t>();
}

CASE(an_element_has_the_same_bits_in_a_vector_and_alone) {
  constexpr int64_t kCount = 203;
  check::Random random{5};
  const auto run = [](const std::vector<float>& in, int64_t begin, Activation activation) {
    std::vector<float> out(3 * kCount);
    GatedParams p;
    p.gate = in.data() + begin, p.up = in.data() + kCount + begin, p.grad = in.data() + 2 * kCount + begin;
    p.product = out.data() + begin, p.grad_gate = out.data() + kCount + begin, p.grad_up = out.data() + 2 * kCount + begin;
    p.rows = 1, p.columns = kCount - begin, p.activation = activation;
    CHECK_EQ(gated_cuda(p, nullptr), cudaSuccess);
    return out;
  };
  for (Activation activation : {Activation::silu, Activation::gelu_tanh, Activation::gelu}) {
    std::vector<float> in(3 * kCount);
    for (float& x : in) x = float(random.normal());
    const std::vector<float> whole = run(in, 0, activation), part = run(in, 3, activation);
    for (int64_t i = 0; i < 3 * kCount; i++)
      if (i % kCount >= 3) CHECK(std::memcmp(&whole[size_t(i)], &part[size_t(i)], 4) == 0);
  }
}

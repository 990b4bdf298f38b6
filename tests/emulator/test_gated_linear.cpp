// The CUDA kernel of gated_linear.cu, emulated, against that of the CPU.
#include "gated_linear.h"

#include "check.h"
#include "common/convert.h"
#include "emulator.h"

using namespace packops;

namespace {

template <typename T>
void compare(DType dtype, double tolerance) {
  for (const int64_t rows : {1, 3})
    for (const int64_t columns : {1, 7, 64, 1000, 4097})
      for (const int64_t beyond : {0, 8, 3})  // rows are this much longer in memory, and the first begins there
        for (const Activation activation : {Activation::silu, Activation::gelu_tanh, Activation::gelu})
          for (const int wanted : {-1, 7, 5, 2}) {  // forward; which of product, grad_gate, grad_up
            check::Random random{uint64_t(columns)};
            const int64_t stride = columns + beyond;
            std::vector<T> in[3];
            for (auto& x : in) {
              x.resize(size_t(rows * stride + beyond));
              for (T& value : x) value = from_float<T>(float((random.below(9) ? 2 : 40) * random.normal()));
            }
            std::vector<T> out[2][3];
            for (const bool cuda : {false, true}) {
              for (auto& x : out[cuda]) x.assign(size_t(rows * columns), from_float<T>(7.f));
              GatedParams p;
              p.gate = in[0].data() + beyond;
              p.up = in[1].data() + beyond;
              if (wanted >= 0) p.grad = in[2].data() + beyond;
              p.gate_row = p.up_row = p.grad_row = stride;
              if (wanted & 1) p.product = out[cuda][0].data();
              if (wanted >= 0 && wanted & 2) p.grad_gate = out[cuda][1].data();
              if (wanted >= 0 && wanted & 4) p.grad_up = out[cuda][2].data();
              p.rows = rows;
              p.columns = columns;
              p.dtype = dtype;
              p.activation = activation;
              if (cuda) CHECK_EQ(gated_cuda(p, nullptr), cudaSuccess);
              else gated_cpu(p, 0, rows * columns);
            }
            for (int k = 0; k < 3; k++)
              for (size_t i = 0; i < out[0][k].size(); i++)
                CHECK_CLOSE(to_float(out[1][k][i]), to_float(out[0][k][i]), tolerance);
          }
}

}  // namespace

CASE(gated_as_on_the_cpu) {
  compare<float>(DType::f32, 4e-6);
  compare<half_t>(DType::f16, 0x1p-10);
  compare<bf16_t>(DType::bf16, 0x1p-7);
}

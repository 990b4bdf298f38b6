// The products of a gated MLP that the gate stands between: the plain interface of gated_mlp.cu. No torch here. Hopper (sm_90a) only.
//
//   forward    gate = x gate_weight^T,  up = x up_weight^T,  product = f(gate) up
//   backward   d = grad down_weight,  grad_gate = d up f'(gate),  grad_up = d f(gate),  product = f(gate) up
//
// f and f' as in gated_linear.h, silu and gelu_tanh. Sums are fp32. gate and up are rounded, and f is of what was rounded, so that both
// passes have the same product. d is neither rounded nor stored. Results that are null are not stored either.
//
// Bytes: each operand of a product is read about once (the weights once per band of rows that fits into the L2), gate and up are written
// once and read once, each result is written once. Apart from the products the gate itself would read and write another 2 tokens columns
// elements in each pass. Bound: the tensor cores, 4 tokens columns terms operations forward and 2 backward.
//
// Every value has one writer and a fixed order of summation: the same bits in every run.
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/dtype.h"
#include "gated_linear.h"

namespace packops {

// All matrices are contiguous and of one dtype, bf16 or f16.
struct GatedMlpParams {
  int64_t tokens = 0, columns = 0;
  int64_t terms = 0;  // of a sum: features of x, or of grad
  DType dtype = DType::bf16;
  Activation activation = Activation::silu;
  const void *x = nullptr, *gate_weight = nullptr, *up_weight = nullptr;  // (tokens, terms), (columns, terms) twice: forward
  const void *grad = nullptr, *down_weight = nullptr;                     // (tokens, terms), (terms, columns): backward
  void *gate = nullptr, *up = nullptr;                                    // (tokens, columns); in: backward; out: forward
  void *product = nullptr, *grad_gate = nullptr, *grad_up = nullptr;      // (tokens, columns)
};

#ifdef PACKOPS_WITH_CUDA
// Whether inputs of these sizes, in these places, can be taken, and the code that is loaded for the current device has the products.
bool gated_mlp_fits(const GatedMlpParams& p);

// Backward if there is a grad.
cudaError_t gated_mlp_cuda(const GatedMlpParams& p, cudaStream_t stream);
#endif

}  // namespace packops

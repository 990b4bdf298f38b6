// RMS norm of query and key heads, then RoPE: the plain interface of qk_norm_rope.cu and qk_norm_rope_cpu.cpp.
//
//   r = 1 / sqrt(mean(x^2) + eps),   n = r x,   y = turn(n w)          turn: see rope.h;  w: the weight, or 1 + weight
//
//   given g = dL/dy:   h = turn transposed (g),   dw = sum of h n over tokens (and heads),   dx = r (h w - n mean(h w n))
//
// The mean runs over a head (weight (D,): Qwen3, Gemma 3), or over all heads of a token (weight (heads D,): OLMo 2 and 3). Tokens
// outside cu_seqlens pass through unchanged, as do their gradients. Everything is fp32 (fp64 for fp64) with one rounding at the
// end.
#pragma once

#include "rope.h"

namespace packops {

struct QkNormRopeParams {
  RopeParams rope;  // q.in, k.in: x; q.out, k.out: y, or dx in the backward pass; never in place; transposed in the backward pass
  const void *q_weight = nullptr, *k_weight = nullptr;
  DType weight_dtype = DType::f32;
  bool zero_centered = false;  // w = 1 + weight
  bool across_heads = false;   // the mean runs over all heads of a token
  double eps = 1e-6;

  // Backward only. The gradient of y, of which only `in` and its strides count.
  RopeHeads q_grad, k_grad;
  // Shares of the weight gradients, (partials, weight size) each, fp32 (fp64 for fp64), summed by a second pass in a fixed order.
  void *q_partial = nullptr, *k_partial = nullptr;
  int64_t q_partials = 0, k_partials = 0;
  void *q_weight_grad = nullptr, *k_weight_grad = nullptr;  // weight dtype

  bool backward() const { return rope.transposed; }
};

PACKOPS_HOST_DEVICE int64_t qk_norm_weight_size(const QkNormRopeParams& p, const RopeHeads& side) {
  return p.across_heads ? side.heads * p.rope.head_dim : p.rope.head_dim;
}

// The CPU splits tokens into a fixed number of shares, so that the sums do not depend on the number of threads.
int64_t qk_norm_rope_cpu_shares(const QkNormRopeParams& params);
void qk_norm_rope_cpu(const QkNormRopeParams& params, int64_t first_share, int64_t last_share);  // forward or backward
void qk_norm_rope_cpu_finish(const QkNormRopeParams& params);                                    // sums the partials

#ifdef PACKOPS_WITH_CUDA
// Sets q_partials and k_partials: rows of partial sums the backward pass will write.
cudaError_t qk_norm_rope_cuda_partials(QkNormRopeParams& params);
cudaError_t qk_norm_rope_cuda(const QkNormRopeParams& params, cudaStream_t stream);  // forward or backward
#endif

}  // namespace packops

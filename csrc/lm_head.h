// The lm_head's products, and what becomes of the logits in the first: the plain interface of lm_head.cu. No torch here. Hopper
// (sm_90a) only.
//
//   x_tj = cap(logit_scale * (sum_h hidden[t, h] weight[j, h] + bias[j])),   cap(x) = softcap tanh(x / softcap), or x
//
// The sums are fp32, in registers. With y the label of row t:
//
//   logits       out_tj = sum_h hidden[t, h] weight[j, h] + bias[j], rounded once, for whoever needs them in memory. In the other
//                passes they are neither rounded nor stored.
//   statistics   per row log_prob = x_y - lse, entropy = lse - sum_j p_j x_j, and lse as row_max + log_sum
//   gradient     out_tj = s_tj (p_j (on_p + on_p_log log p_j) + [j = y] on_label),  log p_j = x_j - row_max - log_sum
//   s_tj         d x / d (hidden weight^T) = logit_scale (1 - tanh^2)
//
// out is in the operands' dtype, rounded once. Its product with the weight is anybody's. That with the hidden states is here, too:
//
//   weight's gradient   out_jh = factor sum_t grad_logits[t, j] hidden[t, h], rounded once, or in fp32 added to what is there. The
//                       factor is read on the device.
//
// Statistics of a tile are relative to its own maximum, so no logit is too large. The label's term is left out of the sums, so that
// nothing cancels in a confident row: -log_prob = log(1 + rest / e_y).
//
// Bytes: hidden and weight are read about once (weight once per band of rows that fits into the L2), out is written once, and the
// statistics take 12 bytes per row and tile of 192 columns. Each product is bound by the tensor cores: 2 rows vocab width operations.
//
// Every value has one writer and a fixed order of summation: the same bits in every run.
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/dtype.h"

namespace packops {

enum class LmHeadPass : int32_t { logits, statistics, gradient };

struct LmHeadParams {
  int64_t rows = 0, vocab = 0, width = 0;
  DType dtype = DType::bf16;        // of hidden, weight, bias and out: bf16 or f16
  const void* hidden = nullptr;     // (rows, width) contiguous
  const void* weight = nullptr;     // (vocab, width) contiguous
  const void* bias = nullptr;       // (vocab,) or null
  const int32_t* target = nullptr;  // (rows,) but for logits: a column, or negative: its results and its row of out are 0
  float logit_scale = 1;
  float softcap = 0;       // 0: none
  float cap_argument = 0;  // logit_scale / softcap; lm_head_cuda sets it

  void* out = nullptr;  // (rows, vocab) of out_stride elements, a multiple of 8; logits, gradient
  int64_t out_stride = 0;

  // statistics
  float* workspace = nullptr;  // lm_head_workspace(p) floats
  float* log_prob = nullptr;   // (rows,)
  float* entropy = nullptr;    // (rows,) or null
  float* row_max = nullptr;    // (rows,) in: gradient; out: statistics
  float* log_sum = nullptr;    // (rows,) the same

  // gradient, (rows,) each or null: 0
  const float* on_p = nullptr;
  const float* on_p_log = nullptr;
  const float* on_label = nullptr;
};

struct LmHeadWeightGradientParams {
  int64_t tokens = 0, vocab = 0, width = 0;
  DType dtype = DType::bf16;          // of both operands: bf16 or f16
  const void* grad_logits = nullptr;  // (tokens, vocab) of grad_logits_stride elements, a multiple of 8
  int64_t grad_logits_stride = 0;
  const void* hidden = nullptr;  // (tokens, width) contiguous
  void* out = nullptr;           // (vocab, width) contiguous, of the operands' dtype or, if `wide`, fp32
  bool wide = false;
  bool add = false;               // to what `out` holds; only if `wide`
  const float* factor = nullptr;  // one number on the device, or null: 1
};

#ifdef PACKOPS_WITH_CUDA
// Floats of workspace: three planes of a number per row and column tile, and the label's logit of each row.
int64_t lm_head_workspace(const LmHeadParams& p);

// Whether these operands can be taken: dtype, alignment, and what the code that is loaded for the current device can do.
bool lm_head_fits(const LmHeadParams& p);

cudaError_t lm_head_cuda(LmHeadPass pass, const LmHeadParams& p, cudaStream_t stream);

bool lm_head_weight_gradient_fits(const LmHeadWeightGradientParams& p);

cudaError_t lm_head_weight_gradient_cuda(const LmHeadWeightGradientParams& p, cudaStream_t stream);
#endif

}  // namespace packops

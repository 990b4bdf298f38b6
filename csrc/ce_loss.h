// Cross entropy over packed rows: the plain interface that ce_loss.cu and ce_loss_cpu.cpp implement. No torch here.
//
// Row t of the (rows, vocab) logits is scored against class y = target[t]. With x' = softcap * tanh(x * scale / softcap):
//   lse  = log sum_c exp(x'_c)
//   loss = (1-eps) w_y (lse - x'_y) + eps/V sum_c w_c (lse - x'_c) + z lse^2
//   d loss / d x'_c = alpha p_c - beta w_c - gamma [c = y],   p_c = exp(x'_c - lse)
//   alpha = (1-eps) w_y + eps/V sum_c w_c + 2 z lse,  beta = eps/V,  gamma = (1-eps) w_y
// A row's share of the reduced loss is scale[t] * loss, with scale[t] = token_weight[t] / denominator, made on the device.
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/documents.h"
#include "common/dtype.h"

namespace packops {

enum class Reduction : int32_t { none, sum, mean, seq_mean_token_mean, seq_mean_token_sum };

constexpr bool per_sequence(Reduction r) { return r == Reduction::seq_mean_token_mean || r == Reduction::seq_mean_token_sum; }

// Values of target[t] that are not a class.
inline constexpr int32_t kIgnored = -1;   // loss 0, gradient 0, the logits are not read
inline constexpr int32_t kBadLabel = -2;  // loss NaN, gradient 0, the logits are not read

// Row t of a matrix whose leading dimensions collapsed to two: it begins at element (t / inner) * outer + (t % inner) * step.
struct RowLayout {
  int64_t inner = 1;
  int64_t outer = 0;
  int64_t step = 0;
};

// A vocabulary may be split over processes. Each runs the forward on its shard, which leaves `partial` in the place of a loss;
// all of them see all partials, combine these into the loss and the global maximum and sum, and run the backward on their shard.
// kPartialStates arrays of `rows` numbers, then the shard's first class and its width:
enum PartialState : int32_t { kPartialMax, kPartialSum, kPartialTarget, kPartialWeighted, kPartialStates };

struct CeLossParams {
  int64_t rows = 0;
  int64_t vocab = 0;        // columns of the logits
  int64_t first_class = 0;  // that column 0 is
  int64_t classes = 0;      // of all shards; 0: vocab

  const void* logits = nullptr;  // (rows, vocab), last dimension contiguous
  DType logits_dtype = DType::f32;
  RowLayout logits_layout;

  const void* labels = nullptr;  // (rows,) contiguous, i32 or i64
  DType labels_dtype = DType::i64;
  int64_t ignore_index = -100;
  bool shift = false;  // row t is scored against labels[t + 1]; a document's last row against nothing

  PackedAxis axis;  // of the rows; without cu_seqlens documents of doc_length rows each
  int64_t doc_length = 0;

  Reduction reduction = Reduction::mean;
  bool has_num_items = false;       // replaces the local count of tokens or documents
  const void* num_items = nullptr;  // one number where the kernel runs, or null: num_items_value
  DType num_items_dtype = DType::f32;
  double num_items_value = 0;

  const void* token_weight = nullptr;  // (rows,) of the state's type, or null: 1. A row of weight 0 is ignored
  const void* class_weight = nullptr;  // the same: column 0's, those of other shards lie before and after it
  double label_smoothing = 0;
  double z_loss = 0;
  double softcap = 0;  // 0: none
  double logit_scale = 1;

  // Per row, kept for the backward. State is float, double for f64 logits.
  int32_t* target = nullptr;      // (rows,) a class, kIgnored or kBadLabel
  void* scale = nullptr;          // (rows,) d(reduced loss) / d(row loss)
  void* row_max = nullptr;        // (rows,) max_c x'_c
  void* row_sum = nullptr;        // (rows,) sum_c exp(x'_c - max); max and sum stay apart, or confident rows lose digits
  void* row_loss = nullptr;       // (rows,) unscaled
  void* entropy = nullptr;        // (rows,) or null
  int32_t* prediction = nullptr;  // (rows,) argmax, first index on ties, or null

  void* partial = nullptr;         // forward of a shard: partial_size(p) numbers, instead of row_* and loss
  const void* partials = nullptr;  // combine: those of `shards` shards, in the order of their classes
  int64_t shards = 0;

  void* loss = nullptr;           // one number; (rows,) for Reduction::none
  int64_t* counts = nullptr;      // {tokens, documents} that counted, or null where nobody wants them
  void* sequence_loss = nullptr;  // (documents,) or null: each document's mean (its sum for seq_mean_token_sum)

  void* grad = nullptr;  // (rows, vocab) in the logits' dtype, or null: no gradient wanted. May be the logits themselves
  RowLayout grad_layout;

  // Backward only: the incoming gradient, one number (step 0) or one per row.
  const void* grad_output = nullptr;
  RowLayout grad_output_layout;
  // grad already holds the gradient for grad_output = 1: rows whose grad_output is 1 are left alone, and the others made anew
  // from the logits, or scaled where those are gone (null).
  bool grad_holds_gradient = false;

  void* workspace = nullptr;  // CUDA forward: ce_loss_workspace(p) floats, 8-byte aligned
};

constexpr int64_t class_count(const CeLossParams& p) { return p.classes ? p.classes : p.vocab; }
constexpr int64_t partial_size(const CeLossParams& p) { return kPartialStates * p.rows + 2; }

// ---- CPU (ce_loss_cpu.cpp). The range functions may run on several threads; ranges of rows must not overlap. cu_seqlens must be
// well formed.

enum class CePass { forward, combine, backward };  // over a range of rows

enum class CeLossError { ok, bad_label, bad_shards };
struct CeLossStatus {
  CeLossError error = CeLossError::ok;
  int64_t index = 0;  // into labels or shards
  int64_t value = 0;
};
CeLossStatus ce_loss_prepare_cpu(const CeLossParams& p);                       // target, scale, counts
void ce_loss_rows_cpu(const CeLossParams& p, int64_t begin, int64_t end);      // row_*, and grad if wanted
CeLossStatus ce_loss_combine_cpu(const CeLossParams& p);                       // row_* from partials
void ce_loss_reduce_cpu(const CeLossParams& p);                                // loss
void ce_loss_backward_cpu(const CeLossParams& p, int64_t begin, int64_t end);  // grad from row_* and grad_output

// ---- CUDA (ce_loss.cu), asynchronous on the stream.

#ifdef PACKOPS_WITH_CUDA
int64_t ce_loss_workspace(const CeLossParams& p);
// Target, scale and counts, for callers that make the logits later.
cudaError_t ce_loss_prepare_cuda(const CeLossParams& p, cudaStream_t stream);
cudaError_t ce_loss_forward_cuda(const CeLossParams& p, cudaStream_t stream);
// row_* and loss from partials; NaN if the shards do not cover all classes.
cudaError_t ce_loss_combine_cuda(const CeLossParams& p, cudaStream_t stream);
cudaError_t ce_loss_backward_cuda(const CeLossParams& p, cudaStream_t stream);
#endif

}  // namespace packops

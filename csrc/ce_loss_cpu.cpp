// Cross entropy on the CPU: the interface of ce_loss.h. This file decides which rows count and with what
// weight, once per call. ce_loss_simd.h computes the rows, on any number of threads, with the best instruction set of the machine.
#include "ce_loss.h"

#include <algorithm>
#include <vector>

#define PACKOPS_SIMD_FILE "ce_loss_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

int64_t bound(const CeLossParams& p, int64_t d) { return p.axis.cu_seqlens ? boundary(p.axis, d) : d * p.doc_length; }
// Number i of token_weight or class_weight.
double weight_at(const CeLossParams& p, const void* weights, int64_t i) {
  if (!weights) return 1;
  return p.logits_dtype == DType::f64 ? static_cast<const double*>(weights)[i] : static_cast<const float*>(weights)[i];
}
double token_weight(const CeLossParams& p, int64_t t) { return weight_at(p, p.token_weight, t); }
// What a counted row adds to the denominator.
double norm_weight(const CeLossParams& p, int64_t t) {
  return token_weight(p, t) * (p.target[t] >= 0 ? weight_at(p, p.class_weight, p.target[t] - p.first_class) : 1.0);
}
double inverse_or_zero(double x) { return x != 0 ? 1 / x : 0.0; }

struct DocumentSums {
  double weight = 0, loss = 0;
  bool counted = false;
};
template <typename S>
DocumentSums document_sums(const CeLossParams& p, int64_t d, const S* row_loss) {
  DocumentSums sums;
  for (int64_t t = bound(p, d); t < bound(p, d + 1); t++) {
    if (p.target[t] == kIgnored) continue;
    sums.counted = true;
    sums.weight += norm_weight(p, t);
    if (row_loss) sums.loss += token_weight(p, t) * double(row_loss[t]);
  }
  return sums;
}
double document_inverse(const CeLossParams& p, const DocumentSums& sums) {
  return p.reduction == Reduction::seq_mean_token_sum ? 1.0 : inverse_or_zero(sums.weight);
}

// The denominators: see CeLossParams::scale. S is the state type.
template <typename S>
void set_scales(const CeLossParams& p) {
  auto* scale = static_cast<S*>(p.scale);
  int64_t tokens = 0, documents = 0;
  double total = 0;
  for (int64_t t = 0; t < p.rows; t++) {
    if (p.target[t] == kIgnored) continue;
    tokens++;
    total += norm_weight(p, t);
  }
  std::vector<double> inverses(p.axis.documents);
  if (per_sequence(p.reduction) || p.counts) {
    for (int64_t d = 0; d < p.axis.documents; d++) {
      const DocumentSums sums = document_sums<S>(p, d, nullptr);
      documents += sums.counted;
      inverses[d] = document_inverse(p, sums);
    }
  }
  if (p.counts) {
    p.counts[0] = tokens;
    p.counts[1] = documents;
  }
  double normalizer = 1;
  if (p.has_num_items) normalizer = 1 / p.num_items_value;
  else if (p.reduction == Reduction::mean) normalizer = inverse_or_zero(total);
  else if (per_sequence(p.reduction)) normalizer = inverse_or_zero(double(documents));

  for (int64_t t = 0; t < p.rows; t++) scale[t] = S(token_weight(p, t) * normalizer);
  if (per_sequence(p.reduction))
    for (int64_t d = 0; d < p.axis.documents; d++)
      for (int64_t t = bound(p, d); t < bound(p, d + 1); t++) scale[t] = S(token_weight(p, t) * normalizer * inverses[d]);
}

template <typename S>
void reduce(const CeLossParams& p) {
  const auto *scale = static_cast<const S*>(p.scale), *row_loss = static_cast<const S*>(p.row_loss);
  auto* loss = static_cast<S*>(p.loss);
  double total = 0;
  for (int64_t t = 0; t < p.rows; t++) {
    const double share = p.target[t] == kIgnored ? 0.0 : double(scale[t]) * double(row_loss[t]);
    if (p.reduction == Reduction::none) loss[t] = S(share);
    total += share;
  }
  if (p.reduction != Reduction::none) loss[0] = S(total);
  if (p.sequence_loss) {
    for (int64_t d = 0; d < p.axis.documents; d++) {
      const DocumentSums sums = document_sums(p, d, row_loss);
      static_cast<S*>(p.sequence_loss)[d] = S(sums.loss * document_inverse(p, sums));
    }
  }
}

void rows(const CeLossParams& p, int64_t begin, int64_t end, CePass pass) { PACKOPS_BEST_ISA(ce_rows_any)(p, begin, end, pass); }

template <typename S>
void set_range(const CeLossParams& p) {
  S* range = static_cast<S*>(p.partial) + partial_size(p) - 2;
  range[0] = S(p.first_class);
  range[1] = S(p.vocab);
}

// Checks that the shards, as each process describes its own, cover all classes in order.
template <typename S>
CeLossStatus check_shards(const CeLossParams& p) {
  S end = 0;
  for (int64_t s = 0; s < p.shards; s++) {
    const S* range = static_cast<const S*>(p.partials) + (s + 1) * partial_size(p) - 2;
    if (range[0] != end) return {CeLossError::bad_shards, s, int64_t(range[0])};
    end += range[1];
  }
  return end == S(class_count(p)) ? CeLossStatus{} : CeLossStatus{CeLossError::bad_shards, p.shards, int64_t(end)};
}

}  // namespace

CeLossStatus ce_loss_prepare_cpu(const CeLossParams& p) {
  std::fill(p.target, p.target + p.rows, kIgnored);
  CeLossStatus status;
  const int64_t ahead = p.shift ? 1 : 0;
  for (int64_t d = 0; d < p.axis.documents; d++) {
    for (int64_t t = bound(p, d); t + ahead < bound(p, d + 1); t++) {
      const int64_t label = integer_at(p.labels, p.labels_dtype, t + ahead);
      if (label == p.ignore_index || token_weight(p, t) == 0) continue;
      const bool valid = label >= 0 && label < class_count(p);
      p.target[t] = valid ? int32_t(label) : kBadLabel;
      if (!valid && status.error == CeLossError::ok) status = {CeLossError::bad_label, t + ahead, label};
    }
  }
  p.logits_dtype == DType::f64 ? set_scales<double>(p) : set_scales<float>(p);
  if (p.partial) p.logits_dtype == DType::f64 ? set_range<double>(p) : set_range<float>(p);
  return status;
}

CeLossStatus ce_loss_combine_cpu(const CeLossParams& p) {
  const CeLossStatus status = p.logits_dtype == DType::f64 ? check_shards<double>(p) : check_shards<float>(p);
  if (status.error == CeLossError::ok) rows(p, 0, p.rows, CePass::combine);
  return status;
}

void ce_loss_rows_cpu(const CeLossParams& p, int64_t begin, int64_t end) { rows(p, begin, end, CePass::forward); }

void ce_loss_backward_cpu(const CeLossParams& p, int64_t begin, int64_t end) { rows(p, begin, end, CePass::backward); }

void ce_loss_reduce_cpu(const CeLossParams& p) { p.logits_dtype == DType::f64 ? reduce<double>(p) : reduce<float>(p); }

}  // namespace packops

// Cross entropy on the CPU: the interface of ce_loss.h. Which documents and labels count is decided here, once per call; the row
// passes (ce_loss_simd.h) run on any number of threads in the best instruction set the machine has.
#include "ce_loss.h"

#include <algorithm>
#include <vector>

#define PACKOPS_SIMD_FILE "ce_loss_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

int64_t integer_at(const void* data, DType dtype, int64_t i) {
  return dtype == DType::i32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

// The denominators: see CeLossParams::scale. S is the state type.
template <typename S>
void set_scales(const CeLossParams& p, const std::vector<int64_t>& bounds) {
  auto* scale = static_cast<S*>(p.scale);
  auto weight = [&](int64_t t) { return p.token_weight ? double(p.token_weight[t]) : 1.0; };
  auto norm_weight = [&](int64_t t) { return weight(t) * (p.class_weight && p.target[t] >= 0 ? double(p.class_weight[p.target[t]]) : 1.0); };
  auto inverse = [](double x) { return x != 0 ? 1 / x : 0.0; };

  int64_t tokens = 0, documents = 0;
  double total = 0;
  for (int64_t t = 0; t < p.rows; t++) {
    if (p.target[t] == kIgnored) continue;
    tokens++;
    total += norm_weight(t);
  }
  std::vector<double> document_inverse(bounds.size(), 0.0);
  for (size_t d = 0; d + 1 < bounds.size(); d++) {
    double sum = 0;
    bool counts = false;
    for (int64_t t = bounds[d]; t < bounds[d + 1]; t++) {
      if (p.target[t] == kIgnored) continue;
      counts = true;
      sum += norm_weight(t);
    }
    documents += counts;
    document_inverse[d] = p.reduction == Reduction::seq_mean_token_mean ? inverse(sum) : 1.0;
  }
  if (p.counts) {
    p.counts[0] = tokens;
    p.counts[1] = documents;
  }
  double normalizer = 1;
  if (p.has_num_items) normalizer = 1 / p.num_items_value;
  else if (p.reduction == Reduction::mean) normalizer = inverse(total);
  else if (per_sequence(p.reduction)) normalizer = inverse(double(documents));

  for (int64_t t = 0; t < p.rows; t++) scale[t] = S(weight(t) * normalizer);
  if (per_sequence(p.reduction))
    for (size_t d = 0; d + 1 < bounds.size(); d++)
      for (int64_t t = bounds[d]; t < bounds[d + 1]; t++) scale[t] = S(weight(t) * normalizer * document_inverse[d]);
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
}

void rows(const CeLossParams& p, int64_t begin, int64_t end, bool backward) {
  switch (cpu_isa()) {
    case CpuIsa::avx512: return avx512::ce_rows_any(p, begin, end, backward);
    case CpuIsa::avx2: return avx2::ce_rows_any(p, begin, end, backward);
    case CpuIsa::baseline: return baseline::ce_rows_any(p, begin, end, backward);
  }
}

}  // namespace

CeLossStatus ce_loss_prepare_cpu(const CeLossParams& p) {
  std::vector<int64_t> bounds(p.documents + 1);
  for (int64_t d = 0; d <= p.documents; d++) {
    bounds[d] = p.cu_seqlens ? integer_at(p.cu_seqlens, p.cu_seqlens_dtype, d) : d * p.doc_length;
    if (bounds[d] > p.rows || bounds[d] < (d ? bounds[d - 1] : 0) || (d == 0 && bounds[0] != 0))
      return {CeLossError::bad_cu_seqlens, d, bounds[d]};
  }
  std::fill(p.target, p.target + p.rows, kIgnored);
  CeLossStatus status;
  for (int64_t d = 0; d < p.documents; d++) {
    for (int64_t t = bounds[d]; t < bounds[d + 1] - (p.shift ? 1 : 0); t++) {
      const int64_t label = integer_at(p.labels, p.labels_dtype, t + (p.shift ? 1 : 0));
      if (label == p.ignore_index) continue;
      const bool valid = label >= 0 && label < p.vocab;
      p.target[t] = valid ? int32_t(label) : kBadLabel;
      if (!valid && status.error == CeLossError::ok) status = {CeLossError::bad_label, t, label};
    }
  }
  p.logits_dtype == DType::f64 ? set_scales<double>(p, bounds) : set_scales<float>(p, bounds);
  return status;
}

void ce_loss_rows_cpu(const CeLossParams& p, int64_t begin, int64_t end) { rows(p, begin, end, false); }

void ce_loss_backward_cpu(const CeLossParams& p, int64_t begin, int64_t end) { rows(p, begin, end, true); }

void ce_loss_reduce_cpu(const CeLossParams& p) { p.logits_dtype == DType::f64 ? reduce<double>(p) : reduce<float>(p); }

const char* ce_loss_cpu_isa() {
  switch (cpu_isa()) {
    case CpuIsa::avx512: return "avx512";
    case CpuIsa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace packops

// Metadata of a packed axis on the CPU; formulas in metadata.h. One pass over the outputs, document by document. Bound by
// memory: the metadata write 12 bytes per token, the labels read and write one label per token.
#include "metadata.h"

namespace packops {

namespace {

struct Span {
  int64_t begin, end;
};

Span span_of(const PackedAxis& axis, int64_t tokens, int64_t document) {
  return {boundary(axis, document), document < axis.documents ? boundary(axis, document + 1) : tokens};
}

template <typename Label>
int64_t write_targets(const LabelsParams& p, Span span, bool is_padding) {
  const Label* labels = static_cast<const Label*>(p.labels);
  Label* target = static_cast<Label*>(p.target);
  const Label ignored = static_cast<Label>(p.ignore_index);
  const int64_t from = p.shift ? 1 : 0;
  const int64_t masked = is_padding ? -1 : p.shift ? span.end - 1 : span.begin;
  int64_t counted = 0;
  for (int64_t t = span.begin; t < span.end; t++) {
    Label value = ignored;
    if (!is_padding && t != masked) value = labels[(t + from) * p.label_stride];
    target[t] = value;
    counted += value != ignored;
  }
  return counted;
}

}  // namespace

void packed_metadata_cpu(const MetadataParams& p, int64_t begin, int64_t end) {
  for (int64_t document = begin; document < end; document++) {
    const Span span = span_of(p.axis, p.tokens, document);
    const int32_t id = document < p.axis.documents ? static_cast<int32_t>(document) : -1;
    for (int64_t t = span.begin; t < span.end; t++) {
      p.position_ids[t] = t - span.begin;
      p.seq_idx[t] = id;
    }
  }
}

void packed_labels_cpu(const LabelsParams& p, int64_t begin, int64_t end) {
  for (int64_t document = begin; document < end; document++) {
    const Span span = span_of(p.axis, p.tokens, document);
    const bool is_padding = document == p.axis.documents;
    const int64_t counted =
        p.label_dtype == DType::i32 ? write_targets<int32_t>(p, span, is_padding) : write_targets<int64_t>(p, span, is_padding);
    if (!is_padding) p.counts[document] = counted;
  }
}

}  // namespace packops

// Position ids, document ids and masked labels of a packed axis, on the CPU.
#include "metadata.h"

#include "check.h"

using namespace packops;

namespace {

template <typename Index>
PackedAxis axis_of(const std::vector<Index>& cu_seqlens) {
  return {cu_seqlens.data(), sizeof(Index) == 4 ? DType::i32 : DType::i64, int64_t(cu_seqlens.size()) - 1};
}

template <typename Index>
void check_documents() {
  const std::vector<Index> cu_seqlens = {0, 3, 3, 5};  // documents of 3, 0 and 2 tokens, then 2 tokens of padding
  MetadataParams p{axis_of(cu_seqlens), 7, nullptr, nullptr};
  std::vector<int64_t> positions(7, -7);
  std::vector<int32_t> documents(7, -7);
  p.position_ids = positions.data();
  p.seq_idx = documents.data();
  packed_metadata_cpu(p, 0, 2);  // as two threads would
  packed_metadata_cpu(p, 2, 4);
  CHECK((positions == std::vector<int64_t>{0, 1, 2, 0, 1, 0, 1}));
  CHECK((documents == std::vector<int32_t>{0, 0, 0, 2, 2, -1, -1}));
}

template <typename Index, typename Label>
void check_labels() {
  const std::vector<Index> cu_seqlens = {0, 3, 3, 5};
  const std::vector<Label> labels = {10, 0, 11, 0, -100, 0, 13, 0, 14, 0, 15, 0, 16, 0};  // every other one: a stride of 2
  for (bool shift : {true, false}) {
    LabelsParams p;
    p.axis = axis_of(cu_seqlens);
    p.tokens = 7;
    p.labels = labels.data();
    p.label_dtype = sizeof(Label) == 4 ? DType::i32 : DType::i64;
    p.label_stride = 2;
    p.shift = shift;
    std::vector<Label> target(7, 99);
    std::vector<int64_t> counts(3, 99);
    p.target = target.data();
    p.counts = counts.data();
    packed_labels_cpu(p, 0, 4);
    const std::vector<Label> shifted = {11, -100, -100, 14, -100, -100, -100}, kept = {-100, 11, -100, -100, 14, -100, -100};
    CHECK((target == (shift ? shifted : kept)));
    CHECK((counts == std::vector<int64_t>{1, 0, 1}));  // the same either way
  }
}

}  // namespace

CASE(documents_and_padding) {
  check_documents<int32_t>();
  check_documents<int64_t>();
}

CASE(labels_end_with_their_document) {
  check_labels<int32_t, int32_t>();
  check_labels<int32_t, int64_t>();
  check_labels<int64_t, int32_t>();
  check_labels<int64_t, int64_t>();
}

CASE(malformed_boundaries_are_found) {
  const std::pair<std::vector<int64_t>, int64_t> cases[] = {{{0, 3, 3, 7}, -1}, {{0}, -1},   {{1, 3}, 0},    {{-1, 3}, 0},
                                                            {{0, 4, 3}, 2},     {{0, 8}, 1}, {{0, 3, -1}, 2}};
  for (const auto& [cu_seqlens, want] : cases) CHECK_EQ(first_malformed_boundary(axis_of(cu_seqlens), 7), want);
}

// The CUDA kernels look documents up in boundaries that nobody has checked.
CASE(lookup_stays_inside_whatever_the_boundaries_hold) {
  check::Random random(4);
  for (int round = 0; round < 2000; round++) {
    std::vector<int64_t> values(1 + random.below(8));
    for (int64_t& value : values) value = (random.below(3) - 1) * (int64_t{1} << random.below(62)) + random.below(20);
    const Documents<int64_t> documents(axis_of(values));
    for (int64_t token = 0; token < 20; token++) {
      const int64_t document = documents.find(token), begin = documents.begin(document, token);
      CHECK(document >= 0 && document <= documents.count);
      CHECK(begin >= 0 && begin <= token);
    }
  }
}

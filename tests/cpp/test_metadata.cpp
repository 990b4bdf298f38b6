// Metadata of a packed axis on the CPU against its definition, token by token; and the lookup that the CUDA kernels share, on
// boundaries that no caller should pass.
#include "metadata.h"

#include "check.h"
#include "common/documents.h"

using namespace packops;

namespace {

constexpr int64_t kGuard = -77;

struct Layout {
  std::vector<int32_t> cu_seqlens{0};
  int64_t tokens;

  explicit Layout(check::Random& random) {
    for (int64_t documents = random.below(12); documents > 0; documents--) {
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(random.below(9)));
    }
    tokens = cu_seqlens.back() + random.below(5);
  }
  int64_t documents() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  PackedAxis axis() const { return {cu_seqlens.data(), DType::i32, documents(), tokens}; }
  Documents<int32_t> lookup() const { return {cu_seqlens.data(), documents()}; }
};

}  // namespace

CASE(positions_and_documents) {
  check::Random random(2);
  for (int round = 0; round < 500; round++) {
    const Layout layout(random);
    std::vector<int64_t> positions(layout.tokens + 1, kGuard);
    std::vector<int32_t> seq_idx(layout.tokens + 1, kGuard);
    CHECK_EQ(first_malformed_boundary(layout.axis()), -1);
    // in two ranges, as two threads would
    const MetadataParams params{layout.axis(), positions.data(), seq_idx.data()};
    const int64_t middle = random.below(layout.documents() + 2);
    packed_metadata_cpu(params, 0, middle);
    packed_metadata_cpu(params, middle, layout.documents() + 1);
    for (int64_t t = 0; t < layout.tokens; t++) {
      const int64_t document = layout.lookup().find(t);
      CHECK_EQ(seq_idx[t], document < layout.documents() ? document : -1);
      CHECK_EQ(positions[t], t - layout.lookup().begin(document, t));
      CHECK(document == layout.documents() ? t >= layout.cu_seqlens.back()
                                           : layout.cu_seqlens[document] <= t && t < layout.cu_seqlens[document + 1]);
    }
    CHECK_EQ(positions.back(), kGuard);
    CHECK_EQ(seq_idx.back(), kGuard);
  }
}

CASE(targets_and_counts) {
  check::Random random(3);
  for (int round = 0; round < 500; round++) {
    const Layout layout(random);
    const int64_t stride = 1 + random.below(3), ignored = -100;
    std::vector<int64_t> labels(layout.tokens * stride + 1), counts(layout.documents());
    for (int64_t& label : labels) label = random.below(4) ? random.below(50) : ignored;
    for (const bool shift : {true, false}) {
      std::vector<int64_t> target(layout.tokens + 1, kGuard);
      LabelsParams params{layout.axis(), labels.data(), DType::i64, stride, ignored, shift, target.data(), counts.data()};
      packed_labels_cpu(params, 0, layout.documents() + 1);
      std::vector<int64_t> expected(layout.documents(), 0);
      for (int64_t t = 0; t < layout.tokens; t++) {
        const int64_t document = layout.lookup().find(t), other = shift ? t + 1 : t - 1;
        const bool scored =
            document < layout.documents() && other >= 0 && other < layout.tokens && layout.lookup().find(other) == document;
        const int64_t want = scored ? labels[(shift ? other : t) * stride] : ignored;
        CHECK_EQ(target[t], want);
        if (want != ignored) expected[document]++;
      }
      CHECK(counts == expected);
      CHECK_EQ(target.back(), kGuard);
    }
  }
}

CASE(lookup_stays_inside_whatever_the_boundaries_hold) {
  check::Random random(4);
  for (int round = 0; round < 2000; round++) {
    std::vector<int64_t> values(1 + random.below(8));
    for (int64_t& value : values) value = (random.below(3) - 1) * (int64_t{1} << random.below(62)) + random.below(20);
    const Documents<int64_t> documents{values.data(), static_cast<int64_t>(values.size()) - 1};
    for (int64_t token = 0; token < 20; token++) {
      const int64_t document = documents.find(token), begin = documents.begin(document, token);
      CHECK(document >= 0 && document <= documents.count);
      CHECK(begin >= 0 && begin <= token);
    }
  }
}

CASE(malformed_boundaries_are_found) {
  const auto first = [](std::vector<int32_t> values, int64_t tokens) {
    return first_malformed_boundary({values.data(), DType::i32, static_cast<int64_t>(values.size()) - 1, tokens});
  };
  CHECK_EQ(first({0, 3, 3, 5}, 5), -1);
  CHECK_EQ(first({0}, 0), -1);
  CHECK_EQ(first({1, 3}, 5), 0);
  CHECK_EQ(first({-1, 3}, 5), 0);
  CHECK_EQ(first({0, 3, 2}, 5), 2);
  CHECK_EQ(first({0, 3, 6}, 5), 2);
}

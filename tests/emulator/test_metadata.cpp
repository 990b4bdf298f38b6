// The CUDA kernels of metadata.cu, emulated, against those of the CPU.
#include "metadata.h"

#include "check.h"
#include "emulator.h"

using namespace packops;

namespace {

template <typename T>
constexpr DType kType = sizeof(T) == 4 ? DType::i32 : DType::i64;

template <typename Index, typename Label>
void compare(int64_t label_stride) {
  for (int64_t tokens : {1, 31, 256, 1000}) {
    check::Random random{uint64_t(tokens)};
    std::vector<Index> cu_seqlens = {0, 0};  // with empty documents, and padding behind the last
    while (cu_seqlens.back() + 5 < tokens)
      cu_seqlens.push_back(Index(std::min<int64_t>(tokens, cu_seqlens.back() + random.below(90))));
    const int64_t documents = int64_t(cu_seqlens.size()) - 1;
    const PackedAxis axis = {cu_seqlens.data(), kType<Index>, documents};

    std::vector<int64_t> positions[2];
    std::vector<int32_t> numbers[2];
    for (bool cuda : {false, true}) {
      positions[cuda].assign(tokens, -7);
      numbers[cuda].assign(tokens, -7);
      const MetadataParams p{axis, tokens, positions[cuda].data(), numbers[cuda].data()};
      if (cuda) CHECK_EQ(packed_metadata_cuda(p, nullptr), cudaSuccess);
      else packed_metadata_cpu(p, 0, documents + 1);
    }
    CHECK(positions[0] == positions[1]);
    CHECK(numbers[0] == numbers[1]);

    std::vector<Label> labels(tokens * label_stride);
    for (Label& y : labels) y = Label(random.below(3) ? random.below(50) : -100);
    for (bool shift : {false, true}) {
      std::vector<Label> target[2];
      std::vector<int64_t> counts[2];
      for (bool cuda : {false, true}) {
        target[cuda].assign(tokens, 99);
        counts[cuda].assign(documents, 0);
        LabelsParams p;
        p.axis = axis;
        p.tokens = tokens;
        p.labels = labels.data();
        p.label_dtype = kType<Label>;
        p.label_stride = label_stride;
        p.shift = shift;
        p.target = target[cuda].data();
        p.counts = counts[cuda].data();
        if (cuda) CHECK_EQ(packed_labels_cuda(p, nullptr), cudaSuccess);
        else packed_labels_cpu(p, 0, documents + 1);
      }
      CHECK(target[0] == target[1]);
      CHECK(counts[0] == counts[1]);
    }
  }
}

}  // namespace

CASE(positions_documents_and_labels) {
  compare<int32_t, int32_t>(1);
  compare<int32_t, int64_t>(2);
  compare<int64_t, int32_t>(3);
  compare<int64_t, int64_t>(1);
}

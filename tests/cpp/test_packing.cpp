// The packers on random requests: every token at most once, no pack over capacity, the same result twice. Without Python, so that
// sanitizers see every access.
#include "packing.h"

#include <algorithm>
#include <stdexcept>

#include "check.h"

using namespace packops;

namespace {

struct Problem {
  std::vector<int64_t> lengths;
  PackRequest request;

  explicit Problem(check::Random& random, int64_t documents) : lengths(documents) {
    const int64_t capacities[] = {1, 7, 64, 4096, 5000, (1 << 22) + 8, (int64_t{1} << 31) - 1};
    request.capacity = capacities[random.below(7)];
    for (int64_t& length : lengths) length = random.below(random.below(8) == 0 ? 3 * request.capacity : request.capacity + 1);
    request.lengths = lengths.data();
    request.count = documents;
    request.strategy = static_cast<Strategy>(random.below(5));
    request.overlong = static_cast<Overlong>(1 + random.below(3));
    request.max_docs = random.below(3) ? 0 : 1 + random.below(4);
    request.multiple = request.capacity % 8 == 0 && random.below(2) ? 8 : 1;
    if (random.below(2)) request.seed = static_cast<uint64_t>(random.below(1000));
  }
};

void check_result(const Problem& problem, const PackResult& result) {
  const PackRequest& r = problem.request;
  const bool has_parts = !result.starts.empty();
  std::vector<std::vector<std::pair<int64_t, int64_t>>> parts(problem.lengths.size());
  CHECK_EQ(result.offsets.front(), 0);
  CHECK_EQ(result.offsets.back(), static_cast<int64_t>(result.indices.size()));
  for (size_t p = 0; p + 1 < result.offsets.size(); p++) {
    int64_t room = 0;
    for (int64_t i = result.offsets[p]; i < result.offsets[p + 1]; i++) {
      const int64_t document = result.indices[i];
      const int64_t start = has_parts ? result.starts[i] : 0;
      const int64_t length = has_parts ? result.lengths[i] : problem.lengths[document];
      room += (length + r.multiple - 1) / r.multiple * r.multiple;
      parts[document].push_back({start, start + length});
    }
    CHECK(room > 0 && room <= r.capacity);
    CHECK(r.max_docs == 0 || result.offsets[p + 1] - result.offsets[p] <= r.max_docs);
  }
  int64_t placed = 0, total = 0;
  for (size_t d = 0; d < parts.size(); d++) {
    std::sort(parts[d].begin(), parts[d].end());
    int64_t end = 0;
    for (const auto& [from, to] : parts[d]) {
      CHECK_EQ(from, end);
      end = to;
    }
    placed += end;
    total += problem.lengths[d];
  }
  CHECK_EQ(placed + result.dropped_tokens, total);
}

}  // namespace

CASE(every_token_once_and_no_pack_over_capacity) {
  check::Random random(1);
  for (int round = 0; round < 3000; round++) {
    const Problem problem(random, random.below(round % 300 == 0 ? 40000 : 80));
    const PackResult result = pack(problem.request);
    check_result(problem, result);
    const PackResult again = pack(problem.request);
    CHECK(result.indices == again.indices && result.offsets == again.offsets && result.starts == again.starts);
  }
}

CASE(bad_requests_throw) {
  const auto throws = [](auto change) {
    std::vector<int64_t> lengths{3, 9};
    PackRequest request;
    request.lengths = lengths.data();
    request.count = 2;
    request.capacity = 8;
    request.overlong = Overlong::drop;
    change(request, lengths);
    try {
      pack(request);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(!throws([](PackRequest&, auto&) {}));
  CHECK(throws([](PackRequest& r, auto&) { r.overlong = Overlong::error; }));
  CHECK(throws([](PackRequest&, auto& lengths) { lengths[0] = -1; }));
  CHECK(throws([](PackRequest& r, auto&) { r.capacity = 0; }));
  CHECK(throws([](PackRequest& r, auto&) { r.capacity = kMaxCapacity + 1; }));
  CHECK(throws([](PackRequest& r, auto&) { r.multiple = 3; }));
  CHECK(throws([](PackRequest& r, auto&) { r.max_docs = -1; }));
}

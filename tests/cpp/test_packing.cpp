// The bin packers: what every plan must satisfy, and plans small enough to know by heart.
#include "packing.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "check.h"

using namespace packops;

namespace {

constexpr Strategy kStrategies[] = {Strategy::best_fit, Strategy::bfd, Strategy::ffd, Strategy::next_fit, Strategy::wrapped};

PackRequest request_for(const std::vector<int64_t>& lengths, int64_t capacity, Strategy strategy) {
  PackRequest request;
  request.lengths = lengths.data();
  request.count = int64_t(lengths.size());
  request.capacity = capacity;
  request.strategy = strategy;
  return request;
}

std::vector<int64_t> random_lengths(int64_t count, int64_t longest, uint64_t seed) {
  check::Random random(seed);
  std::vector<int64_t> lengths(count);
  for (auto& length : lengths) length = 1 + random.below(longest);
  return lengths;
}

// Every token of every document lies in exactly one place, and no pack holds more than it may.
void check_plan(const PackRequest& request, const PackResult& result) {
  CHECK(!result.offsets.empty() && result.offsets.front() == 0);
  CHECK_EQ(result.offsets.back(), int64_t(result.indices.size()));
  std::vector<int64_t> seen(request.count, 0);
  for (size_t pack = 0; pack + 1 < result.offsets.size(); pack++) {
    int64_t used = 0;
    CHECK(result.offsets[pack] < result.offsets[pack + 1]);  // no empty pack
    for (int64_t i = result.offsets[pack]; i < result.offsets[pack + 1]; i++) {
      const int64_t document = result.indices[i];
      const int64_t length = result.lengths.empty() ? request.lengths[document] : result.lengths[i];
      if (!result.starts.empty()) CHECK_EQ(result.starts[i] >= 0, true);
      seen[document] += length;
      used += (length + request.multiple - 1) / request.multiple * request.multiple;
    }
    CHECK(used <= request.capacity);
    if (request.max_docs) CHECK(result.offsets[pack + 1] - result.offsets[pack] <= request.max_docs);
  }
  int64_t missing = 0;
  for (int64_t i = 0; i < request.count; i++) missing += request.lengths[i] - seen[i];
  CHECK_EQ(missing, result.dropped_tokens);
}

int64_t packs(const PackResult& result) { return int64_t(result.offsets.size()) - 1; }

}  // namespace

CASE(every_token_once_and_no_pack_too_full) {
  for (Strategy strategy : kStrategies) {
    for (int64_t count : {0, 1, 2, 777}) {
      for (int64_t multiple : {1, 8}) {
        const auto lengths = random_lengths(count, 128, 3);
        PackRequest request = request_for(lengths, 128, strategy);
        request.seed = 5;
        request.multiple = strategy == Strategy::wrapped ? 1 : multiple;
        check_plan(request, pack(request));
      }
    }
  }
}

CASE(limit_of_documents_per_pack) {
  const auto lengths = random_lengths(300, 20, 4);
  for (Strategy strategy : {Strategy::best_fit, Strategy::bfd, Strategy::ffd, Strategy::next_fit}) {
    PackRequest request = request_for(lengths, 1000, strategy);
    request.max_docs = 3;
    const PackResult result = pack(request);
    check_plan(request, result);
    CHECK_EQ(packs(result), 100);
  }
}

CASE(best_fit_takes_the_tightest_pack) {
  const std::vector<int64_t> lengths = {6, 5, 4, 3, 2};  // 6 | 5 | 6+4 | 5+3 | 5+3+2
  const PackResult result = pack(request_for(lengths, 10, Strategy::best_fit));
  CHECK_EQ(packs(result), 2);
  CHECK((result.indices == std::vector<int64_t>{0, 2, 1, 3, 4}));
}

CASE(decreasing_order_packs_what_next_fit_cannot) {
  const std::vector<int64_t> lengths = {3, 7, 3, 7, 3, 7};
  CHECK_EQ(packs(pack(request_for(lengths, 10, Strategy::bfd))), 3);
  CHECK_EQ(packs(pack(request_for(lengths, 10, Strategy::ffd))), 3);
  CHECK_EQ(packs(pack(request_for({4, 7, 4, 7}, 10, Strategy::next_fit))), 4);
}

CASE(wrapped_fills_every_pack_but_the_last) {
  const std::vector<int64_t> lengths = {7, 7, 7};
  const PackResult result = pack(request_for(lengths, 10, Strategy::wrapped));
  CHECK_EQ(packs(result), 3);
  CHECK((result.indices == std::vector<int64_t>{0, 1, 1, 2, 2}));
  CHECK((result.starts == std::vector<int64_t>{0, 0, 3, 0, 6}));
  CHECK((result.lengths == std::vector<int64_t>{7, 3, 4, 6, 1}));
}

CASE(overlong_documents) {
  const std::vector<int64_t> lengths = {25, 4};
  PackRequest request = request_for(lengths, 10, Strategy::best_fit);
  bool raised = false;
  try {
    pack(request);
  } catch (const std::invalid_argument& error) {
    raised = std::string(error.what()).find("25") != std::string::npos;
  }
  CHECK(raised);
  for (auto [overlong, dropped] : {std::pair{Overlong::truncate, 15}, {Overlong::split, 0}, {Overlong::drop, 25}}) {
    request.overlong = overlong;
    const PackResult result = pack(request);
    check_plan(request, result);
    CHECK_EQ(result.overlong, 1);
    CHECK_EQ(result.dropped_tokens, dropped);
  }
}

CASE(same_seed_same_plan) {
  const auto lengths = random_lengths(5000, 512, 6);
  PackRequest request = request_for(lengths, 512, Strategy::best_fit);
  request.seed = 1;
  const auto first = pack(request).indices;
  CHECK(pack(request).indices == first);
  request.epoch = 1;
  CHECK(pack(request).indices != first);
  request.epoch = 0;
  request.seed = 2;
  CHECK(pack(request).indices != first);
}

CASE(permutation_is_one) {
  for (int64_t count : {0, 1, 2, 1000, 100003}) {
    auto order = permutation(count, 9, 0);
    const bool sorted = std::is_sorted(order.begin(), order.end());
    CHECK(count < 3 || !sorted);
    std::sort(order.begin(), order.end());
    std::vector<int64_t> want(count);
    std::iota(want.begin(), want.end(), 0);
    CHECK(order == want);
  }
}

// Every option at once, at capacities on both sides of the bound between the table of free spaces and the map.
CASE(random_requests) {
  check::Random random(7);
  const int64_t capacities[] = {1, 7, 64, 4096, 5000, (1 << 22) + 8, kMaxCapacity};
  for (int round = 0; round < 3000; round++) {
    const int64_t capacity = capacities[random.below(7)];
    std::vector<int64_t> lengths(random.below(round % 300 == 0 ? 40000 : 80));
    for (int64_t& length : lengths) length = random.below(random.below(8) == 0 ? 3 * capacity : capacity + 1);
    PackRequest request = request_for(lengths, capacity, kStrategies[random.below(5)]);
    request.overlong = static_cast<Overlong>(1 + random.below(3));
    request.max_docs = random.below(3) ? 0 : 1 + random.below(4);
    request.multiple = capacity % 8 == 0 && random.below(2) ? 8 : 1;
    if (random.below(2)) request.seed = static_cast<uint64_t>(random.below(1000));
    check_plan(request, pack(request));
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

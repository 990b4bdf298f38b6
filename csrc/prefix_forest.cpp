// See prefix_forest.h.
#include "prefix_forest.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace packops {

namespace {

class Builder {
 public:
  explicit Builder(const PrefixForestRequest& request) : r_(request), count_(request.documents) {
    if (r_.min_shared < 1) throw std::invalid_argument("min_shared must be positive, got " + std::to_string(r_.min_shared));
    for (int64_t d = 0; d < count_; d++) {
      if (length(d) < 0) throw std::invalid_argument("offsets must not decrease, but document " + std::to_string(d) + " does");
    }
    order_.resize(count_);
    std::iota(order_.begin(), order_.end(), 0);
    common_.assign(count_, 0);
    forest_.last.assign(count_, -1);
  }

  PrefixForest build() {
    sort();
    int64_t begin = 0;  // empty documents sort first and have no segment
    while (begin < count_ && length(order_[begin]) == 0) begin++;
    split(begin, count_, 0, 0, -1);
    while (!ranges_.empty()) {
      const Range range = ranges_.back();
      ranges_.pop_back();
      place(range);
    }
    return std::move(forest_);
  }

 private:
  // Documents order_[begin .. end), which agree in their first `depth` tokens. `parent` ends with the last of these.
  struct Range {
    int64_t begin, end, depth, parent;
  };

  const PrefixForestRequest r_;
  const int64_t count_;
  PrefixForest forest_;
  std::vector<int64_t> order_;   // (documents,) sorted by their tokens, shorter first
  std::vector<int64_t> common_;  // (documents,) tokens that order_[i] has in common with order_[i - 1]
  std::vector<Range> ranges_;    // still to be placed, the next one last

  int64_t length(int64_t document) const { return r_.offsets[document + 1] - r_.offsets[document]; }

  // Tokens that two documents have in common, of which they are known to share `known`.
  int64_t common(int64_t a, int64_t b, int64_t known) const {
    const int64_t most = std::min(length(a), length(b));
    const int64_t *x = r_.tokens + r_.offsets[a], *y = r_.tokens + r_.offsets[b];
    while (known < most && x[known] == y[known]) known++;
    return known;
  }

  // Merge sort. Of two heads, the one that shares more with what was written last comes first; only equals are compared, and
  // only beyond what they are known to share.
  void sort() {
    std::vector<int64_t> other(count_), other_common(count_);
    for (int64_t width = 1; width < count_; width *= 2) {
      for (int64_t begin = 0; begin < count_; begin += 2 * width) {
        const int64_t middle = std::min(begin + width, count_), end = std::min(begin + 2 * width, count_);
        int64_t i = begin, j = middle, common_i = 0, common_j = 0;
        for (int64_t at = begin; at < end; at++) {
          bool first = j == end;
          if (i < middle && j < end) {
            first = common_i >= common_j;
            if (common_i == common_j) {
              const int64_t a = order_[i], b = order_[j], both = common(a, b, common_i);
              first =
                  both == length(a) || (both < length(b) && r_.tokens[r_.offsets[a] + both] < r_.tokens[r_.offsets[b] + both]);
              (first ? common_j : common_i) = both;  // of the head that stays with the one that is written now
            }
          }
          int64_t& head = first ? i : j;
          int64_t& head_common = first ? common_i : common_j;
          other[at] = order_[head];
          other_common[at] = at == begin ? 0 : head_common;
          head++;
          head_common = head < (first ? middle : end) ? common_[head] : 0;
        }
      }
      order_.swap(other);
      common_.swap(other_common);
    }
  }

  int64_t add_segment(int64_t begin, int64_t start, int64_t end, int64_t parent) {
    forest_.document.push_back(order_[begin]);
    forest_.start.push_back(start);
    forest_.length.push_back(end - start);
    forest_.parent.push_back(parent);
    return int64_t(forest_.parent.size()) - 1;
  }

  // Puts order_[begin .. end) on the stack in parts that differ at token `agreed`, so that the first is placed next.
  void split(int64_t begin, int64_t end, int64_t agreed, int64_t depth, int64_t parent) {
    for (int64_t i = end; i > begin;) {
      int64_t first = i - 1;
      while (first > begin && common_[first] > agreed) first--;
      ranges_.push_back({first, i, depth, parent});
      i = first;
    }
  }

  void place(const Range& range) {
    int64_t agreed = length(order_[range.begin]);
    for (int64_t i = range.begin + 1; i < range.end; i++) agreed = std::min(agreed, common_[i]);
    int64_t rest = range.begin;  // documents before this one end at `agreed`; they sort before those that go on
    while (rest < range.end && length(order_[rest]) == agreed) rest++;

    const bool one_goes_on =
        rest > range.begin && rest < range.end &&
        std::none_of(common_.begin() + rest + 1, common_.begin() + range.end, [&](int64_t common) { return common == agreed; });
    const bool all_end = rest == range.end, is_cut = !all_end && !one_goes_on;
    const int64_t end = agreed - is_cut;
    if (!all_end && (end < r_.min_shared || end == range.depth))
      return split_in_parts(range, rest, agreed, range.depth, range.parent);

    const int64_t segment = add_segment(range.begin, range.depth, end, range.parent);
    if (is_cut) return split_in_parts(range, rest, agreed, end, segment);
    for (int64_t i = range.begin; i < rest; i++) forest_.last[order_[i]] = segment;
    split(rest, range.end, agreed, end, segment);
  }

  // The documents that end at `agreed` are one part, however many they are: they are equal.
  void split_in_parts(const Range& range, int64_t rest, int64_t agreed, int64_t depth, int64_t parent) {
    split(rest, range.end, agreed, depth, parent);
    if (rest > range.begin) ranges_.push_back({range.begin, rest, depth, parent});
  }
};

}  // namespace

PrefixForest make_prefix_forest(const PrefixForestRequest& request) { return Builder(request).build(); }

}  // namespace packops

// A packed axis whose documents share prefixes, on the CPU; packed_forest.h has the rule. Three passes: segments forward for
// their first positions, segments backward for their ends, tokens backward for what a run of them has in common.
#include "packed_forest.h"

#include <algorithm>
#include <vector>

namespace packops {

namespace {

int64_t parent_of(const PackedForestParams& p, int64_t segment) { return integer_at(p.parents, p.parent_dtype, segment); }

}  // namespace

int64_t first_malformed_parent(const PackedForestParams& p) {
  std::vector<int64_t> open;  // the segment before and its ancestors
  for (int64_t s = 0; s < p.axis.documents; s++) {
    const int64_t parent = parent_of(p, s);
    while (!open.empty() && open.back() != parent) open.pop_back();
    if (open.empty() && parent != -1) return s;
    open.push_back(s);
  }
  return -1;
}

void packed_forest_cpu(const PackedForestParams& p) {
  const int64_t segments = p.axis.documents, tokens = p.tokens;
  for (int64_t s = 0; s < segments; s++) {
    const int64_t parent = parent_of(p, s);
    p.segment_starts[s] =
        parent < 0 ? 0 : int32_t(p.segment_starts[parent] + boundary(p.axis, parent + 1) - boundary(p.axis, parent));
    p.segment_ends[s] = int32_t(boundary(p.axis, s + 1));
  }
  p.trees[segments] = int32_t(boundary(p.axis, segments));
  for (int64_t s = segments - 1; s >= 0; s--) {
    const int64_t parent = parent_of(p, s);
    p.trees[s] = parent < 0 ? int32_t(boundary(p.axis, s)) : p.trees[s + 1];
    if (parent >= 0) p.segment_ends[parent] = std::max(p.segment_ends[parent], p.segment_ends[s]);
  }

  for (int64_t s = 0; s <= segments; s++) {
    const bool is_padding = s == segments;
    const int64_t begin = boundary(p.axis, s), end = is_padding ? tokens : boundary(p.axis, s + 1);
    for (int64_t t = begin; t < end; t++) {
      p.positions[t] = int32_t(t - begin) + (is_padding ? 0 : p.segment_starts[s]);
      p.ends[t] = is_padding ? 0 : p.segment_ends[s];
      if (p.position_ids) p.position_ids[t] = p.positions[t];
      if (p.seq_idx) p.seq_idx[t] = is_padding ? -1 : int32_t(s);
    }
  }
  for (int64_t t = 0; t < tokens; t++) {
    const auto [least, most] = std::minmax_element(p.ends + t, p.ends + std::min(t + kForestRun, tokens));
    p.nearest[t] = *least;
    p.furthest[t] = *most;
  }
}

}  // namespace packops

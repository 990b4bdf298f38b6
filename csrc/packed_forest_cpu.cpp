// A packed axis whose documents share prefixes, on the CPU; packed_forest.h has the rule. Three passes: over segments
// forward for their first positions, over segments backward for the ends of subtrees, then over tokens.
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
    const ForestSegment before = parent < 0 ? ForestSegment{} : p.segments[parent];
    p.segments[s] = {int32_t(boundary(p.axis, s)), int32_t(boundary(p.axis, s + 1)), before.position + before.end - before.begin,
                     int32_t(parent)};
    p.subtree_ends[s] = p.segments[s].end;
  }
  p.trees[segments] = int32_t(boundary(p.axis, segments));
  for (int64_t s = segments - 1; s >= 0; s--) {
    const int64_t parent = parent_of(p, s);
    p.trees[s] = parent < 0 ? int32_t(boundary(p.axis, s)) : p.trees[s + 1];
    if (parent >= 0) p.subtree_ends[parent] = std::max(p.subtree_ends[parent], p.subtree_ends[s]);
  }

  for (int64_t s = 0; s <= segments; s++) {
    const bool is_padding = s == segments;
    const int64_t begin = boundary(p.axis, s), end = is_padding ? tokens : boundary(p.axis, s + 1);
    for (int64_t t = begin; t < end; t++) {
      p.positions[t] = int32_t(t - begin) + (is_padding ? 0 : p.segments[s].position);
      p.ends[t] = is_padding ? 0 : p.subtree_ends[s];
      if (p.position_ids) p.position_ids[t] = p.positions[t];
      if (p.seq_idx) p.seq_idx[t] = is_padding ? -1 : int32_t(s);
    }
  }
}

}  // namespace packops

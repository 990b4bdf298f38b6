// Documents that begin with the same tokens -> a forest of segments, in which a shared prefix stands once. Host only, one thread,
// no torch.
//
// A segment continues its parent, so a document is the path from a root to the segment at which it ends. Segments come in
// depth-first order: a parent before its children, every subtree contiguous.
//
// A branch is cut one token early. The last token of a shared prefix has one next token per branch, and a row of logits has one
// label. So this token stays out of the parent and begins each child instead, at the same position: it sees the same keys, hence
// its hidden state is the same. Where only one branch goes on, because the other documents end there, nothing is cut.
//
// Cost: documents are merge-sorted with the lengths of their common prefixes (Ng and Kakehi 2008), so that every token is
// compared O(1) times; the segments then follow from the smallest common prefix of each range. O(tokens + documents log
// documents).
#pragma once

#include <cstdint>
#include <vector>

namespace packops {

struct PrefixForestRequest {
  const int64_t* tokens = nullptr;   // all documents, one after the other
  const int64_t* offsets = nullptr;  // (documents + 1,) document d is tokens [offsets[d], offsets[d + 1])
  int64_t documents = 0;
  int64_t min_shared = 1;  // prefixes of fewer tokens than this are repeated instead of shared
};

struct PrefixForest {
  // (segments,) Segment s holds tokens [start[s], start[s] + length[s]) of document[s]; start is also its first position.
  std::vector<int64_t> document, start, length;
  std::vector<int64_t> parent;  // (segments,) the segment that it continues, -1 for a root
  std::vector<int64_t> last;    // (documents,) the segment at which a document ends, -1 for an empty one
};

// Throws std::invalid_argument where offsets decrease or min_shared is not positive.
PrefixForest make_prefix_forest(const PrefixForestRequest& request);

}  // namespace packops

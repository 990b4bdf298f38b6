// Bin packing on integers: lengths of documents -> packs of at most `capacity` tokens. Host only, one thread, no torch.
//
// Strategies (documents come in an order drawn from (seed, epoch), or as given):
//   best_fit    each into the open pack with the least free space that still holds it; every pack stays open
//   bfd         the same, longest first
//   ffd         longest first, each into the first pack that holds it
//   next_fit    into the last pack, or a new one
//   wrapped     concatenated and cut every `capacity` tokens; documents are split
// best_fit and bfd keep the open packs in one list per free space and find the least sufficient one in a hierarchical bitmap:
// constant time a document. ffd descends a tree of maxima: log(packs).
//
// The result is a function of the request alone: own random numbers, integers only, no dependence on the machine.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace packops {

enum class Strategy : int32_t { best_fit, bfd, ffd, next_fit, wrapped };

// What becomes of a document longer than the capacity. `wrapped` splits every document anyway and has no overlong ones.
enum class Overlong : int32_t { error, truncate, split, drop };

struct PackRequest {
  const int64_t* lengths = nullptr;  // (count,)
  int64_t count = 0;
  int64_t capacity = 0;  // tokens a pack, 1 .. kMaxCapacity
  Strategy strategy = Strategy::best_fit;
  std::optional<uint64_t> seed;  // none: documents keep their order
  uint64_t epoch = 0;
  int64_t max_docs = 0;  // pieces a pack, 0: any number
  Overlong overlong = Overlong::error;
  int64_t multiple = 1;  // a piece takes its length rounded up to this; divides the capacity
};

inline constexpr int64_t kMaxCapacity = (int64_t{1} << 31) - 1;
inline constexpr int64_t kMaxPieces = (int64_t{1} << 32) - 2;

// Pack p holds the pieces [offsets[p], offsets[p + 1]), in the order in which they were placed.
struct PackResult {
  std::vector<int64_t> indices;  // (pieces,) the document of each piece
  std::vector<int64_t> offsets;  // (packs + 1,)
  std::vector<int64_t> starts;   // (pieces,) where in its document a piece begins, and how long it is (unrounded);
  std::vector<int64_t> lengths;  // both empty where every piece is its whole document
  int64_t empty = 0;             // documents of no token, which are in no pack
  int64_t overlong = 0;          // documents longer than the capacity
  int64_t dropped_tokens = 0;    // tokens in no pack: cut off by truncate, or of dropped documents
};

// Throws std::invalid_argument, with the index and the length, for a negative length, an overlong document under
// Overlong::error, or a request out of range.
PackResult pack(const PackRequest& request);

// A permutation of 0..count-1 that depends on (seed, epoch) alone.
std::vector<int64_t> permutation(int64_t count, uint64_t seed, uint64_t epoch);

}  // namespace packops

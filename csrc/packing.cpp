// Bin packing on integers; see packing.h. At ten million documents the bound is cache misses, so a document travels as one
// 8-byte (id, length) word: shuffled, sorted and placed without going back to the lengths.
#include "packing.h"

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <stdexcept>
#include <string>

namespace packops {

namespace {

constexpr uint32_t kNone = 0xffffffffu;

// A piece to place: a document, or a part of one (see Pieces). `size` is its length rounded up.
struct Piece {
  uint32_t id;
  uint32_t size;
};

// ---- random order ----------------------------------------------------------------------------------------------------------

// SplitMix64 (Steele, Lea, Flood 2014): one 64-bit state, equidistributed, the same on every machine.
class Random {
 public:
  Random(uint64_t seed, uint64_t epoch) : state_(seed) { state_ = next() ^ (epoch * 0xd1342543de82ef95u); }
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [0, bound), exactly (Lemire 2019): the few low products that would favour some values are drawn again.
  uint32_t below(uint32_t bound) {
    uint64_t product = (next() >> 32) * bound;
    if (static_cast<uint32_t>(product) < bound) {
      const uint32_t threshold = -bound % bound;
      while (static_cast<uint32_t>(product) < threshold) product = (next() >> 32) * bound;
    }
    return static_cast<uint32_t>(product >> 32);
  }

 private:
  uint64_t state_;
};

template <typename T>
void fisher_yates(T* items, size_t count, Random& random) {
  for (size_t i = count; i > 1; i--) std::swap(items[i - 1], items[random.below(static_cast<uint32_t>(i))]);
}

// A uniform permutation (Rao 1961, Sandelius 1962): deal the items to buckets at random, then shuffle each bucket. Every access
// of the second step stays in cache, where Fisher-Yates over all items would miss on each.
template <typename T>
void shuffle(std::vector<T>& items, Random& random) {
  constexpr size_t kBuckets = 256, kSmall = 1 << 15;
  if (items.size() <= kSmall) return fisher_yates(items.data(), items.size(), random);
  std::vector<uint8_t> bucket_of(items.size());
  std::vector<size_t> begin(kBuckets + 1, 0);
  for (size_t i = 0; i < items.size(); i += 8) {
    uint64_t bits = random.next();
    for (size_t j = i; j < std::min(i + 8, items.size()); j++, bits >>= 8) {
      bucket_of[j] = static_cast<uint8_t>(bits);
      begin[bucket_of[j] + 1]++;
    }
  }
  for (size_t b = 0; b < kBuckets; b++) begin[b + 1] += begin[b];
  std::vector<T> dealt(items.size());
  std::vector<size_t> cursor(begin.begin(), begin.end() - 1);
  for (size_t i = 0; i < items.size(); i++) dealt[cursor[bucket_of[i]]++] = items[i];
  for (size_t b = 0; b < kBuckets; b++) fisher_yates(dealt.data() + begin[b], begin[b + 1] - begin[b], random);
  items.swap(dealt);
}

// Longest first; equal sizes keep their (random) order. Radix sort from the least significant digit. Digits have at most 8 bits,
// so that the 256 places a pass writes to stay in cache and TLB.
void sort_longest_first(std::vector<Piece>& pieces, uint32_t capacity) {
  const int bits = std::bit_width(capacity), passes = (bits + 7) / 8, digit = (bits + passes - 1) / passes;
  const uint32_t mask = (1u << digit) - 1;
  std::vector<Piece> other(pieces.size());
  for (int pass = 0; pass < passes; pass++) {
    const auto place = [&](const Piece& piece) { return mask - ((piece.size >> (pass * digit)) & mask); };
    std::array<size_t, 257> begin{};
    for (const Piece& piece : pieces) begin[place(piece) + 1]++;
    for (size_t b = 0; b < 256; b++) begin[b + 1] += begin[b];
    for (const Piece& piece : pieces) other[begin[place(piece)]++] = piece;
    pieces.swap(other);
  }
}

// ---- documents -> pieces ---------------------------------------------------------------------------------------------------

struct Pieces {
  std::vector<Piece> items;
  // With parts, items[i].id numbers a part; without, a document.
  bool has_parts = false;
  std::vector<uint32_t> part_document;
  std::vector<int64_t> part_start, part_length;

  void add_part(int64_t document, int64_t start, int64_t length, uint32_t size) {
    items.push_back({static_cast<uint32_t>(part_document.size()), size});
    part_document.push_back(static_cast<uint32_t>(document));
    part_start.push_back(start);
    part_length.push_back(length);
  }
};

uint32_t round_up(int64_t length, int64_t multiple) {
  return static_cast<uint32_t>((length + multiple - 1) / multiple * multiple);
}

std::string describe(int64_t index, int64_t length) {
  return "lengths[" + std::to_string(index) + "] = " + std::to_string(length);
}

void check(const PackRequest& r) {
  if (r.capacity < 1 || r.capacity > kMaxCapacity)
    throw std::invalid_argument("max_length must be between 1 and 2^31 - 1, got " + std::to_string(r.capacity));
  if (r.multiple < 1 || r.capacity % r.multiple != 0) {
    throw std::invalid_argument("pad_doc_to_multiple_of must divide max_length = " + std::to_string(r.capacity) + ", got " +
                                std::to_string(r.multiple));
  }
  if (r.max_docs < 0) throw std::invalid_argument("max_docs_per_pack must be positive, got " + std::to_string(r.max_docs));
  if (r.count > kMaxPieces) throw std::invalid_argument("at most 2^32 - 2 documents, got " + std::to_string(r.count));
}

// Whole documents, and where documents are cut also their parts. `wrapped` cuts while it places, so it gets whole documents.
Pieces make_pieces(const PackRequest& r, PackResult& result) {
  const bool is_wrapped = r.strategy == Strategy::wrapped;
  bool is_cut = false;
  const bool splits = is_wrapped || r.overlong == Overlong::split;
  int64_t total = 0, parts = 0;  // no sum of some of the lengths can overflow if this does not
  for (int64_t i = 0; i < r.count; i++) {
    const int64_t length = r.lengths[i];
    if (length < 0) throw std::invalid_argument(describe(i, length) + " is negative");
    if (__builtin_add_overflow(total, length, &total)) {
      throw std::invalid_argument("lengths must add up to less than 2^63 tokens, they exceed it at " + describe(i, length));
    }
    parts += length / r.capacity + (length % r.capacity != 0);
    if (splits && parts > kMaxPieces) throw std::invalid_argument("documents split into more than 2^32 - 2 pieces");
    result.empty += length == 0;
    if (is_wrapped || length <= r.capacity) continue;
    if (r.overlong == Overlong::error) {
      throw std::invalid_argument(describe(i, length) + " is longer than max_length = " + std::to_string(r.capacity) +
                                  "; overlong=\"truncate\", \"split\" or \"drop\" accepts it");
    }
    result.overlong++;
    if (r.overlong == Overlong::drop) result.dropped_tokens += length;
    if (r.overlong == Overlong::truncate) result.dropped_tokens += length - r.capacity;
    is_cut |= r.overlong != Overlong::drop;
  }

  Pieces pieces;
  pieces.has_parts = is_cut;
  pieces.items.reserve(static_cast<size_t>(r.count - result.empty));
  for (int64_t i = 0; i < r.count; i++) {
    const int64_t length = r.lengths[i];
    if (length == 0) continue;
    if (is_wrapped) {
      pieces.items.push_back({static_cast<uint32_t>(i), 0});
    } else if (length <= r.capacity) {
      const uint32_t size = round_up(length, r.multiple);
      is_cut ? pieces.add_part(i, 0, length, size) : pieces.items.push_back({static_cast<uint32_t>(i), size});
    } else if (r.overlong == Overlong::truncate) {
      pieces.add_part(i, 0, r.capacity, static_cast<uint32_t>(r.capacity));
    } else if (r.overlong == Overlong::split) {
      for (int64_t start = 0; start < length; start += r.capacity) {
        const int64_t part = std::min(r.capacity, length - start);
        pieces.add_part(i, start, part, round_up(part, r.multiple));
      }
    }
  }
  return pieces;
}

// ---- open packs by free space ----------------------------------------------------------------------------------------------

struct Pack {
  uint32_t next;   // the next pack with as much free space
  uint32_t count;  // pieces in it
};

// Heads of the lists of packs with a given free space, for capacities small enough to have one slot a token. Each bitmap level
// says which 64-bit words of the level below are not zero.
class FreeTable {
 public:
  explicit FreeTable(uint32_t capacity) : heads_(size_t{capacity} + 1, kNone) {
    size_t words = heads_.size();
    do {
      words = (words + 63) / 64;
      levels_.emplace_back(words, 0);
    } while (words > 1);
  }
  uint32_t& head(uint32_t free) { return heads_[free]; }
  void mark(uint32_t free) {
    for (auto& level : levels_) {
      uint64_t& word = level[free / 64];
      const bool was_marked = word != 0;
      word |= uint64_t{1} << (free % 64);
      if (was_marked) return;
      free /= 64;
    }
  }
  void clear(uint32_t free) {
    for (auto& level : levels_) {
      uint64_t& word = level[free / 64];
      word &= ~(uint64_t{1} << (free % 64));
      if (word != 0) return;
      free /= 64;
    }
  }
  // The least marked free space >= size, or kNone.
  uint32_t at_least(uint32_t size) const {
    uint64_t position = size;
    for (size_t up = 0; up < levels_.size(); up++) {
      const size_t index = position / 64;
      if (index >= levels_[up].size()) return kNone;
      const uint64_t word = levels_[up][index] >> (position % 64);
      if (word != 0) {
        position += std::countr_zero(word);
        while (up-- > 0) position = position * 64 + std::countr_zero(levels_[up][position]);
        return static_cast<uint32_t>(position);
      }
      position = index + 1;
    }
    return kNone;
  }

 private:
  std::vector<uint32_t> heads_;
  std::vector<std::vector<uint64_t>> levels_;
};

// The same for capacities beyond that: a slot for each free space that occurs.
class FreeMap {
 public:
  explicit FreeMap(uint32_t) {}
  uint32_t& head(uint32_t free) { return heads_.try_emplace(free, kNone).first->second; }
  void mark(uint32_t) {}
  void clear(uint32_t free) { heads_.erase(free); }
  uint32_t at_least(uint32_t size) const {
    const auto found = heads_.lower_bound(size);
    return found == heads_.end() ? kNone : found->first;
  }

 private:
  std::map<uint32_t, uint32_t> heads_;
};

// ---- strategies: the pack of each piece ------------------------------------------------------------------------------------

struct Assignment {
  std::vector<uint32_t> pack_of;  // (pieces,) in the order of the pieces
  std::vector<Pack> packs;
};

template <typename FreeSpaces>
Assignment best_fit(const std::vector<Piece>& pieces, uint32_t capacity, uint32_t max_docs) {
  Assignment result;
  result.pack_of.resize(pieces.size());
  std::vector<Pack>& packs = result.packs;
  FreeSpaces spaces(capacity);
  for (size_t i = 0; i < pieces.size(); i++) {
    const uint32_t size = pieces[i].size;
    uint32_t free = spaces.at_least(size);
    uint32_t pack;
    if (free == kNone) {
      free = capacity;
      pack = static_cast<uint32_t>(packs.size());
      packs.push_back({kNone, 0});
    } else {
      uint32_t& head = spaces.head(free);
      pack = head;
      head = packs[pack].next;
      if (head == kNone) spaces.clear(free);
    }
    result.pack_of[i] = pack;
    const uint32_t left = free - size;
    if (++packs[pack].count == max_docs || left == 0) continue;
    uint32_t& head = spaces.head(left);
    packs[pack].next = head;
    if (head == kNone) spaces.mark(left);
    head = pack;
  }
  return result;
}

// Leaves are the free spaces of the packs, inner nodes the maximum of their two children; a full tree doubles.
class FirstFitTree {
 public:
  uint32_t first_at_least(uint32_t size) const {
    if (tree_[1] < size) return kNone;
    size_t node = 1;
    while (node < leaves_) node = 2 * node + (tree_[2 * node] < size);
    return static_cast<uint32_t>(node - leaves_);
  }
  uint32_t free(uint32_t pack) const { return tree_[leaves_ + pack]; }
  void set(uint32_t pack, uint32_t free) {
    if (pack >= leaves_) grow();
    size_t node = leaves_ + pack;
    tree_[node] = free;
    while (node > 1) {
      node /= 2;
      const uint32_t most = std::max(tree_[2 * node], tree_[2 * node + 1]);
      if (tree_[node] == most) return;
      tree_[node] = most;
    }
  }

 private:
  void grow() {
    std::vector<uint32_t> bigger(4 * leaves_, 0);
    std::copy(tree_.begin() + leaves_, tree_.end(), bigger.begin() + 2 * leaves_);
    leaves_ *= 2;
    tree_.swap(bigger);
    for (size_t node = leaves_ - 1; node > 0; node--) tree_[node] = std::max(tree_[2 * node], tree_[2 * node + 1]);
  }
  size_t leaves_ = 1024;
  std::vector<uint32_t> tree_ = std::vector<uint32_t>(2048, 0);
};

Assignment first_fit(const std::vector<Piece>& pieces, uint32_t capacity, uint32_t max_docs) {
  Assignment result;
  result.pack_of.resize(pieces.size());
  FirstFitTree tree;
  for (size_t i = 0; i < pieces.size(); i++) {
    uint32_t pack = tree.first_at_least(pieces[i].size);
    uint32_t free = capacity;
    if (pack == kNone) {
      pack = static_cast<uint32_t>(result.packs.size());
      result.packs.push_back({kNone, 0});
    } else {
      free = tree.free(pack);
    }
    result.pack_of[i] = pack;
    const bool is_closed = ++result.packs[pack].count == max_docs;
    tree.set(pack, is_closed ? 0 : free - pieces[i].size);
  }
  return result;
}

Assignment next_fit(const std::vector<Piece>& pieces, uint32_t capacity, uint32_t max_docs) {
  Assignment result;
  result.pack_of.resize(pieces.size());
  uint32_t free = 0;
  for (size_t i = 0; i < pieces.size(); i++) {
    if (pieces[i].size > free || result.packs.back().count == max_docs) {
      result.packs.push_back({kNone, 0});
      free = capacity;
    }
    free -= pieces[i].size;
    result.packs.back().count++;
    result.pack_of[i] = static_cast<uint32_t>(result.packs.size() - 1);
  }
  return result;
}

// ---- the result ------------------------------------------------------------------------------------------------------------

void collect(const Pieces& pieces, const Assignment& assignment, PackResult& result) {
  result.offsets.resize(assignment.packs.size() + 1);
  std::vector<size_t> cursor(assignment.packs.size());
  size_t total = 0;
  for (size_t p = 0; p < cursor.size(); p++) {
    cursor[p] = total;
    result.offsets[p] = static_cast<int64_t>(total);
    total += assignment.packs[p].count;
  }
  result.offsets.back() = static_cast<int64_t>(total);
  result.indices.resize(total);
  if (pieces.has_parts) {
    result.starts.resize(total);
    result.lengths.resize(total);
  }
  for (size_t i = 0; i < total; i++) {
    const size_t slot = cursor[assignment.pack_of[i]]++;
    const uint32_t id = pieces.items[i].id;
    result.indices[slot] = pieces.has_parts ? pieces.part_document[id] : id;
    if (pieces.has_parts) {
      result.starts[slot] = pieces.part_start[id];
      result.lengths[slot] = pieces.part_length[id];
    }
  }
}

void wrap(const PackRequest& r, const std::vector<Piece>& documents, PackResult& result) {
  int64_t tokens = 0;
  for (const Piece& document : documents) tokens += r.lengths[document.id];
  const size_t packs = static_cast<size_t>(tokens / r.capacity + 1), most = documents.size() + packs;
  for (auto* column : {&result.indices, &result.starts, &result.lengths}) column->reserve(most);
  result.offsets.reserve(packs + 1);
  result.offsets.push_back(0);
  int64_t free = r.capacity, count = 0;
  const auto close = [&] {
    result.offsets.push_back(static_cast<int64_t>(result.indices.size()));
    free = r.capacity;
    count = 0;
  };
  for (const Piece& document : documents) {
    const int64_t length = r.lengths[document.id];
    for (int64_t start = 0; start < length;) {
      const int64_t part = std::min(free, length - start);
      result.indices.push_back(document.id);
      result.starts.push_back(start);
      result.lengths.push_back(part);
      start += part;
      free -= round_up(part, r.multiple);
      if (free == 0 || ++count == r.max_docs) close();
    }
  }
  if (count > 0) close();
}

}  // namespace

PackResult pack(const PackRequest& r) {
  constexpr int64_t kTableCapacity = 1 << 22;
  check(r);
  PackResult result;
  Pieces pieces = make_pieces(r, result);
  if (r.seed) {
    Random random(*r.seed, r.epoch);
    shuffle(pieces.items, random);
  }
  if (r.strategy == Strategy::wrapped) {
    wrap(r, pieces.items, result);
    return result;
  }
  const uint32_t capacity = static_cast<uint32_t>(r.capacity);
  const uint32_t max_docs = static_cast<uint32_t>(std::min(r.max_docs, kMaxPieces));
  if (r.strategy == Strategy::bfd || r.strategy == Strategy::ffd) sort_longest_first(pieces.items, capacity);
  switch (r.strategy) {
    case Strategy::ffd: collect(pieces, first_fit(pieces.items, capacity, max_docs), result); break;
    case Strategy::next_fit: collect(pieces, next_fit(pieces.items, capacity, max_docs), result); break;
    default:
      collect(pieces,
              r.capacity <= kTableCapacity ? best_fit<FreeTable>(pieces.items, capacity, max_docs)
                                           : best_fit<FreeMap>(pieces.items, capacity, max_docs),
              result);
  }
  return result;
}

std::vector<int64_t> permutation(int64_t count, uint64_t seed, uint64_t epoch) {
  std::vector<int64_t> items(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) items[static_cast<size_t>(i)] = i;
  Random random(seed, epoch);
  shuffle(items, random);
  return items;
}

}  // namespace packops

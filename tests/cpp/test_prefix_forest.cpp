// Forests of documents with common prefixes: what every forest must satisfy, and forests small enough to know by heart.
#include "prefix_forest.h"

#include <map>
#include <stdexcept>

#include "check.h"

using namespace packops;

namespace {

using Documents = std::vector<std::vector<int64_t>>;

PrefixForest forest_of(const Documents& documents, int64_t min_shared) {
  std::vector<int64_t> tokens, offsets{0};
  for (const auto& document : documents) {
    tokens.insert(tokens.end(), document.begin(), document.end());
    offsets.push_back(int64_t(tokens.size()));
  }
  return make_prefix_forest({tokens.data(), offsets.data(), int64_t(documents.size()), min_shared});
}

int64_t total(const std::vector<int64_t>& values) {
  int64_t sum = 0;
  for (int64_t value : values) sum += value;
  return sum;
}

void check_forest(const Documents& documents, const PrefixForest& f, int64_t min_shared) {
  const int64_t segments = int64_t(f.parent.size());
  std::vector<int64_t> children(segments, 0), documents_through(segments, 0), open;
  for (int64_t s = 0; s < segments; s++) {
    CHECK(f.length[s] > 0);
    while (!open.empty() && open.back() != f.parent[s]) open.pop_back();  // depth first: the parent is still open
    CHECK_EQ(open.empty(), f.parent[s] < 0);
    CHECK_EQ(f.start[s], f.parent[s] < 0 ? 0 : f.start[f.parent[s]] + f.length[f.parent[s]]);
    if (f.parent[s] >= 0) children[f.parent[s]]++;
    open.push_back(s);
  }

  // The path of every document holds its tokens, and a row has one next token for all documents that go on from it.
  std::map<std::pair<int64_t, int64_t>, int64_t> next;
  for (size_t d = 0; d < documents.size(); d++) {
    const auto& document = documents[d];
    CHECK_EQ(f.last[d] < 0, document.empty());
    int64_t end = int64_t(document.size());
    for (int64_t s = f.last[d]; s >= 0; s = f.parent[s]) {
      documents_through[s]++;
      CHECK_EQ(f.start[s] + f.length[s], end);
      const auto& owner = documents[size_t(f.document[s])];
      for (int64_t i = f.start[s]; i < end; i++) {
        CHECK_EQ(owner[size_t(i)], document[size_t(i)]);
        if (i + 1 == int64_t(document.size())) continue;
        CHECK_EQ(next.try_emplace({s, i}, document[size_t(i) + 1]).first->second, document[size_t(i) + 1]);
      }
      end = f.start[s];
    }
    CHECK_EQ(end, 0);
  }
  for (int64_t s = 0; s < segments; s++) {
    CHECK(documents_through[s] > 0);
    if (children[s]) CHECK(f.start[s] + f.length[s] >= min_shared);
  }
}

// Documents that continue random prefixes of those before them, over so few tokens that they meet by chance too.
Documents random_documents(check::Random& random) {
  Documents documents(size_t(random.below(12)));
  const int64_t alphabet = 1 + random.below(3);
  for (size_t d = 0; d < documents.size(); d++) {
    if (d && random.below(3)) {
      const auto& other = documents[size_t(random.below(int64_t(d)))];
      documents[d].assign(other.begin(), other.begin() + random.below(int64_t(other.size()) + 1));
    }
    for (int64_t i = random.below(9); i > 0; i--) documents[d].push_back(random.below(alphabet));
  }
  return documents;
}

}  // namespace

CASE(random_forests_hold_their_documents) {
  check::Random random(7);
  for (int64_t i = 0; i < 3000; i++) {
    const Documents documents = random_documents(random);
    const int64_t min_shared = 1 + random.below(4);
    check_forest(documents, forest_of(documents, min_shared), min_shared);
  }
}

CASE(a_branch_is_cut_one_token_early) {
  const PrefixForest f = forest_of({{1, 2, 3, 9}, {1, 2, 3, 8, 8}}, 1);
  CHECK(f.parent == (std::vector<int64_t>{-1, 0, 0}));
  CHECK(f.start == (std::vector<int64_t>{0, 2, 2}));
  CHECK(f.length == (std::vector<int64_t>{2, 3, 2}));
  CHECK(f.last == (std::vector<int64_t>{2, 1}));
}

CASE(a_document_that_another_continues_ends_inside) {
  const PrefixForest f = forest_of({{1, 2, 3, 4}, {1, 2, 3}, {1, 2, 3}}, 1);
  CHECK(f.parent == (std::vector<int64_t>{-1, 0}));
  CHECK(f.length == (std::vector<int64_t>{3, 1}));
  CHECK(f.last == (std::vector<int64_t>{1, 0, 0}));
}

CASE(a_document_that_two_others_continue_is_a_branch) {
  const PrefixForest f = forest_of({{1, 2, 3}, {1, 2, 3, 4}, {1, 2, 3, 5}}, 1);
  CHECK(f.parent == (std::vector<int64_t>{-1, 0, 0, 0}));
  CHECK(f.length == (std::vector<int64_t>{2, 1, 2, 2}));
}

CASE(short_prefixes_are_repeated) {
  const Documents documents{{1, 2, 3, 4, 5}, {1, 2, 3, 4, 6}};
  CHECK_EQ(forest_of(documents, 3).parent.size(), size_t(3));
  CHECK_EQ(forest_of(documents, 4).parent.size(), size_t(2));  // three tokens would be shared, the fourth begins the branches
  CHECK_EQ(total(forest_of(documents, 4).length), int64_t(10));
}

CASE(equal_documents_stand_once) {
  const PrefixForest f = forest_of({{5, 6}, {5, 6}, {5, 6}}, 64);
  CHECK_EQ(total(f.length), int64_t(2));
  CHECK(f.last == (std::vector<int64_t>{0, 0, 0}));
}

CASE(nothing_at_all) {
  CHECK(forest_of({}, 1).parent.empty());
  CHECK(forest_of({{}, {}}, 1).last == (std::vector<int64_t>{-1, -1}));
}

CASE(a_forest_as_deep_as_its_documents) {
  Documents documents;
  for (int64_t d = 0; d < 3000; d++) documents.emplace_back(size_t(d), 1);
  const PrefixForest f = forest_of(documents, 1);
  CHECK_EQ(f.parent.size(), size_t(2999));
  CHECK_EQ(total(f.length), int64_t(2999));
}

CASE(bad_requests_are_refused) {
  const auto is_refused = [](const std::vector<int64_t>& offsets, int64_t min_shared) {
    const int64_t tokens[] = {1, 1};
    try {
      make_prefix_forest({tokens, offsets.data(), int64_t(offsets.size()) - 1, min_shared});
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(is_refused({0, 1}, 0));
  CHECK(is_refused({0, 2, 1}, 1));
  CHECK(!is_refused({0, 1, 2}, 1));
}

// The CUDA kernels of attention within documents, emulated, against those of the CPU.
#include "attention.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "attention_launch.h"
#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "packed_forest.h"

using namespace packops;

namespace {

struct Problem {
  std::vector<int32_t> cu_seqlens;
  int64_t tokens;
  int32_t heads, kv_heads, head_dim;
  bool causal = true;
  int64_t window = 0;
  double softcap = 0;
  double size = 1;                    // of queries: large ones make rows whose weight lies on one key
  bool wide = false;                  // boundaries as int64
  int32_t long_from = 0;              // tokens beyond which documents take the kernels for long ones; 0: as they choose
  int32_t long_backward_from = 0;     // the same of the backward, where it is another
  std::vector<int32_t> parents = {};  // shared prefixes: what segments, which are then the documents above, continue
  int bad_segment = -1;               // whose inputs and gradients are NaN
  double key_size = 0;                // queries and keys are this at one feature, their token's, and 0 at the others; 0: random
  int32_t zeros = 0;                  // the last features of every head, so many of head_dim, are zeros
  double repulsion = 0;               // added to queries, subtracted from keys
};

constexpr int64_t kGuard = 16;  // elements before and behind every output, which nobody may write

template <typename T>
std::vector<T> guarded(int64_t count, T value) {
  return std::vector<T>(size_t(count + 2 * kGuard), value);
}

template <typename T>
struct Results {
  std::vector<T> out, grad_q, grad_k, grad_v;
  std::vector<float> lse;
};

template <typename T>
Results<T> run(const Problem& problem, bool cuda) {
  const int64_t dim = problem.head_dim, q_size = problem.tokens * problem.heads * dim,
                kv_size = problem.tokens * problem.kv_heads * dim;
  check::Random random{uint64_t(problem.tokens * 1000 + dim - problem.zeros)};
  // Each with gaps of its own between heads, so that no two tensors have the same strides; nobody reads what is in them.
  struct Matrix {
    std::vector<T> data;
    int64_t heads, head, dim;
    Heads view() const { return {data.data(), heads * head, head}; }
    T& at(int64_t token, int64_t i) { return data[size_t((token * heads + i / dim) * head + i % dim)]; }
    void fill(int64_t begin, int64_t end, double value) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t i = 0; i < heads * dim; i++) at(t, i) = from_float<T>(float(value));
    }
  };
  const auto matrix = [&](int64_t heads, int64_t gap, double size) {
    const int64_t head = dim + gap;
    Matrix m{std::vector<T>(size_t(problem.tokens * heads * head), from_float<T>(NAN)), heads, head, dim};
    for (int64_t t = 0; t < problem.tokens; t++)
      for (int64_t i = 0; i < heads * dim; i++)
        m.at(t, i) = from_float<T>(i % dim < dim - problem.zeros ? float(size * random.normal()) : 0.f);
    return m;
  };
  Matrix q = matrix(problem.heads, 16, problem.size), k = matrix(problem.kv_heads, 8, 1), v = matrix(problem.kv_heads, 24, 1),
         grad = matrix(problem.heads, 32, 1);
  if (const int64_t padding = problem.cu_seqlens.back(); padding >= 0)  // nobody reads it
    for (Matrix* m : {&q, &k, &v}) m->fill(padding, problem.tokens, NAN);
  if (problem.key_size > 0)
    for (Matrix* m : {&q, &k})
      for (int64_t t = 0; t < problem.tokens; t++)
        for (int64_t i = 0; i < m->heads * dim; i++)
          m->at(t, i) = from_float<T>(i % dim == t * 7 % dim ? float(problem.key_size) : 0.f);
  for (int64_t t = 0; t < problem.tokens; t++) {
    for (int64_t i = 0; i < q.heads * dim; i++) q.at(t, i) = from_float<T>(to_float(q.at(t, i)) + float(problem.repulsion));
    for (int64_t i = 0; i < k.heads * dim; i++) k.at(t, i) = from_float<T>(to_float(k.at(t, i)) - float(problem.repulsion));
  }
  if (problem.bad_segment >= 0)
    for (Matrix* m : {&q, &k, &v, &grad})
      m->fill(problem.cu_seqlens[size_t(problem.bad_segment)], problem.cu_seqlens[size_t(problem.bad_segment) + 1], NAN);
  Results<T> r;
  r.out = guarded(q_size, from_float<T>(77)), r.grad_q = r.out;
  r.grad_k = guarded(kv_size, from_float<T>(77)), r.grad_v = r.grad_k;
  r.lse = guarded((cuda ? 1 : 2) * problem.tokens * problem.heads, 77.f);
  AttentionParams p;
  p.q = q.view(), p.k = k.view(), p.v = v.view(), p.grad_out = grad.view();
  p.tokens = problem.tokens, p.heads = problem.heads, p.kv_heads = problem.kv_heads, p.head_dim = problem.head_dim;
  p.dtype = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  p.causal = problem.causal, p.window = problem.window, p.softcap = problem.softcap;
  p.scale = 0.9 / std::sqrt(double(dim - problem.zeros));  // not what the op chooses
  const std::vector<int64_t> wide(problem.cu_seqlens.begin(), problem.cu_seqlens.end());
  p.axis.cu_seqlens = problem.cu_seqlens.data(), p.axis.documents = int64_t(problem.cu_seqlens.size()) - 1;
  if (problem.wide) p.axis.cu_seqlens = wide.data(), p.axis.index_dtype = DType::i64;
  std::vector<int32_t> forest(size_t(forest_numbers(p.axis.documents, p.tokens)));
  if (!problem.parents.empty()) {
    PackedForestParams f;
    f.axis = p.axis, f.tokens = p.tokens;
    f.parents = problem.parents.data();
    set_forest_numbers(f, forest.data());
    if (cuda) CHECK_EQ(packed_forest_cuda(f, nullptr), cudaSuccess);
    else packed_forest_cpu(f);
    p.prefixes = {f.segments, f.subtree_ends, f.trees, f.positions, f.ends};
  }
  p.out = r.out.data() + kGuard, p.lse = r.lse.data() + kGuard;
  p.grad_q = r.grad_q.data() + kGuard, p.grad_k = r.grad_k.data() + kGuard, p.grad_v = r.grad_v.data() + kGuard;
  const AttentionTile nothing = {77, 77, 77, 77, 77};
  std::vector<AttentionTile> tiles = guarded(attention_tiles(p.tokens, p.axis.documents), nothing);
  std::vector<float> delta = guarded(problem.tokens * problem.heads, 77.f);
  unsigned drawn = 77;
  int32_t longest = 77;
  p.tiles = tiles.data() + kGuard, p.delta = delta.data() + kGuard, p.drawn = &drawn, p.longest = &longest;
  std::vector<float> parts;
  std::vector<int32_t> added;
  const auto set_parts = [&](bool backward) {  // none where it needs none
    const int64_t count = attention_parts(p, backward);
    parts = guarded(count, 77.f);
    added = guarded(backward && count ? 2 * problem.heads * attention_tiles(p.tokens, p.axis.documents) : 0, 77);
    p.parts = count ? parts.data() + kGuard : nullptr, p.added = backward && count ? added.data() + kGuard : nullptr;
  };
  const auto check_guards = [](const auto& x, const auto& is_untouched) {
    for (int64_t i = 0; i < kGuard; i++) CHECK(is_untouched(x[size_t(i)]) && is_untouched(x[x.size() - 1 - size_t(i)]));
  };
  const auto check_parts = [&] {
    check_guards(parts, [](float value) { return value == 77; });
    check_guards(added, [](int32_t value) { return value == 77; });
  };
  p.long_from = problem.long_from;
  if (cuda) {
    set_parts(false);
    CHECK_EQ(attention_cuda(p, nullptr), cudaSuccess);
    check_parts();
    if (problem.long_backward_from) p.long_from = problem.long_backward_from;
    set_parts(true);
    CHECK_EQ(attention_backward_cuda(p, nullptr), cudaSuccess);
    check_parts();
  } else {
    attention_cpu(p, 0, (p.axis.documents + 1) * p.kv_heads);
    attention_backward_cpu(p, 0, (p.axis.documents + 1) * p.kv_heads);
  }
  for (const auto* x : {&r.out, &r.grad_q, &r.grad_k, &r.grad_v}) check_guards(*x, [](T value) { return to_float(value) == 77; });
  for (const auto* x : {&r.lse, &delta}) check_guards(*x, [](float value) { return value == 77; });
  check_guards(tiles, [&](const AttentionTile& tile) { return std::memcmp(&tile, &nothing, sizeof tile) == 0; });
  return r;
}

template <typename T>
void compare(const Problem& problem) {
  const Results<T> want = run<T>(problem, false), got = run<T>(problem, true);
  // Weights and g are rounded to T before they are factors of a product; of the sums, whose size is that of the largest, a few
  // units.
  const double unit = std::is_same_v<T, half_t> ? 0x1p-11 : 0x1p-8;
  const auto check = [&](const char* name, const auto& a, const auto& b, double tolerance, double size = 0) {
    double largest = size, worst = 0;
    const size_t end = b.size() - size_t(kGuard);
    for (size_t i = size_t(kGuard); i < end; i++)
      largest = std::max(largest, std::isfinite(to_float(b[i])) ? std::abs(double(to_float(b[i]))) : 0);
    bool same = true;
    for (size_t i = size_t(kGuard); i < end; i++) {
      const double x = to_float(a[i]), y = to_float(b[i]);
      if (std::isinf(y) || std::isnan(x)) same &= x == y;
      else worst = std::max(worst, std::abs(x - y));
    }
    if (!same || worst > tolerance * largest + 1e-5) {
      std::printf("%s, head_dim %d, %d/%d heads, %lld tokens: off by %g of %g\n", name, problem.head_dim, problem.heads,
                  problem.kv_heads, (long long)problem.tokens, worst, largest);
      CHECK(false);
    }
  };
  check("out", got.out, want.out, 2 * unit);
  const auto lse_of = [&](const Results<T>& r) {  // without the CPU's second part
    return std::vector<float>(r.lse.begin(), r.lse.begin() + 2 * kGuard + problem.tokens * problem.heads);
  };
  if (std::any_of(want.lse.begin(), want.lse.end(), [](float x) { return std::isfinite(x) && std::abs(x) >= 0x1p16f; })) {
    for (const auto* gradient : {&got.grad_q, &got.grad_k, &got.grad_v})
      CHECK(std::all_of(gradient->begin() + kGuard, gradient->end() - kGuard, [](T x) { return std::isnan(to_float(x)); }));
    return;
  }
  check("lse", lse_of(got), lse_of(want), 4e-6);
  check("grad_q", got.grad_q, want.grad_q, 3 * unit, problem.key_size);  // sums of terms of that size that cancel
  check("grad_k", got.grad_k, want.grad_k, 3 * unit, problem.key_size);
  check("grad_v", got.grad_v, want.grad_v, 3 * unit);
}

}  // namespace

CASE(every_head_dim_and_group) {
  compare<bf16_t>({{0, 1, 71, 71, 199, 200}, 203, 4, 1, 64});
  compare<half_t>({{0, 65, 130}, 130, 2, 1, 64});
  compare<bf16_t>({{0, 64}, 64, 3, 3, 64});
  compare<bf16_t>({{0, 3, 100}, 101, 2, 1, 128});
  compare<half_t>({{0, 130}, 130, 1, 1, 128});
  compare<bf16_t>({{0, 17, 82}, 90, 2, 1, 256});
  compare<half_t>({{0, 66}, 66, 1, 1, 256});
  compare<bf16_t>({{0, 30}, 30, 7, 1, 64});  // teams with heads more and fewer
}
// Tiles have more columns than such heads. In the inputs, NaN or another head lies behind their columns.
CASE(head_dims_that_do_not_fill_a_tile) {
  compare<bf16_t>({{0, 1, 71, 71, 135}, 138, 4, 2, 40});
  compare<bf16_t>({{0, 3, 100}, 101, 2, 1, 80});
  compare<half_t>({{0, 65}, 65, 3, 3, 72});
  compare<bf16_t>({{0, 130}, 130, 2, 1, 96, true, 66, 5.0, 8});
  compare<bf16_t>({{0, 66}, 70, 2, 2, 104});
  compare<half_t>({{0, 70}, 75, 1, 1, 120, false});
  compare<bf16_t>({{0, 17, 82}, 90, 2, 1, 192});
  compare<half_t>({{0, 66}, 66, 1, 1, 200, true, 0, 50.0, 30});
  compare<bf16_t>({{0, 30}, 30, 7, 1, 8});  // teams with heads more and fewer
  compare<bf16_t>({{0, 20}, 20, 3, 1, 136});
}
CASE(head_dims_that_no_kernel_takes) {
  for (int32_t head_dim : {0, 4, 60, 100, 257, 264}) {
    AttentionParams p;
    p.tokens = 1, p.head_dim = head_dim;
    const int64_t boundaries[] = {0, 1};
    p.axis.cu_seqlens = boundaries, p.axis.documents = 1, p.axis.index_dtype = DType::i64;
    std::vector<AttentionTile> tiles(size_t(attention_tiles(1, 1)));
    unsigned drawn;
    p.tiles = tiles.data(), p.drawn = &drawn;
    CHECK_EQ(attention_cuda(p, nullptr), cudaErrorInvalidValue);
    CHECK_EQ(attention_backward_cuda(p, nullptr), cudaErrorInvalidValue);
  }
}
// The bits of heads that zeros in memory fill up, of the same scale.
CASE(heads_have_the_bits_of_heads_with_zeros_behind_them) {
  for (const auto& [head_dim, long_from] : {std::pair{40, 64}, {80, 64}, {120, 0}, {136, 64}, {208, 64}, {248, 0}})
    for (Problem problem :
         {Problem{{0, 20, 150}, 155, 2, 1, head_dim}, Problem{{0, 130}, 130, 1, 1, head_dim, true, 66, 5.0, 8}}) {
      problem.long_from = long_from;
      const Results<bf16_t> got = run<bf16_t>(problem, true);
      problem.head_dim = attention_columns(head_dim), problem.zeros = problem.head_dim - head_dim;
      const Results<bf16_t> want = run<bf16_t>(problem, true);
      CHECK(std::memcmp(got.lse.data(), want.lse.data(), got.lse.size() * sizeof(float)) == 0);
      const auto same = [&](const std::vector<bf16_t>& a, const std::vector<bf16_t>& b) {
        const size_t rows = (a.size() - 2 * size_t(kGuard)) / size_t(head_dim);
        bool same = true;
        for (size_t row = 0; row < rows; row++)
          same &= std::memcmp(&a[size_t(kGuard) + row * size_t(head_dim)], &b[size_t(kGuard) + row * size_t(problem.head_dim)],
                              size_t(head_dim) * sizeof(bf16_t)) == 0;
        return same;
      };
      CHECK(same(got.out, want.out) && same(got.grad_q, want.grad_q));
      CHECK(same(got.grad_k, want.grad_k) && same(got.grad_v, want.grad_v));
    }
}
CASE(windows_softcaps_and_both_directions) {
  compare<bf16_t>({{0, 200, 230}, 230, 2, 2, 64, true, 1});
  compare<bf16_t>({{0, 200, 230}, 230, 2, 2, 64, true, 70});
  compare<bf16_t>({{0, 200, 230}, 230, 1, 1, 64, true, 127});  // a tile's last query does not see the first key of another
  compare<bf16_t>({{0, 150}, 150, 2, 1, 128, true, 64});
  compare<bf16_t>({{0, 200, 230}, 240, 2, 1, 64, false});
  compare<bf16_t>({{0, 70}, 70, 2, 1, 128, false});
  compare<bf16_t>({{0, 100}, 100, 2, 1, 64, true, 0, 5.0, 8});
  compare<bf16_t>({{0, 100}, 100, 2, 1, 256, true, 40, 50.0, 30});
}
// A prompt and branches of every length around that of a tile; a tree in a tree; a document between trees; padding.
const std::vector<int32_t> kSegments = {0, 70, 71, 134, 198, 330, 331, 340, 420, 425, 500};
const std::vector<int32_t> kParents = {-1, 0, 0, 2, 2, 0, -1, 6, 7, -1};

// A prompt of 150 tokens with branches of several tiles, of one, and of a tile and a token, and a branch of a branch; one that is as long as
// a turn; a short one.
const std::vector<int32_t> kLongSegments = {0, 150, 280, 350, 415, 435, 563, 663, 703, 793};
const std::vector<int32_t> kLongParents = {-1, 0, 1, 0, 0, -1, 5, -1, 7};

// The kernels for long documents, with documents that begin at 65 tokens, beside short ones. 264 tokens are three turns of keys, so
// that the ring of two comes around, and more than one item of work.
CASE(long_documents) {
  const auto compare_long = [](Problem problem, auto type) {
    problem.long_from = 64;
    compare<decltype(type)>(problem);
  };
  for (int32_t head_dim : {64, 128, 256, 40, 96, 192}) {
    compare_long({{0, 20, 85, 86, 350, 390}, 395, 1, 1, head_dim}, bf16_t{});
    compare_long({{0, 150, 160}, 160, 2, 1, head_dim, true, 66, 5.0, 8},
                 bf16_t{});                                                    // a window whose last query is alone in its turn
    compare_long({{0, 130}, 130, 1, 1, head_dim, false, 0, 0, 60}, half_t{});  // weights on one key
    compare_long({{0, 129}, 129, 3, 3, head_dim, true, 128}, half_t{});        // of every token but one
    if (head_dim <= 128) compare_long({{0, 20, 350}, 350, 1, 1, head_dim, true, 100}, bf16_t{});  // keys that a window has left
    if (head_dim <= 64) compare_long({{0, 150, 300}, 300, 1, 1, head_dim, false}, bf16_t{});      // three tiles, in turns of two
    Problem forest{{0, 70, 71, 134, 207}, 210, 1, 1, head_dim};
    forest.parents = {-1, 0, 0, -1};
    compare_long(forest, bf16_t{});
    if (!emulator::is_long) continue;
    compare_long({{0, 20, 85, 86, 480, 540}, 550, 2, 1, head_dim}, bf16_t{});
    compare_long({{0, 130, 330}, 330, 1, 1, head_dim, false}, half_t{});
    forest = {kSegments, 510, 2, 1, head_dim};
    forest.parents = kParents;
    forest.window = 90;
    compare_long(forest, bf16_t{});
  }
  const int32_t most = 0x7fffffff;
  for (const std::vector<int32_t>& cu_seqlens :
       std::vector<std::vector<int32_t>>{{5, 70}, {0, 500}, {-7, 50, 3, 60}, {60, 0, 70}, {0, most}, {0, 65, 0, 66, 1, 70}}) {
    Problem problem{cu_seqlens, 70, 1, 1, 64};
    problem.long_from = 64;
    run<bf16_t>(problem, true);
    problem.head_dim = 128;
    run<bf16_t>(problem, true);
  }
}
// A document's gradients do not say which kernels made them, where both add in the same order.
CASE(long_documents_have_the_bits_of_short_ones) {
  for (Problem problem : {Problem{{0, 20, 150}, 150, 2, 1, 256}, Problem{{0, 20, 150}, 150, 2, 1, 184},
                          Problem{{0, 130}, 130, 1, 1, 256, true, 66, 5.0, 8}}) {
    problem.long_from = 64;
    const Results<bf16_t> got = run<bf16_t>(problem, true);
    problem.long_backward_from = kNeverLong;
    const Results<bf16_t> want = run<bf16_t>(problem, true);
    const auto same = [](const auto& a, const auto& b) { return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0; };
    CHECK(same(got.grad_q, want.grad_q) && same(got.grad_k, want.grad_k) && same(got.grad_v, want.grad_v));
  }
}
// Zeros stand where keys are missing, whose score of 0 would be far beyond those of a document whose lse is -200.
CASE(keys_past_the_end_of_a_long_document_have_no_weight) {
  for (int32_t head_dim : {64, 96, 128, 192, 256})
    for (bool causal : {false, true}) {
      Problem problem{{0, 130, 150}, 150, 2, 1, head_dim, causal};
      problem.long_from = 64, problem.repulsion = std::sqrt(104 / std::sqrt(double(head_dim)));
      compare<bf16_t>(problem);
    }
}
CASE(weights_on_one_key) {
  compare<bf16_t>({{0, 150}, 150, 2, 1, 64, true, 0, 0, 60});
  compare<half_t>({{0, 150}, 150, 2, 1, 128, true, 0, 0, 60});
}
CASE(padding_alone) {
  compare<bf16_t>({{0}, 70, 2, 1, 64});
  compare<half_t>({{0, 0, 0}, 1, 2, 1, 128});
  compare<bf16_t>({{0, 0}, 0, 2, 1, 64});
}
// A query's weight lies on the keys of its own feature. From scores of 2^16 on gradients are NaN; from 2^31 on, rounding alone would
// overflow an exponent of the forward.
CASE(scores_beyond_the_exponents_of_fp32) {
  for (int32_t head_dim : {64, 128, 256})
    for (int32_t long_from : {0, 64})
      for (double size : {0x1.6ap8, 0x1.6ap10, 0x1.6ap15, 0x1.6ap30}) {
        Problem problem{{0, 130}, 130, 1, 1, head_dim};
        problem.long_from = long_from, problem.key_size = size;
        compare<bf16_t>(problem);
        if (long_from == 0) continue;
        problem.cu_seqlens = {0, 130, 200}, problem.parents = {-1, 0}, problem.tokens = 200;  // a branch that goes on from them
        compare<bf16_t>(problem);
      }
}
CASE(more_documents_than_threads_that_place_them) {
  Problem problem{{0}, 0, 1, 1, 64};
  problem.wide = true;
  for (int i = 1; i <= 1050; i++) problem.cu_seqlens.push_back(problem.cu_seqlens.back() + (i % 15 ? 0 : i % 4));
  problem.tokens = problem.cu_seqlens.back() + 3;
  compare<bf16_t>(problem);
}
CASE(branches_of_a_shared_prefix) {
  for (int32_t head_dim : {64, 128, 256}) {
    Problem problem{kSegments, 510, 2, 1, head_dim};
    problem.parents = kParents;
    compare<bf16_t>(problem);
    if (head_dim == 64) compare<half_t>(problem);
    problem.window = 90;
    compare<bf16_t>(problem);
    problem.window = 2;  // of a branch's first token: the last of its parent
    if (head_dim == 64) compare<bf16_t>(problem);
    problem.window = 0, problem.softcap = 5, problem.size = 8;
    compare<bf16_t>(problem);
  }
  Problem problem{kSegments, 510, 2, 1, 40, true, 90};  // not all of a tile's columns
  problem.parents = kParents;
  compare<bf16_t>(problem);
}
// The kernels for long documents with a prefix that is long by itself, and with branches that are long by it.
CASE(branches_of_a_long_prefix) {
  for (int32_t head_dim : {64, 128, 256, 96}) {
    Problem problem{kLongSegments, 800, 2, 1, head_dim};
    problem.parents = kLongParents, problem.long_from = 64;
    compare<bf16_t>(problem);
    problem.long_from = 192;  // the prefix is not, some branches are
    if (head_dim == 64) compare<half_t>(problem);
    problem.long_from = 64, problem.softcap = 5, problem.size = 8;
    if (head_dim == 128 || emulator::is_long) compare<half_t>(problem);
    problem.window = 140;
    if (head_dim == 64 || emulator::is_long) compare<bf16_t>(problem);
  }
  // A tile of queries begins in a branch that is shorter than documents that are not long: more of these than there are blocks to draw.
  Problem problem{{0, 300, 370, 390, 490, 590, 690}, 695, 1, 1, 128};
  problem.parents = {-1, 0, 0, -1, -1, -1}, problem.long_from = 128;
  compare<bf16_t>(problem);
}
// Slices of the queries that see a short prefix: more heads of a group, fewer queries. With long_from there are trees with a long root before
// and behind it.
CASE(branches_of_a_short_prefix_that_many_see) {
  const auto trees = [](int keys, int queries, int32_t group, int32_t kv_heads, int32_t head_dim, int32_t long_from) {
    Problem problem{{0}, 0, group * kv_heads, kv_heads, head_dim};
    problem.long_from = long_from;
    const auto add = [&](int length, int32_t parent) {
      problem.cu_seqlens.push_back(problem.cu_seqlens.back() + length), problem.parents.push_back(parent);
      return int32_t(problem.parents.size()) - 1;
    };
    if (long_from) add(20, add(long_from + 6, -1));
    const int32_t end = problem.cu_seqlens.back() + queries, root = add(keys, -1);
    for (int32_t i = 0, before = root; problem.cu_seqlens.back() < end; i++)  // some continue the branch before
      before =
          add(std::min(std::array{100, 64, 0, 190}[size_t(i % 4)], end - problem.cu_seqlens.back()), i % 4 == 1 ? before : root);
    if (long_from) add(33, add(long_from + 6, -1));
    problem.tokens = problem.cu_seqlens.back() + 5;
    return problem;
  };
  for (int keys : {60, 33}) compare<bf16_t>(trees(keys, 270, 16, 2, 64, 64));  // two slices each, whose blocks come in any order
  compare<half_t>(trees(60, 135, 32, 1, 256, 0));
  Problem problem = trees(60, 135, 32, 1, 96, 64);
  if (emulator::is_long) {
    compare<half_t>(trees(60, 200, 32, 1, 256, 0));  // three
    compare<bf16_t>(problem);
    problem.long_from = 32;  // the root with many queries, too
    compare<bf16_t>(problem);
    problem.long_from = 64, problem.window = 40;
    compare<bf16_t>(problem);
    problem = trees(130, 560, 8, 1, 128, 192);  // of three tiles of keys
    problem.softcap = 5, problem.size = 8;
    compare<half_t>(problem);
  }
}
CASE(no_queries) {  // keys and values have gradients, of zeros
  for (int32_t head_dim : {64, 256}) {
    Problem problem{{0, 20, 150}, 160, 0, 2, head_dim};
    problem.long_from = 64;
    compare<bf16_t>(problem);
    problem.parents = {-1, 0};
    compare<bf16_t>(problem);
  }
}
CASE(nan_in_a_branch_stays_in_its_documents) {
  const auto nan_stays = [](Problem problem, const std::vector<int>& bad_segments) {
    const std::vector<int32_t>&parents = problem.parents, &begins = problem.cu_seqlens;
    const Results<bf16_t> want = run<bf16_t>(problem, true);
    for (int bad : bad_segments) {
      problem.bad_segment = bad;
      const Results<bf16_t> got = run<bf16_t>(problem, true);
      const auto continues = [&](int segment, int other) {
        while (segment > other) segment = parents[size_t(segment)];
        return segment == other;
      };
      const auto same = [&](const auto& a, const auto& b, int segment) {
        const size_t begin = size_t(kGuard + begins[size_t(segment)] * problem.head_dim);
        return std::memcmp(&a[begin], &b[begin], size_t(begins[size_t(segment) + 1] * problem.head_dim + kGuard) - begin) == 0;
      };
      for (int segment = 0; segment < int(parents.size()); segment++) {
        const bool sees = continues(segment, bad), is_seen = continues(bad, segment);
        if (!sees) CHECK(same(got.out, want.out, segment) && same(got.grad_q, want.grad_q, segment));
        if (!sees && !is_seen) CHECK(same(got.grad_k, want.grad_k, segment) && same(got.grad_v, want.grad_v, segment));
        if (segment == bad) CHECK(std::isnan(to_float(got.out[size_t(kGuard + begins[size_t(bad)] * problem.head_dim)])));
      }
    }
  };
  for (int64_t window : {0, 90})
    for (int32_t head_dim : {64, 256}) {
      Problem problem{kSegments, 510, 1, 1, head_dim, true, window};
      problem.parents = kParents;
      nan_stays(problem, head_dim == 64 ? std::vector<int>{0, 1, 2, 4, 7} : std::vector<int>{3});
    }
  for (int32_t head_dim : {64, 96, 128, 256}) {
    Problem problem{kLongSegments, 800, 1, 1, head_dim};
    problem.parents = kLongParents, problem.long_from = 64;
    nan_stays(problem, head_dim == 64 ? std::vector<int>{0, 1, 3, 5} : std::vector<int>{1, head_dim == 96 ? 3 : 4});
  }
}
// A branch does not know its siblings: its results have the same bits whatever they are, and wherever the tree lies.
CASE(a_branch_has_the_bits_that_it_has_alone) {
  for (int32_t head_dim : {64, 128, 256}) {
    const auto run_of = [&](std::vector<int32_t> cu_seqlens, std::vector<int32_t> parents) {
      Problem problem{std::move(cu_seqlens), 0, 1, 1, head_dim};
      problem.tokens = 700;
      problem.parents = std::move(parents), problem.long_from = 64;
      return run<bf16_t>(problem, true);
    };
    const Results<bf16_t> want = run_of({0, 150, 280}, {-1, 0}), got = run_of({0, 150, 280, 301, 500}, {-1, 0, 0, 0});
    const auto same = [&](const auto& a, const auto& b, int64_t row) {
      return std::memcmp(&a[size_t(kGuard)], &b[size_t(kGuard)], size_t(280 * row) * sizeof a[0]) == 0;
    };
    CHECK(same(got.out, want.out, head_dim) && same(got.lse, want.lse, 1) && same(got.grad_q, want.grad_q, head_dim));
  }
}
CASE(a_thousand_branches_of_three_tokens) {
  Problem problem{{0, 40}, 0, 1, 1, 64};
  problem.parents = {-1};
  for (int i = 0; i < 300; i++) problem.cu_seqlens.push_back(problem.cu_seqlens.back() + i % 4), problem.parents.push_back(0);
  problem.tokens = problem.cu_seqlens.back();
  compare<bf16_t>(problem);
}
CASE(without_sharing_the_bits_are_those_of_documents) {
  for (int32_t head_dim : {64, 128, 256})
    for (int32_t long_from : {0, 64}) {
      Problem flat{{0, 1, 71, 71, 199, 200}, 203, 4, 1, head_dim};
      flat.long_from = long_from;
      const Results<bf16_t> want = run<bf16_t>(flat, true);
      flat.parents.assign(5, -1);
      const Results<bf16_t> got = run<bf16_t>(flat, true);
      const auto same = [](const auto& a, const auto& b) { return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0; };
      CHECK(same(got.out, want.out) && same(got.lse, want.lse));
      CHECK(same(got.grad_q, want.grad_q) && same(got.grad_k, want.grad_k) && same(got.grad_v, want.grad_v));
    }
}
// Nor does a block wait for a part of grad_q that never comes.
CASE(malformed_parents_write_nothing_outside) {
  for (const std::vector<int32_t>& parents : std::vector<std::vector<int32_t>>{
           {5, 5, 5, 5}, {0, 1, 2, 3}, {-9, 0x7fffffff, -1, 0}, {3, 2, 1, 0}, {-1, -1, 0, 1}, {-1, 3, -1, 1}})
    for (const std::vector<int32_t>& cu_seqlens : std::vector<std::vector<int32_t>>{{0, 30, 20, 70, 90}, {0, 150, 290, 360, 500}})
      for (int32_t head_dim : {64, 128}) {
        Problem problem{cu_seqlens, cu_seqlens.back() - 10, 1, 1, head_dim};
        problem.parents = parents, problem.long_from = 64;
        run<bf16_t>(problem, true);
      }
}
CASE(malformed_boundaries_write_nothing_outside) {
  // The guards see it here, AddressSanitizer if this is built with it also reads. What comes out is unspecified. Nor does a block wait for
  // a part of grad_q that never comes.
  const int32_t least = -0x7fffffff - 1, most = 0x7fffffff;
  bool wide = false;
  for (const int32_t long_from : {0, 64}) {
    const auto survives = [&](std::vector<int32_t> cu_seqlens, int64_t tokens, int32_t head_dim = 64, bool causal = true,
                              int64_t window = 0) {
      Problem problem{std::move(cu_seqlens), tokens, 1, 1, head_dim, causal, window, 0, 1, wide = !wide};
      problem.long_from = long_from;
      run<bf16_t>(problem, true);
      run<half_t>(problem, true);
    };
    for (const std::vector<int32_t>& cu_seqlens : std::vector<std::vector<int32_t>>{
             {5, 70}, {0, 500}, {-7, 50, 3, 60}, {60, 0, 70}, {0, -3}, {most, least}, {least, most}, {0, 65, 0, 66, 1, 70}})
      survives(cu_seqlens, 70);
    // More tiles than there is room for, the shorter document's among them.
    survives({0, 129, 0, 129, 0, 129, 0, 129, 0, 129, 0, 129, 0, 129, 130, 196}, 200);
    for (int32_t head_dim : {128, 256}) survives({-7, 50, 3, 500}, 70, head_dim, true, 20);
    survives({-7, 50, 3, 500}, 70, 64, false);
  }
}

namespace {

// The tiles of a pack, as the kernel makes them. head_dim and heads do not matter.
std::vector<AttentionTile> tiles_of(const std::vector<int32_t>& cu_seqlens, int64_t tokens) {
  const size_t size = size_t(tokens * 64);
  std::vector<bf16_t> x(size), out(size);
  std::vector<float> lse(static_cast<size_t>(tokens));
  AttentionParams p;
  p.q = p.k = p.v = {x.data(), 64, 64};
  p.tokens = tokens, p.window = 1;
  p.axis.cu_seqlens = cu_seqlens.data(), p.axis.documents = int64_t(cu_seqlens.size()) - 1;
  p.out = out.data(), p.lse = lse.data();
  std::vector<AttentionTile> tiles(size_t(attention_tiles(p.tokens, p.axis.documents)),
                                   AttentionTile{0, 1, 0, 1});  // none of them
  unsigned drawn;
  p.tiles = tiles.data(), p.drawn = &drawn;
  CHECK_EQ(attention_cuda(p, nullptr), cudaSuccess);
  return tiles;
}

}  // namespace

CASE(tiles_hold_every_token_once_and_long_documents_come_first) {
  const std::vector<int32_t> cu_seqlens = {0, 1, 1, 65, 365, 430, 430, 431, 560};
  const int32_t tokens = 700;
  std::vector<int> seen(size_t(tokens), 0);
  int32_t length = tokens;
  bool is_rest = false;  // padding, and after it nothing
  for (const AttentionTile& tile : tiles_of(cu_seqlens, tokens)) {
    CHECK(0 <= tile.begin && tile.begin <= tile.end && tile.end <= tokens && tile.end - tile.begin <= kAttentionRows);
    for (int32_t t = tile.begin; t < tile.end; t++) seen[size_t(t)]++;
    if (is_rest |= tile.begin >= cu_seqlens.back() || tile.begin == tile.end) {
      CHECK_EQ(tile.document_begin, tile.document_end);
      continue;
    }
    const auto bound = std::upper_bound(cu_seqlens.begin(), cu_seqlens.end(), tile.begin);
    CHECK_EQ(tile.document_begin, *(bound - 1));
    CHECK_EQ(tile.document_end, *bound);
    CHECK((tile.begin - tile.document_begin) % kAttentionRows == 0);
    CHECK_EQ(tile.end, std::min(tile.begin + kAttentionRows, tile.document_end));
    const int32_t whole = (tile.document_end - tile.document_begin + kAttentionRows - 1) / kAttentionRows;
    CHECK(whole <= length);
    length = whole;
  }
  for (int count : seen) CHECK_EQ(count, 1);
}

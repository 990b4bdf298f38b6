// Attention within documents on the CPU against the formulas of attention.h, with a mask of all pairs of tokens, in long double;
// and how attention.cu cuts its work.
#include "attention.h"

#include <algorithm>
#include <bit>
#include <type_traits>

#include "attention_launch.h"
#include "check.h"
#include "common/convert.h"
#include "packed_forest.h"

using namespace packops;

namespace {

using Exact = long double;

double to_double(double x) { return x; }
template <typename T>
double to_double(T x) {
  return to_float(x);
}
template <typename T>
T from_double(double x) {
  if constexpr (std::is_same_v<T, double>) return x;
  else return from_float<T>(float(x));
}
template <typename T>
constexpr DType kDType = std::is_same_v<T, double>   ? DType::f64
                         : std::is_same_v<T, float>  ? DType::f32
                         : std::is_same_v<T, half_t> ? DType::f16
                                                     : DType::bf16;

enum class Layout {
  fused,
  heads_first
};  // slices of one matrix; tensors of (heads, tokens, head_dim), with a gap after each row

struct Problem {
  std::vector<int64_t> cu_seqlens;
  int64_t tokens;
  int32_t heads = 4, kv_heads = 2, dim = 5;
  bool causal = true;
  int64_t window = 0;
  double softcap = 0, scale = 0.4;
  double size = 1;  // of queries
  Layout layout = Layout::fused;
  std::vector<int64_t> parents = {};  // shared prefixes: what segments, which are then the documents above, continue

  int64_t documents() const { return int64_t(cu_seqlens.size()) - 1; }
  int64_t units() const { return (documents() + 1) * kv_heads; }
  int64_t document(int64_t token) const {  // -1: padding
    for (int64_t d = 0; d < documents(); d++)
      if (cu_seqlens[size_t(d)] <= token && token < cu_seqlens[size_t(d) + 1]) return d;
    return -1;
  }
  // How many tokens before the query the key stands on its path; -1 if it does not.
  int64_t distance(int64_t query, int64_t key) const {
    int64_t s = document(query), before = query - (s < 0 ? 0 : cu_seqlens[size_t(s)]);
    while (s >= 0 && s != document(key)) {
      s = parents[size_t(s)];
      if (s >= 0) before += cu_seqlens[size_t(s) + 1] - cu_seqlens[size_t(s)];
    }
    return s < 0 || key > query ? -1 : before - (key - cu_seqlens[size_t(s)]);
  }
  bool sees(int64_t query, int64_t key) const {
    if (!parents.empty()) {
      const int64_t away = distance(query, key);
      return away >= 0 && (window == 0 || away < window);
    }
    return document(query) >= 0 && document(query) == document(key) && (!causal || key <= query) &&
           (window == 0 || query - key < window);
  }
};

// The tensors of a problem. Whatever nobody may read is NaN, and outputs hold a sentinel until they are written.
template <typename T, typename Index = int32_t>
struct Run {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr double kSentinel = 77;

  const Problem problem;
  std::vector<Index> cu_seqlens;
  std::vector<T> q, k, v, grad_out;  // the buffers behind them; of Layout::fused, q's is all three's
  std::vector<T> out, grad_q, grad_k, grad_v;
  std::vector<Real> lse;
  AttentionParams p;
  std::vector<int32_t> forest;  // what p.prefixes point to

  explicit Run(const Problem& problem) : problem(problem), cu_seqlens(problem.cu_seqlens.begin(), problem.cu_seqlens.end()) {
    const int64_t tokens = problem.tokens, heads = problem.heads, kv_heads = problem.kv_heads, dim = problem.dim;
    const auto tensor = [&](std::vector<T>& buffer, int64_t heads) {
      const bool fused = problem.layout == Layout::fused;
      buffer.assign(size_t(tokens * heads * (dim + 1)), from_double<T>(NAN));
      return fused ? Heads{buffer.data(), heads * (dim + 1), dim + 1} : Heads{buffer.data(), dim + 1, tokens * (dim + 1)};
    };
    if (problem.layout == Layout::fused) {
      const Heads all = tensor(q, heads + 2 * kv_heads);
      const auto slice = [&](int64_t head) { return Heads{q.data() + head * all.head, all.token, all.head}; };
      p.q = slice(0), p.k = slice(heads), p.v = slice(heads + kv_heads);
    } else {
      p.q = tensor(q, heads), p.k = tensor(k, kv_heads), p.v = tensor(v, kv_heads);
    }
    p.grad_out = tensor(grad_out, heads);
    check::Random random{uint64_t(tokens + dim)};
    const auto draw = [&](const Heads& to, int64_t heads, double size) {
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
          for (int64_t i = 0; i < dim; i++)
            if (problem.document(t) >= 0) const_cast<T&>(at(to, t, h, i)) = from_double<T>(size * random.normal());
    };
    draw(p.q, heads, problem.size), draw(p.k, kv_heads, 1), draw(p.v, kv_heads, 1), draw(p.grad_out, heads, 1);
    out.assign(size_t(tokens * heads * dim), from_double<T>(kSentinel)), grad_q = out;
    grad_k.assign(size_t(tokens * kv_heads * dim), from_double<T>(kSentinel)), grad_v = grad_k;
    lse.assign(size_t(2 * tokens * heads), Real(kSentinel));
    p.tokens = tokens, p.heads = problem.heads, p.kv_heads = problem.kv_heads, p.head_dim = problem.dim, p.dtype = kDType<T>;
    p.causal = problem.causal, p.window = problem.window, p.scale = problem.scale, p.softcap = problem.softcap;
    p.axis.cu_seqlens = cu_seqlens.data(), p.axis.documents = problem.documents();
    p.axis.index_dtype = sizeof(Index) == 4 ? DType::i32 : DType::i64;
    if (!problem.parents.empty()) share_prefixes();
    p.out = out.data(), p.lse = lse.data();
    p.grad_q = grad_q.data(), p.grad_k = grad_k.data(), p.grad_v = grad_v.data();
  }
  Run(const Run&) = delete;

  void share_prefixes() {
    const int64_t segments = problem.documents(), tokens = problem.tokens;
    forest.resize(size_t(forest_numbers(segments, tokens)));
    PackedForestParams f;
    f.axis = p.axis, f.tokens = tokens;
    f.parents = problem.parents.data(), f.parent_dtype = DType::i64;
    CHECK_EQ(first_malformed_parent(f), -1);
    set_forest_numbers(f, forest.data());
    packed_forest_cpu(f);
    p.prefixes = {f.segments, f.subtree_ends, f.trees, f.positions, f.ends};
  }

  static const T& at(const Heads& x, int64_t t, int64_t h, int64_t i) {
    return static_cast<const T*>(x.data)[t * x.token + h * x.head + i];
  }
  void forward() { attention_cpu(p, 0, problem.units()); }
  void backward() { attention_backward_cpu(p, 0, problem.units()); }

  // ---- The formulas

  static Exact dot(const Heads& a, int64_t ta, int64_t ha, const Heads& b, int64_t tb, int64_t hb, int64_t dim) {
    Exact sum = 0;
    for (int64_t i = 0; i < dim; i++) sum += Exact(to_double(at(a, ta, ha, i))) * Exact(to_double(at(b, tb, hb, i)));
    return sum;
  }
  int64_t kv_head(int64_t head) const { return head / (problem.heads / problem.kv_heads); }
  // Of a query and every token: weights, 0 where it does not see; lse to base 2; and d score / d (q k).
  struct Row {
    std::vector<Exact> weights, slopes;
    Exact lse;
  };
  Row row(int64_t head, int64_t query) const {
    Row r{std::vector<Exact>(size_t(problem.tokens)), std::vector<Exact>(size_t(problem.tokens)), -INFINITY};
    std::vector<Exact> scores(size_t(problem.tokens), -INFINITY);
    Exact most = -INFINITY, sum = 0;
    for (int64_t key = 0; key < problem.tokens; key++) {
      if (!problem.sees(query, key)) continue;
      const Exact score = Exact(problem.scale) * dot(p.q, query, head, p.k, key, kv_head(head), problem.dim);
      const Exact cap = problem.softcap, tanh = cap > 0 ? std::tanh(score / cap) : 0;
      scores[size_t(key)] = cap > 0 ? cap * tanh : score;
      r.slopes[size_t(key)] = Exact(problem.scale) * (1 - tanh * tanh);
      most = std::max(most, scores[size_t(key)]);
    }
    if (most == -INFINITY) return r;
    for (Exact score : scores) sum += std::exp(score - most);
    for (size_t key = 0; key < scores.size(); key++) r.weights[key] = std::exp(scores[key] - most) / sum;
    r.lse = most / std::log(2.0L) + std::log2(sum);
    return r;
  }
  std::vector<Exact> exact_out() const {
    std::vector<Exact> result(out.size(), 0);
    for (int64_t t = 0; t < problem.tokens; t++)
      for (int64_t h = 0; h < problem.heads; h++) {
        const Row r = row(h, t);
        for (int64_t key = 0; key < problem.tokens; key++)
          for (int64_t i = 0; i < problem.dim; i++)
            if (problem.sees(t, key))
              result[size_t((t * problem.heads + h) * problem.dim + i)] +=
                  r.weights[size_t(key)] * Exact(to_double(at(p.v, key, kv_head(h), i)));
      }
    return result;
  }
  struct Gradients {
    std::vector<Exact> q, k, v;
  };
  Gradients exact_gradients() const {  // with delta of the `out` that is there, rounded as it is
    const int64_t heads = problem.heads, kv_heads = problem.kv_heads, dim = problem.dim;
    Gradients grads{std::vector<Exact>(grad_q.size()), std::vector<Exact>(grad_k.size()), std::vector<Exact>(grad_v.size())};
    const Heads own_out{out.data(), heads * dim, dim};
    for (int64_t t = 0; t < problem.tokens; t++)
      for (int64_t h = 0; h < heads; h++) {
        const Row r = row(h, t);
        for (int64_t key = 0; key < problem.tokens; key++) {
          if (!problem.sees(t, key)) continue;
          const Exact weight = r.weights[size_t(key)];
          const Exact change = dot(p.grad_out, t, h, p.v, key, kv_head(h), dim) - dot(p.grad_out, t, h, own_out, t, h, dim);
          const Exact g = weight * change * r.slopes[size_t(key)];
          for (int64_t i = 0; i < dim; i++) {
            const size_t of_q = size_t((t * heads + h) * dim + i), of_k = size_t((key * kv_heads + kv_head(h)) * dim + i);
            grads.v[of_k] += weight * Exact(to_double(at(p.grad_out, t, h, i)));
            grads.k[of_k] += g * Exact(to_double(at(p.q, t, h, i)));
            grads.q[of_q] += g * Exact(to_double(at(p.k, key, kv_head(h), i)));
          }
        }
      }
    return grads;
  }

  // ---- Checks

  // unit: of rounding to T, `sums`: of the sums behind it, a part of the largest. Padding is 0 exactly.
  void check_close(const char* name, const std::vector<T>& got, const std::vector<Exact>& want, int64_t heads,
                   double sums) const {
    const double unit = std::is_same_v<T, bf16_t> ? 0x1p-8 : std::is_same_v<T, half_t> ? 0x1p-11 : 0;
    Exact largest = 0, worst = 0;
    for (Exact x : want) largest = std::max(largest, std::abs(x));
    bool is_padding_zero = true, finite = true;
    for (size_t i = 0; i < want.size(); i++) {
      const Exact x = to_double(got[i]);
      if (problem.document(int64_t(i) / (heads * problem.dim)) < 0) is_padding_zero &= x == 0;
      finite &= bool(std::isfinite(x));
      worst = std::max(worst, std::abs(x - want[i]) - Exact(unit) * std::abs(want[i]));
    }
    if (finite && is_padding_zero && worst <= Exact(sums) * largest) return;
    std::printf("%s, %d/%d heads, %lld tokens, dtype %d: off by %Lg of %Lg%s%s\n", name, problem.heads, problem.kv_heads,
                (long long)problem.tokens, int(kDType<T>), worst, largest, is_padding_zero ? "" : ", padding is not 0",
                finite ? "" : ", not finite");
    CHECK(false);
  }
  void check(double sums) {
    forward();
    check_close("out", out, exact_out(), problem.heads, sums);
    for (int64_t h = 0; h < problem.heads; h++)
      for (int64_t t = 0; t < problem.tokens; t++) CHECK_CLOSE(lse[size_t(h * problem.tokens + t)], double(row(h, t).lse), sums);
    backward();
    const Gradients want = exact_gradients();
    check_close("grad_q", grad_q, want.q, problem.heads, sums);
    check_close("grad_k", grad_k, want.k, problem.kv_heads, sums);
    check_close("grad_v", grad_v, want.v, problem.kv_heads, sums);
  }
};

void check_all(const Problem& problem) {
  Run<double>(problem).check(1e-13);
  Run<float>(problem).check(3e-6);
  Run<bf16_t>(problem).check(3e-6);
  Run<half_t>(problem).check(3e-6);
}

// One token, none, several; padding of 4.
const std::vector<int64_t> kBounds = {0, 1, 8, 8, 21, 22};
constexpr int64_t kTokens = 26;

}  // namespace

CASE(formulas_of_every_rule) {
  for (int64_t window : {0, 1, 2, 5, 100})
    for (double softcap : {0.0, 1.5}) {
      Problem problem{kBounds, kTokens};
      problem.window = window, problem.softcap = softcap;
      check_all(problem);
    }
  for (double softcap : {0.0, 1.5}) {
    Problem problem{kBounds, kTokens};
    problem.causal = false, problem.softcap = softcap;
    check_all(problem);
  }
}
CASE(formulas_of_every_group) {
  for (auto [heads, kv_heads] : {std::pair{1, 1}, {3, 3}, {6, 2}, {6, 3}, {5, 1}})
    check_all({.cu_seqlens = kBounds, .tokens = kTokens, .heads = heads, .kv_heads = kv_heads});
}
CASE(formulas_whatever_the_strides) {
  for (bool causal : {false, true})
    check_all({.cu_seqlens = kBounds, .tokens = kTokens, .dim = 8, .causal = causal, .layout = Layout::heads_first});
}
CASE(boundaries_of_either_width) {
  const Problem problem{kBounds, kTokens};
  Run<float, int32_t> narrow(problem);
  Run<float, int64_t> wide(problem);
  narrow.check(3e-6), wide.check(3e-6);
  CHECK(narrow.out == wide.out && narrow.lse == wide.lse);
  CHECK(narrow.grad_q == wide.grad_q && narrow.grad_k == wide.grad_k && narrow.grad_v == wide.grad_v);
}
CASE(formulas_of_shared_prefixes) {
  // Two trees, one of depth 3 with an empty segment; siblings, a segment alone, padding.
  const std::vector<int64_t> bounds = {0, 3, 5, 5, 8, 9, 12, 13, 15, 18}, parents = {-1, 0, 0, 0, 3, 3, 0, -1, 7};
  for (int64_t window : {0, 1, 2, 5, 100})
    for (double softcap : {0.0, 1.5}) {
      Problem problem{bounds, 20};
      problem.window = window, problem.softcap = softcap, problem.parents = parents;
      check_all(problem);
    }
}
CASE(documents_that_are_all_or_nothing) {
  check_all({.cu_seqlens = {0, 9}, .tokens = 9});
  check_all({.cu_seqlens = {0, 0, 9, 9}, .tokens = 9});
  check_all({.cu_seqlens = {0}, .tokens = 3});  // padding alone
  check_all({.cu_seqlens = {0, 0}, .tokens = 3});
  check_all({.cu_seqlens = {0, 0}, .tokens = 0});
}
CASE(scores_that_exp_cannot_take) {
  // Of some thousands, for scales of either sign and none; their rounding is as much larger.
  for (double scale : {0.4, -0.4, 0.0})
    Run<double>({.cu_seqlens = {0, 20}, .tokens = 22, .scale = scale, .size = 3000}).check(1e-9);
  Run<float>({.cu_seqlens = {0, 20}, .tokens = 22, .size = 100}).check(3e-4);
}

CASE(gradients_are_differences_of_the_result) {
  const Exact step = 1e-6L;
  for (double softcap : {0.0, 1.5})
    for (int64_t window : {0, 3}) {
      Run<double> run({.cu_seqlens = {0, 1, 8, 8}, .tokens = 9, .dim = 3, .window = window, .softcap = softcap});
      run.forward(), run.backward();
      const Problem& problem = run.problem;
      const auto objective = [&] {
        const std::vector<Exact> out = run.exact_out();
        Exact sum = 0;
        for (int64_t t = 0; t < problem.tokens; t++)
          for (int64_t h = 0; h < problem.heads; h++)
            for (int64_t i = 0; i < problem.dim; i++)
              if (problem.document(t) >= 0)
                sum += out[size_t((t * problem.heads + h) * problem.dim + i)] * Exact(run.at(run.p.grad_out, t, h, i));
        return sum;
      };
      const auto check = [&](const Heads& x, int64_t heads, const std::vector<double>& grad) {
        for (int64_t t = 0; t < 8; t++)
          for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < problem.dim; i++) {
              double& value = const_cast<double&>(run.at(x, t, h, i));
              const double kept = value, high = kept + double(step), low = kept - double(step);
              value = high;
              Exact change = objective();
              value = low;
              change -= objective();
              value = kept;
              CHECK_CLOSE(grad[size_t((t * heads + h) * problem.dim + i)], double(change / (Exact(high) - Exact(low))), 1e-9);
            }
      };
      check(run.p.q, problem.heads, run.grad_q);
      check(run.p.k, problem.kv_heads, run.grad_k);
      check(run.p.v, problem.kv_heads, run.grad_v);
    }
}

CASE(units_write_their_own_documents_only) {
  // Every unit alone: what it writes is one document, or the padding, of one group of heads; together they write all, and once.
  const Problem problem{.cu_seqlens = kBounds, .tokens = kTokens, .heads = 6, .kv_heads = 3};
  const int64_t group = problem.heads / problem.kv_heads, dim = problem.dim;
  Run<float> whole(problem), parts(problem);
  whole.forward(), whole.backward();
  parts.out = whole.out, parts.lse = whole.lse;
  std::vector<int> written(size_t(problem.tokens * problem.kv_heads));
  for (int64_t unit = 0; unit < problem.units(); unit++) {
    Run<float> run(problem);
    attention_cpu(run.p, unit, unit + 1);
    std::vector<bool> here(written.size());
    for (size_t i = 0; i < here.size(); i++) {
      const int64_t t = int64_t(i) / problem.kv_heads, kv_head = int64_t(i) % problem.kv_heads;
      here[i] = run.out[size_t((t * problem.heads + kv_head * group) * dim)] != 77;
      written[i] += here[i];
    }
    const size_t first = size_t(std::find(here.begin(), here.end(), true) - here.begin());
    for (size_t i = 0; i < here.size(); i++) {  // as the document and the heads of the first say
      const int64_t t = int64_t(i) / problem.kv_heads, t0 = int64_t(first) / problem.kv_heads;
      CHECK_EQ(here[i], first < here.size() && problem.document(t) == problem.document(t0) &&
                            i % size_t(problem.kv_heads) == first % size_t(problem.kv_heads));
    }
    run.out = whole.out, run.lse = whole.lse;
    run.p.out = run.out.data(), run.p.lse = run.lse.data();
    attention_backward_cpu(run.p, unit, unit + 1);
    CHECK(run.out == whole.out && run.lse == whole.lse);  // read alone
    const auto of_whole_or_untouched = [&](const std::vector<float>& got, const std::vector<float>& all, int64_t heads) {
      for (size_t i = 0; i < got.size(); i++) {
        const int64_t t = int64_t(i) / (heads * dim), head = int64_t(i) / dim % heads;
        const int64_t kv_head = head / (heads / problem.kv_heads);
        CHECK_EQ(got[i], here[size_t(t * problem.kv_heads + kv_head)] ? all[i] : 77.f);
      }
    };
    of_whole_or_untouched(run.grad_q, whole.grad_q, problem.heads);
    of_whole_or_untouched(run.grad_k, whole.grad_k, problem.kv_heads);
    of_whole_or_untouched(run.grad_v, whole.grad_v, problem.kv_heads);
    Run<float> again(problem);
    attention_cpu(again.p, unit, unit + 1);
    of_whole_or_untouched(again.out, whole.out, problem.heads);
    for (size_t i = 0; i < again.lse.size(); i++) {
      const int64_t head = int64_t(i) / problem.tokens % problem.heads, t = int64_t(i) % problem.tokens;
      CHECK_EQ(again.lse[i], here[size_t(t * problem.kv_heads + head / group)] ? whole.lse[i] : 77.f);
    }
  }
  for (int count : written) CHECK_EQ(count, 1);

  Run<float> shared(problem);  // by threads whose shares end anywhere
  for (auto work : {attention_cpu, attention_backward_cpu})
    for (int64_t unit = 0; unit < problem.units(); unit += 4) work(shared.p, unit, std::min(unit + 4, problem.units()));
  CHECK(shared.out == whole.out && shared.lse == whole.lse);
  CHECK(shared.grad_q == whole.grad_q && shared.grad_k == whole.grad_k && shared.grad_v == whole.grad_v);
}

// ---- How attention.cu cuts its work

namespace {

struct Gpu {
  int per_multiprocessor, per_block;  // bytes of shared memory
};
constexpr Gpu kA100 = {164 * 1024, 163 * 1024}, kH100 = {228 * 1024, 227 * 1024};
constexpr Gpu kRtx = {100 * 1024, 99 * 1024};  // sm_86, sm_89, sm_120
constexpr int kOfTheDriver = 1024;             // in every block

// f(shape, its bytes of shared memory, teams) of each kernel.
template <typename F>
void for_each_kernel(int head_dim, bool by_group, const Gpu& gpu, F&& f) {
  f(attention_forward_shape(head_dim, by_group), attention_forward_shared(head_dim, by_group), 1);
  f(attention_queries_shape(head_dim, by_group), attention_queries_shared(head_dim, by_group), 1);
  for (int group = 1; group <= 8; group++) {
    const int teams = attention_teams(head_dim, by_group, group, gpu.per_block);
    f(attention_keys_shape(head_dim, by_group), attention_keys_shared(head_dim, by_group, teams), teams);
  }
}

}  // namespace

CASE(blocks_fit_a_multiprocessor) {
  for (int head_dim : {64, 96, 128, 192, 256})
    for (bool by_group : {false, true})
      for_each_kernel(head_dim, by_group, kH100, [&](const AttentionShape& shape, int bytes, int teams) {
        CHECK(bytes <= kH100.per_block);
        CHECK(shape.per_multiprocessor >= 1);
        CHECK(shape.per_multiprocessor * (bytes + kOfTheDriver) <= kH100.per_multiprocessor);
        if (!by_group) CHECK(bytes <= kA100.per_block);
        CHECK(shape.threads() * teams <= 1024);
        CHECK(shape.per_multiprocessor * shape.threads() * teams <= 2048);
      });
}

CASE(blocks_fit_gpus_of_99_kib) {
  for (int head_dim : {64, 96, 128, 192, 256})
    for_each_kernel(head_dim, false, kRtx, [&](const AttentionShape& shape, int bytes, int teams) {
      if (bytes > kRtx.per_block)
        check::fail(__FILE__, __LINE__,
                    "head_dim " + check::show(head_dim) + ", " + check::show(shape.warps()) + " warps, " + check::show(teams) +
                        " teams: " + check::show(bytes) + " bytes, more than " + check::show(kRtx.per_block));
    });
}

CASE(blocks_for_long_documents_fit_a_hopper) {
  for (int head_dim : {64, 96, 128, 192, 256}) {
    const auto check_registers = [](int groups) {
      const int producer = attention_producer_registers(groups), consumer = attention_consumer_registers(groups);
      CHECK(producer + groups * consumer <= 65536 / (128 * (groups + 1)) / 8 * 8 * (groups + 1));
      CHECK(producer % 8 == 0 && consumer % 8 == 0);
    };
    const AttentionLongForwardShape forward = attention_long_forward_shape(head_dim);
    CHECK(attention_long_forward_shared(head_dim) <= kH100.per_block);
    CHECK(forward.turn % 8 == 0 && forward.turn <= 256 && forward.rows() <= 256);  // of a product, and of a box of a tensor map
    check_registers(forward.groups);
    CHECK(attention_long_keys_shared(head_dim) <= kH100.per_block);
    check_registers(2);
    CHECK(attention_long_turns(head_dim) >= 2);  // products of the next turn begin before the tiles of this one are released
  }
}
CASE(documents_are_long_by_the_keys_that_a_query_sees) {
  CHECK(!attention_is_long(1024, 0, 1024) && attention_is_long(1025, 0, 1024));
  CHECK(!attention_is_long(9000, 1024, 1024) && attention_is_long(9000, 1025, 1024));
  CHECK(!attention_is_long(1000, 4096, 1024) && attention_is_long(1 << 29, int64_t(1) << 40, 1024));
  for (int head_dim : {64, 96, 128, 192, 256}) {  // the list of tiles is sorted by whole tiles
    CHECK_EQ(attention_long_forward_from(head_dim) % kAttentionRows, 0);
    CHECK_EQ(attention_long_keys_from(head_dim) % kAttentionRows, 0);
  }
}
CASE(nothing_is_launched_for_long_documents_where_none_can_be) {
  const DeviceLimits hopper = {90, 132, 228 << 10, 227 << 10, true};
  AttentionParams p;
  p.head_dim = 128, p.tokens = 1 << 20;
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), 768);
  CHECK_EQ(choose_attention_long_keys_from(p, hopper), 1280);
  DeviceLimits other = hopper;
  other.has_wgmma = false;  // code for another architecture, or another device
  CHECK_EQ(choose_attention_long_forward_from(p, other), kNeverLong);
  CHECK_EQ(choose_attention_long_keys_from(p, other), kNeverLong);
  p.tokens = 1280;  // one document of all of them is long forward only
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), 768);
  CHECK_EQ(choose_attention_long_keys_from(p, hopper), kNeverLong);
  p.tokens = 768;
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), kNeverLong);
  p.tokens = 1 << 20, p.window = 512;
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), kNeverLong);
  p.window = 0, p.head_dim = 64;
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), 2048);
  CHECK_EQ(choose_attention_long_keys_from(p, hopper), 1280);
  p.long_from = 64, p.head_dim = 256;
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), 64);
  CHECK_EQ(choose_attention_long_keys_from(p, hopper), 64);
  const ForestSegment segment = {};
  CHECK(!forwards_branches(p));
  p.prefixes.segments = &segment;
  CHECK(forwards_branches(p));
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), 64);
  CHECK_EQ(choose_attention_long_keys_from(p, hopper), 64);
  p.window = 512;  // along a path
  CHECK(!forwards_branches(p));
  CHECK_EQ(choose_attention_long_forward_from(p, hopper), 64);
  CHECK_EQ(choose_attention_long_keys_from(p, hopper), kNeverLong);
  p.window = 0, p.long_from = kNeverLong;
  CHECK(!forwards_branches(p));
}
// Heads of every multiple of 8 features have the kernels with the fewest columns that hold them.
CASE(heads_that_do_not_fill_a_tile) {
  const DeviceLimits hopper = {90, 132, 228 << 10, 227 << 10, true};
  AttentionParams p;
  p.tokens = 1 << 20;
  for (int head_dim = -8; head_dim <= 272; head_dim++) {
    CHECK_EQ(attention_takes(head_dim), head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0);
    if (!attention_takes(head_dim)) continue;
    const int columns = attention_columns(head_dim);
    int least = 0;
    for (int of : {256, 192, 128, 96, 64})
      if (of >= head_dim) least = of;
    CHECK_EQ(columns, least);
    p.head_dim = head_dim;
    CHECK_EQ(choose_attention_long_forward_from(p, hopper), attention_long_forward_from(columns));
    CHECK_EQ(choose_attention_long_keys_from(p, hopper), attention_long_keys_from(columns));
  }
  CHECK(!attention_takes(int64_t(1) << 32 | 64));
}
CASE(threads_share_rows_evenly) {
  for (int head_dim : {64, 96, 128, 192, 256})
    for (bool by_group : {false, true})
      for_each_kernel(head_dim, by_group, kH100, [&](const AttentionShape& shape, int, int teams) {
        CHECK_EQ(shape.warps() * shape.blocks * 16, kAttentionRows);
        CHECK(!by_group || shape.warps() == 4);
        CHECK(shape.stages == 1 || shape.stages == 2);
        CHECK_EQ(shape.turn % shape.step, 0);
        CHECK(shape.step == shape.turn || !by_group);
        CHECK_EQ(shape.step % 16, 0);
        // A row of head_dim is 16 bytes to a thread; some have none where it is 96 or 192.
        const int chunks = int(std::bit_ceil(unsigned(head_dim / 8)));
        for (int threads : {shape.threads(), shape.threads() * teams}) {
          CHECK_EQ(threads % chunks, 0);
          CHECK_EQ(kAttentionRows % (threads / chunks), 0);
        }
        CHECK_EQ(shape.turn % (shape.threads() / chunks), 0);
      });
}

CASE(slices_of_queries_have_room_and_are_no_documents_own) {
  for (int group : {1, 2, 4, 7, 8, 64})
    for (int keys = 0; keys <= 2300; keys += keys < 200 ? 1 : 37)
      for (int queries = keys; queries <= 20000; queries += 1 + queries / 50) {
        const AttentionSlices slices = attention_slices(keys, queries, group);
        const int tiles = attention_whole_tiles(keys) / kAttentionRows, least = attention_slice(group);
        if (slices.count == 1) {  // less than two whole slices
          CHECK(keys == 0 || queries < 2 * std::max(least, tiles * kAttentionRows));
          CHECK(slices.queries >= queries);
          continue;
        }
        CHECK(slices.queries % kAttentionRows == 0 && slices.queries >= least && slices.queries >= keys);
        CHECK((slices.count - 1) * slices.queries < queries && queries <= slices.count * slices.queries);
        CHECK(slices.count * tiles <= queries / kAttentionRows);
      }
  CHECK_EQ(attention_slices(1280, 1280, 4).count, 1);
  CHECK_EQ(attention_slices(512, 512 + 16 * 512, 4).count, 17);
  CHECK_EQ(attention_slices(512, 513 + 16 * 512, 4).count, 16);  // 17 of 513, in whole tiles
  CHECK_EQ(attention_slices(512, 512 + 16 * 512, 1).count, 4);
  AttentionParams p;
  p.heads = 8, p.kv_heads = 2, p.tokens = 1024;
  CHECK(!may_have_slices(p));
  const ForestSegment segment = {};
  p.prefixes.segments = &segment;
  CHECK(may_have_slices(p));
  p.tokens = 1023;
  CHECK(!may_have_slices(p));
}

CASE(teams_have_heads_and_room) {
  for (int head_dim : {64, 96, 128, 192, 256})
    for (bool by_group : {false, true}) {
      const AttentionShape shape = attention_keys_shape(head_dim, by_group);
      CHECK(shape.turn <= shape.threads());  // a thread loads lse and delta of one query
      int before = 1;
      for (int group = 1; group <= 8; group++) {
        const int teams = attention_teams(head_dim, by_group, group);
        CHECK(teams >= 1 && teams <= group);
        CHECK(teams * shape.warps() <= 8);
        CHECK(teams >= before);
        before = teams;
        if (by_group || attention_keys_split(head_dim)) CHECK_EQ(teams, 1);
        // Fp32 sums of all rows lie where the turns were when teams are added up.
        CHECK(attention_teams(head_dim, by_group, group, kRtx.per_block) <= teams);
        if (teams > 1) CHECK(shape.stages * shape.turn * 2 * 2 * head_dim >= kAttentionRows * head_dim * 4);
      }
      CHECK_EQ(attention_teams(head_dim, by_group, 4), before);  // what the launcher takes for the most
    }
}

CASE(tiles_are_enough_and_hardly_more) {
  const auto tiles_of = [](int64_t tokens) { return (tokens + kAttentionRows - 1) / kAttentionRows; };
  check::Random random{3};
  for (int run = 0; run < 2000; run++) {
    const int64_t documents = random.below(40), longest = int64_t(1) << (1 + random.below(12));
    int64_t tokens = random.below(3) ? random.below(longest) : 0, used = tiles_of(tokens);  // padding
    for (int64_t i = 0; i < documents; i++) {
      // Lengths about a multiple of a tile are the ones that cost most and least.
      const int64_t any = random.below(longest);
      const int64_t length =
          random.below(2) ? any : std::max<int64_t>(0, any / kAttentionRows * kAttentionRows + random.below(3) - 1);
      tokens += length, used += tiles_of(length);
    }
    const int64_t most = attention_tiles(tokens, documents);
    CHECK(used <= most);
    CHECK(most - used <= documents + 1);
  }
  // As many as can be: each document, and the padding, has one token more than whole tiles.
  for (int64_t documents : {0, 1, 5, 62}) CHECK_EQ((documents + 1) * 3, attention_tiles((documents + 1) * 129, documents));
}

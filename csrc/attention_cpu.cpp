// Attention within documents on the CPU: the formulas of attention.h, one row of scores at a time, in fp32 (fp64 for fp64). Plain
// code, because it is the reference for attention.cu. Models on the CPU use torch's attention, whose blocks fit into caches.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"
#include "common/convert.h"
#include "common/real.h"

namespace packops {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// One document, or one tree of them, and one head of keys and values.
template <typename T>
class Unit {
 public:
  using Real = decltype(to_real(T{}));

  Unit(const AttentionParams& p, int64_t unit) : p(p), kv_head(unit % p.kv_heads), dim(p.head_dim) {
    const int64_t document = unit / p.kv_heads;
    const PackedAxis axis = p.prefixes ? PackedAxis{p.prefixes.trees, DType::i32, p.axis.documents} : p.axis;
    begin = document ? boundary(axis, document) : 0;
    is_padding = document == axis.documents;
    length = (is_padding ? p.tokens : boundary(axis, document + 1)) - begin;
  }

  void forward() {
    const std::vector<Real> k = rows(p.k, kv_head), v = rows(p.v, kv_head);
    for_each_query([&](int64_t head, int64_t query, int64_t token) {
      Real* lse = static_cast<Real*>(p.lse) + head * p.tokens + token;
      std::vector<Real> out(dim, 0);
      Real& rest = lse[p.heads * p.tokens];
      *lse = -std::numeric_limits<Real>::infinity(), rest = 0;
      if (!is_padding) {
        make_scores(query, row(p.q, token, head), k);
        const Real most = *std::max_element(scores.begin(), scores.end());
        Real sum = 0;
        for (Real& x : scores) sum += x = std::exp(x - most);
        for (size_t i = 0; i < scores.size(); i++) add(out.data(), scores[i] / sum, &v[seen[i] * dim]);
        *lse = std::fma(most, Real(kLog2e), std::log2(sum));
        rest = std::fma(most, Real(kLog2e), -*lse) + std::log2(sum);
      }
      write(p.out, p.heads, token, head, out.data());
    });
  }

  void backward() {
    const std::vector<Real> k = rows(p.k, kv_head), v = rows(p.v, kv_head);
    std::vector<Real> grad_k(k.size(), 0), grad_v(v.size(), 0);
    for_each_query([&](int64_t head, int64_t query, int64_t token) {
      std::vector<Real> grad_q(dim, 0);
      if (!is_padding) {
        const std::vector<Real> q = row(p.q, token, head), grad = row(p.grad_out, token, head);
        const std::vector<Real> out = row({p.out, p.heads * dim, dim}, token, head);
        const Real* lse = static_cast<const Real*>(p.lse) + head * p.tokens + token;
        const Real rest = lse[p.heads * p.tokens], delta = dot(grad.data(), out.data());
        make_scores(query, q, k);
        for (size_t i = 0; i < scores.size(); i++) {
          const int64_t at = seen[i] * dim;
          const Real weight = std::exp2(std::fma(scores[i], Real(kLog2e), -*lse) - rest),
                     capped = p.softcap > 0 ? scores[i] / Real(p.softcap) : 0;
          const Real g = weight * (dot(grad.data(), &v[at]) - delta) * (1 - capped * capped) * Real(p.scale);
          add(&grad_v[at], weight, grad.data());
          add(&grad_k[at], g, q.data());
          add(grad_q.data(), g, &k[at]);
        }
      }
      write(p.grad_q, p.heads, token, head, grad_q.data());
    });
    for (int64_t i = 0; i < length; i++) {
      write(p.grad_k, p.kv_heads, begin + i, kv_head, &grad_k[i * dim]);
      write(p.grad_v, p.kv_heads, begin + i, kv_head, &grad_v[i * dim]);
    }
  }

 private:
  const AttentionParams& p;
  const int64_t kv_head, dim;
  int64_t begin, length;
  bool is_padding;
  std::vector<int64_t> seen;  // the keys that the query sees
  std::vector<Real> scores;   // of these

  template <typename F>
  void for_each_query(F&& f) {
    const int64_t group = p.heads / p.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t query = 0; query < length; query++) f(head, query, begin + query);
  }
  std::vector<Real> row(const Heads& from, int64_t token, int64_t head) const {
    const T* data = static_cast<const T*>(from.data) + token * from.token + head * from.head;
    std::vector<Real> values(dim);
    for (int64_t i = 0; i < dim; i++) values[i] = to_real(data[i]);
    return values;
  }
  std::vector<Real> rows(const Heads& from, int64_t head) const {
    std::vector<Real> all;
    for (int64_t i = 0; i < length; i++) {
      const std::vector<Real> one = row(from, begin + i, head);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }
  void write(void* to, int64_t heads, int64_t token, int64_t head, const Real* values) const {
    T* data = static_cast<T*>(to) + (token * heads + head) * dim;
    for (int64_t i = 0; i < dim; i++) store(data[i], values[i]);
  }
  Real dot(const Real* a, const Real* b) const {
    Real sum = 0;
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
  }
  void add(Real* to, Real factor, const Real* x) const {
    for (int64_t i = 0; i < dim; i++) to[i] += factor * x[i];
  }
  // Whether the query's path has the key, within the window.
  bool continues(int64_t query, int64_t key) const {
    const int32_t *ends = p.prefixes.ends + begin, *positions = p.prefixes.positions + begin;
    return begin + query < ends[key] && (p.window == 0 || positions[query] - positions[key] < p.window);
  }
  void make_scores(int64_t query, const std::vector<Real>& q, const std::vector<Real>& k) {
    seen.clear();
    scores.clear();
    const int64_t end = p.causal ? query + 1 : length;
    for (int64_t i = p.window && !p.prefixes ? std::max<int64_t>(0, query - p.window + 1) : 0; i < end; i++) {
      if (p.prefixes && !continues(query, i)) continue;
      const Real score = Real(p.scale) * dot(q.data(), &k[i * dim]), cap = Real(p.softcap);
      seen.push_back(i);
      scores.push_back(cap > 0 ? cap * std::tanh(score / cap) : score);
    }
  }
};

}  // namespace

void attention_cpu(const AttentionParams& p, int64_t begin, int64_t end) {
  dispatch_float<true>(p.dtype, [&](auto type) {
    for (int64_t unit = begin; unit < end; unit++) Unit<decltype(type)>(p, unit).forward();
  });
}

void attention_backward_cpu(const AttentionParams& p, int64_t begin, int64_t end) {
  dispatch_float<true>(p.dtype, [&](auto type) {
    for (int64_t unit = begin; unit < end; unit++) Unit<decltype(type)>(p, unit).backward();
  });
}

}  // namespace packops

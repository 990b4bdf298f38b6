// RMS norm + RoPE of the heads of one token; compiled once per instruction set by common/simd_targets.h: no include guard, and no
// includes but this one of the same kind.
#include "rope_row_simd.h"

// Converts a row of T to State, and back.
template <typename T>
static inline void widen_row(const T* x, typename Lane<T>::State* y, int n) {
  using L = Lane<T>;
  int i = 0;
  for (; i + L::kLanes <= n; i += L::kLanes) {
    const auto v = L::read(x + i);
    memcpy(y + i, &v, sizeof v);
  }
  for (; i < n; i++) y[i] = L::read1(x + i);
}
template <typename T>
static inline void narrow_row(const typename Lane<T>::State* x, T* y, int n) {
  using L = Lane<T>;
  int i = 0;
  for (; i + L::kLanes <= n; i += L::kLanes) L::write(y + i, Lane<typename L::State>::read(x + i));
  for (; i < n; i++) L::write1(y + i, x[i]);
}

// Independent partial sums let the compiler use vectors without changing the order of additions.
template <typename S>
static inline S dot_row(const S* a, const S* b, int n) {
  constexpr int kSums = PACKOPS_LANES;
  S sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int j = 0; j < kSums; j++) sums[j] += a[i + j] * b[i + j];
  S total = 0;
  for (int j = 0; j < kSums; j++) total += sums[j];
  for (; i < n; i++) total += a[i] * b[i];
  return total;
}

// Forward computes y from x, backward dx from x and grad. weight: w of what one mean covers; weight_grad: its running sums;
// buffer: room for 2 heads head_dim states.
template <typename T>
static void qk_norm_rope_token(const QkNormRopeParams& p, const RopeHeads& side, const RopeHeads& grad, bool backward,
                               int64_t batch, int64_t token, const typename Lane<T>::State* cos,
                               const typename Lane<T>::State* sin, const typename Lane<T>::State* weight,
                               typename Lane<T>::State* weight_grad, typename Lane<T>::State* buffer) {
  using S = typename Lane<T>::State;
  const RopeParams& rope = p.rope;
  const int dim = rope.head_dim;
  const int64_t domain = p.across_heads ? side.heads : 1;
  const T* x = static_cast<const T*>(side.in) + batch * side.in_batch + token * side.in_token;
  const T* g = backward ? static_cast<const T*>(grad.in) + batch * grad.in_batch + token * grad.in_token : nullptr;
  T* y = static_cast<T*>(side.out) + batch * side.out_batch + token * side.out_token;
  if (!cos) {
    for (int64_t h = 0; h < side.heads; h++)
      memcpy(y + h * side.out_head, backward ? g + h * grad.in_head : x + h * side.in_head, dim * sizeof(T));
    return;
  }
  const int64_t size = domain * dim;
  S *n = buffer, *h = buffer + size;
  for (int64_t first = 0; first < side.heads; first += domain) {
    S squares = 0;
    for (int64_t d = 0; d < domain; d++) {
      widen_row(x + (first + d) * side.in_head, n + d * dim, dim);
      squares += dot_row(n + d * dim, n + d * dim, dim);
    }
    const S r = S(1) / S(sqrt(double(squares / S(size) + S(p.eps))));
    for (int64_t i = 0; i < size; i++) n[i] *= r;
    if (!backward) {
      for (int64_t i = 0; i < size; i++) n[i] *= weight[i];
      for (int64_t d = 0; d < domain; d++) {
        S* row = n + d * dim;
        rope_row<S>(row + rope.rotary_offset, row + rope.rotary_offset, rope.rotary_dim, rope.interleaved, cos, sin);
        narrow_row<T>(row, y + (first + d) * side.out_head, dim);
      }
      continue;
    }
    S products = 0;
    for (int64_t d = 0; d < domain; d++) {
      S* row = h + d * dim;
      widen_row(g + (first + d) * grad.in_head, row, dim);
      rope_row<S>(row + rope.rotary_offset, row + rope.rotary_offset, rope.rotary_dim, rope.interleaved, cos, sin);
      for (int i = 0; i < dim; i++) {
        weight_grad[d * dim + i] += row[i] * n[d * dim + i];
        row[i] *= weight[d * dim + i];
      }
      products += dot_row(row, n + d * dim, dim);
    }
    const S mean = products / S(size);
    for (int64_t i = 0; i < size; i++) h[i] = r * (h[i] - n[i] * mean);
    for (int64_t d = 0; d < domain; d++) narrow_row<T>(h + d * dim, y + (first + d) * side.out_head, dim);
  }
}

static void qk_norm_rope_token_any(const QkNormRopeParams& p, const RopeHeads& side, const RopeHeads& grad, bool backward,
                                   int64_t batch, int64_t token, const void* cos, const void* sin, const void* weight,
                                   void* weight_grad, void* buffer) {
  dispatch_float<true>(p.rope.dtype, [&](auto type) {
    using T = decltype(type);
    using S = typename Lane<T>::State;
    qk_norm_rope_token<T>(p, side, grad, backward, batch, token, static_cast<const S*>(cos), static_cast<const S*>(sin),
                          static_cast<const S*>(weight), static_cast<S*>(weight_grad), static_cast<S*>(buffer));
  });
}

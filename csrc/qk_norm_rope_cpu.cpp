// RMS norm + RoPE on the CPU: the interface of qk_norm_rope.h. qk_norm_rope_simd.h computes the heads of a token, with the best
// instruction set of the machine.
#include "qk_norm_rope.h"

#include <algorithm>
#include <vector>

#include "rope_cpu.h"

#define PACKOPS_SIMD_FILE "qk_norm_rope_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

constexpr int64_t kShares = 64, kMinimumTokens = 16;

template <typename State>
void run(const QkNormRopeParams& p, int64_t first_share, int64_t last_share) {
  const auto rotate = PACKOPS_BEST_ISA(qk_norm_rope_token_any);
  const bool backward = p.backward();
  const RopeParams& rope = p.rope;
  const int64_t tokens = rope.batch * rope.tokens, shares = qk_norm_rope_cpu_shares(p);
  struct Side {
    const RopeHeads &x, &grad;
    const void* weight;
    State* partial;
    std::vector<State> w;
  } sides[2] = {{rope.q, p.q_grad, p.q_weight, static_cast<State*>(p.q_partial), {}},
                {rope.k, p.k_grad, p.k_weight, static_cast<State*>(p.k_partial), {}}};
  int64_t largest = 0;
  for (Side& side : sides) {
    side.w.resize(side.weight ? qk_norm_weight_size(p, side.x) : 0);
    for (size_t i = 0; i < side.w.size(); i++)
      side.w[i] = table_at<State>(side.weight, p.weight_dtype, int64_t(i)) + (p.zero_centered ? State(1) : State(0));
    largest = std::max(largest, int64_t(side.w.size()));
  }
  std::vector<State> cos(rope.rotary_dim), sin(rope.rotary_dim), buffer(2 * largest);
  for (int64_t share = first_share; share < last_share; share++) {
    const int64_t begin = tokens * share / shares, end = tokens * (share + 1) / shares;
    RopeWalk walk(rope, begin);
    for (Side& side : sides)
      if (backward && side.weight) std::fill_n(side.partial + share * int64_t(side.w.size()), side.w.size(), State(0));
    for (int64_t t = begin; t < end; t++) {
      const auto at = walk.at(t);
      if (!at.outside) fill_coefficients(rope, at, cos.data(), sin.data());
      for (Side& side : sides)
        if (side.weight)
          rotate(p, side.x, side.grad, backward, at.batch, at.token, at.outside ? nullptr : cos.data(), sin.data(), side.w.data(),
                 backward ? side.partial + share * int64_t(side.w.size()) : nullptr, buffer.data());
    }
  }
}

template <typename State>
void finish(const QkNormRopeParams& p) {
  auto sum = [&](const void* partial, int64_t rows, int64_t size, void* out) {
    for (int64_t i = 0; i < size; i++) {
      State total = 0;
      for (int64_t row = 0; row < rows; row++) total += static_cast<const State*>(partial)[row * size + i];
      dispatch_float<true>(p.weight_dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<T, double>) static_cast<T*>(out)[i] = double(total);
        else static_cast<T*>(out)[i] = from_float<T>(float(total));
      });
    }
  };
  sum(p.q_partial, p.q_partials, qk_norm_weight_size(p, p.rope.q), p.q_weight_grad);
  if (p.k_weight) sum(p.k_partial, p.k_partials, qk_norm_weight_size(p, p.rope.k), p.k_weight_grad);
}

}  // namespace

int64_t qk_norm_rope_cpu_shares(const QkNormRopeParams& p) {
  return std::clamp<int64_t>(p.rope.batch * p.rope.tokens / kMinimumTokens, 1, kShares);
}

void qk_norm_rope_cpu(const QkNormRopeParams& p, int64_t first_share, int64_t last_share) {
  if (p.rope.dtype == DType::f64) run<double>(p, first_share, last_share);
  else run<float>(p, first_share, last_share);
}

void qk_norm_rope_cpu_finish(const QkNormRopeParams& p) {
  if (p.rope.dtype == DType::f64) finish<double>(p);
  else finish<float>(p);
}

}  // namespace packops

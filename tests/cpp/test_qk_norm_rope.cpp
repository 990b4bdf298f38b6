// RMS norm + RoPE on the CPU against its formula in double precision and against differences of it, through the plain interface
// of qk_norm_rope.h; and how qk_norm_rope.cu cuts its work.
#include <algorithm>
#include <array>

#include "qk_norm_rope_launch.h"

#define PACKOPS_SIMD_FILE "qk_norm_rope_simd.h"
#include "common/simd_targets.h"

#include "isa.h"

using namespace packops;

namespace {

// q alone, in float, with room between its heads. Everything the formula needs is beside it in double precision.
struct Problem {
  static constexpr float kGuard = 77;
  int64_t tokens, heads, dim, stride;
  std::vector<float> x, y, g, dx, weight, weight_grad, partial, cos, sin;
  std::vector<int32_t> cu_seqlens;
  QkNormRopeParams p;

  Problem(int64_t tokens, int64_t heads, int64_t dim, int rotary, int offset, bool across, uint64_t seed = 1)
      : tokens(tokens),
        heads(heads),
        dim(dim),
        stride(dim + 1),
        x(tokens * heads * stride),
        y(x.size(), kGuard),
        g(x.size()),
        dx(x.size(), kGuard),
        weight(across ? heads * dim : dim),
        weight_grad(weight.size(), kGuard),
        cos(tokens * rotary / 2),
        sin(cos.size()) {
    check::Random random(seed);
    for (auto* values : {&x, &g, &weight, &cos, &sin})
      for (float& v : *values) v = float(random.normal());
    p.rope.tokens = tokens;
    p.rope.head_dim = int32_t(dim);
    p.rope.rotary_dim = rotary;
    p.rope.rotary_offset = offset;
    p.rope.table_rows = tokens;
    p.rope.cos_row = p.rope.sin_row = rotary / 2;
    p.across_heads = across;
    p.eps = 1e-3;
  }

  RopeHeads side(float* in, float* out) const { return {in, out, heads, 0, heads * stride, stride, 0, heads * stride, stride}; }
  void prepare(bool backward) {
    p.rope.q = side(x.data(), backward ? dx.data() : y.data());
    p.rope.transposed = backward;
    p.rope.cos = cos.data();
    p.rope.sin = sin.data();
    p.q_weight = weight.data();
    if (!cu_seqlens.empty()) {
      p.rope.axis = {cu_seqlens.data(), DType::i32, int64_t(cu_seqlens.size()) - 1};
    }
    if (backward) {
      p.q_grad = side(g.data(), nullptr);
      p.q_partials = p.k_partials = qk_norm_rope_cpu_shares(p);
      partial.assign(p.q_partials * weight.size(), NAN);
      p.q_partial = partial.data();
      p.q_weight_grad = weight_grad.data();
    }
  }
  void run(bool backward, int64_t threads = 2) {
    prepare(backward);
    const int64_t shares = qk_norm_rope_cpu_shares(p);
    for (int64_t i = 0; i < threads; i++) qk_norm_rope_cpu(p, shares * i / threads, shares * (i + 1) / threads);
    if (backward) qk_norm_rope_cpu_finish(p);
  }

  bool inside(int64_t t) const { return cu_seqlens.empty() || t < cu_seqlens.back(); }
  int64_t position(int64_t t) const {
    int64_t start = 0;
    for (int32_t bound : cu_seqlens) start = bound <= t ? bound : start;
    return t - start;
  }
  size_t index(int64_t t, int64_t h, int64_t i) const { return size_t((t * heads + h) * stride + i); }

  // y of token t, (heads, dim), from x and weights in double precision.
  std::vector<double> formula(int64_t t, const std::vector<double>& x, const std::vector<double>& w) const {
    std::vector<double> out(x);
    if (!inside(t)) return out;
    const int64_t domain = p.across_heads ? heads * dim : dim;
    for (int64_t begin = 0; begin < heads * dim; begin += domain) {
      double squares = 0;
      for (int64_t i = 0; i < domain; i++) squares += x[begin + i] * x[begin + i];
      const double r = 1 / std::sqrt(squares / double(domain) + p.eps);
      for (int64_t i = 0; i < domain; i++) out[begin + i] = x[begin + i] * r * (w[i] + (p.zero_centered ? 1 : 0));
    }
    const int64_t half = p.rope.rotary_dim / 2;
    for (int64_t h = 0; h < heads; h++) {
      for (int64_t i = 0; i < half; i++) {
        const int64_t begin = h * dim + p.rope.rotary_offset;
        const int64_t a = begin + (p.rope.interleaved ? 2 * i : i), b = p.rope.interleaved ? a + 1 : a + half;
        const double c = cos[position(t) * half + i], s = sin[position(t) * half + i], u = out[a], v = out[b];
        out[a] = u * c - v * s;
        out[b] = v * c + u * s;
      }
    }
    return out;
  }
  std::vector<double> token(const std::vector<float>& data, int64_t t) const {
    std::vector<double> values;
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < dim; i++) values.push_back(data[index(t, h, i)]);
    return values;
  }

  void check_forward() const {
    const std::vector<double> w(weight.begin(), weight.end());
    for (int64_t t = 0; t < tokens; t++) {
      const auto want = formula(t, token(x, t), w), got = token(y, t);
      for (size_t i = 0; i < want.size(); i++) CHECK_CLOSE(got[i], want[i], inside(t) ? 1e-6 : 0);
      for (int64_t h = 0; h < heads; h++) CHECK_EQ(y[index(t, h, dim)], kGuard);
    }
  }
  // The gradient of sum(g y), from differences of the formula, which knows no derivative.
  void check_backward() const {
    const double step = 1e-5;
    std::vector<double> w(weight.begin(), weight.end()), dw(weight.size(), 0.0);
    for (int64_t t = 0; t < tokens; t++) {
      auto at = token(x, t);
      const auto incoming = token(g, t), got = token(dx, t);
      auto objective = [&] {
        const auto out = formula(t, at, w);
        double sum = 0;
        for (size_t i = 0; i < out.size(); i++) sum += out[i] * incoming[i];
        return sum;
      };
      auto slope = [&](double& value) {
        const double kept = value;
        value = kept + step;
        const double high = objective();
        value = kept - step;
        const double low = objective();
        value = kept;
        return (high - low) / (2 * step);
      };
      for (size_t i = 0; i < at.size(); i++) CHECK_CLOSE(got[i], slope(at[i]), 2e-6);
      if (inside(t))
        for (size_t i = 0; i < w.size(); i++) dw[i] += slope(w[i]);
    }
    for (size_t i = 0; i < w.size(); i++) CHECK_CLOSE(weight_grad[i], dw[i], 1e-5);
  }
};

template <typename F>
void each_kind(F&& f) {
  for (bool across : {false, true})
    for (auto [dim, rotary, offset] : {std::array<int, 3>{6, 6, 0}, {17, 8, 3}, {40, 32, 0}})
      for (bool interleaved : {false, true})
        for (bool zero_centered : {false, true}) {
          Problem problem(5, 3, dim, rotary, offset, across, uint64_t(dim));
          problem.p.rope.interleaved = interleaved;
          problem.p.zero_centered = zero_centered;
          f(problem);
        }
}

}  // namespace

CASE(normalises_and_turns_as_the_formula_says) {
  each_kind([](Problem& problem) {
    problem.run(false);
    problem.check_forward();
  });
}

CASE(backward_is_the_slope_of_the_formula) {
  each_kind([](Problem& problem) {
    problem.run(true);
    problem.check_backward();
  });
}

CASE(tokens_outside_documents_pass_through_and_give_nothing) {
  Problem problem(7, 2, 8, 8, 0, false);
  problem.cu_seqlens = {0, 2, 2, 5};
  problem.run(false);
  problem.check_forward();
  problem.run(true);
  problem.check_backward();
  Problem poisoned = problem;  // NaN in the padding reaches no weight
  for (int64_t t : {5, 6})
    for (size_t i = 0; i < 2 * 9; i++) poisoned.x[t * 2 * 9 + i] = poisoned.g[t * 2 * 9 + i] = NAN;
  poisoned.run(true);
  CHECK(poisoned.weight_grad == problem.weight_grad);
}

CASE(weight_gradients_do_not_depend_on_the_number_of_threads) {
  Problem one(2000, 2, 8, 8, 0, false), many = one;
  one.run(true, 1);
  many.run(true, 7);
  CHECK(one.weight_grad == many.weight_grad);
  CHECK(one.dx == many.dx);
  one.check_backward();
  CHECK_EQ(qk_norm_rope_cpu_shares(one.p), 64);
}

CASE(every_instruction_set_agrees_with_the_formula) {
  for_each_isa([](CpuIsa isa) {
    each_kind([&](Problem& problem) {
      for (bool backward : {false, true}) {
        problem.prepare(backward);
        std::vector<float> c(problem.p.rope.rotary_dim), s(c.size()), w(problem.weight), dw(w.size(), 0.f);
        std::vector<float> buffer(2 * problem.heads * problem.dim);
        if (problem.p.zero_centered)
          for (float& v : w) v += 1;
        for (int64_t t = 0; t < problem.tokens; t++) {
          const int half = problem.p.rope.rotary_dim / 2;
          const float sign = backward ? -1.f : 1.f;
          for (int i = 0; i < half; i++) {
            const float ci = problem.cos[t * half + i], si = sign * problem.sin[t * half + i];
            if (problem.p.rope.interleaved) c[2 * i] = c[2 * i + 1] = ci, s[2 * i] = -si, s[2 * i + 1] = si;
            else c[i] = ci, s[i] = si;
          }
          PACKOPS_OF_ISA(isa, qk_norm_rope_token_any)
          (problem.p, problem.p.rope.q, problem.p.q_grad, backward, 0, t, c.data(), s.data(), w.data(), dw.data(), buffer.data());
        }
        if (backward) {
          problem.weight_grad = dw;
          problem.check_backward();
        } else {
          problem.check_forward();
        }
      }
    });
  });
}

// ---- How qk_norm_rope.cu cuts its work.

namespace {

constexpr DeviceLimits kDevice = {.multiprocessors = 132};

QkNormRopeParams dense(int64_t tokens, int64_t q_heads, int64_t k_heads, int dim, int rotary, bool across,
                       DType dtype = DType::bf16, bool backward = false) {
  QkNormRopeParams p;
  p.rope.dtype = dtype;
  p.rope.transposed = backward;
  p.rope.tokens = tokens;
  p.rope.head_dim = dim;
  p.rope.rotary_dim = rotary;
  p.across_heads = across;
  for (auto [side, grad, heads] : {std::tuple{&p.rope.q, &p.q_grad, q_heads}, std::tuple{&p.rope.k, &p.k_grad, k_heads}}) {
    side->heads = heads;
    side->in_token = side->out_token = heads * dim;
    side->in_head = side->out_head = dim;
    *grad = *side;
  }
  return p;
}

}  // namespace

CASE(a_launch_covers_every_head_once) {
  for (int64_t tokens : {0, 1, 7, 4096})
    for (auto [q_heads, k_heads] : {std::pair{32, 8}, {1, 0}, {3, 1}, {24, 20}, {128, 128}})
      for (auto [dim, rotary] : {std::pair{128, 128}, {256, 64}, {96, 64}, {7, 6}, {2, 2}, {512, 512}, {260, 260}})
        for (DType dtype : {DType::bf16, DType::f32})
          for (bool across : {false, true})
            for (bool backward : {false, true}) {
              const QkNormRopeParams p = dense(tokens, q_heads, k_heads, dim, rotary, across, dtype, backward);
              const QkNormRopeLaunch launch = choose_qk_norm_rope_launch(p, kDevice);
              CHECK(launch.width == 1 || launch.width == 4);
              const int vectors = dim / launch.width;
              CHECK(2 * launch.lanes - 1 <= vectors && vectors <= 2 * launch.lanes);
              CHECK(launch.threads % 32 == 0 && launch.threads <= 256);
              for (auto [heads, blocks] : {std::pair{p.rope.q.heads, launch.q_blocks}, {p.rope.k.heads, launch.k_blocks}}) {
                CHECK_EQ(blocks > 0, heads > 0 && tokens > 0);
                if (blocks == 0) continue;
                int64_t units = across ? tokens : tokens * heads;
                if (launch.narrow) {
                  CHECK(!across && launch.width == 4);
                  CHECK(launch.group >= launch.lanes && launch.group <= 32 && (launch.group & (launch.group - 1)) == 0);
                  const int slots = launch.slots(heads), per_block = launch.slots_per_block(heads), chunks = launch.chunks(heads);
                  CHECK(slots * launch.unroll >= heads && (slots - 1) * launch.unroll < heads);
                  CHECK(per_block * chunks >= slots && per_block * (chunks - 1) < slots);
                  CHECK(launch.tokens_per_block(heads) >= 1);
                  CHECK(launch.tokens_per_block(heads) * per_block * launch.group <= launch.threads);
                  units = (tokens + launch.tokens_per_block(heads) - 1) / launch.tokens_per_block(heads) * chunks;
                }
                // Forward: a block per unit. Backward: no more than run at once, since each leaves a row of partial sums.
                if (!backward) CHECK_EQ(blocks, units);
                else
                  CHECK(blocks <= units && blocks <= kDevice.multiprocessors * (!launch.narrow        ? 3
                                                                                : dtype == DType::f32 ? 4
                                                                                                      : 5));
              }
            }
}

CASE(a_narrow_forward_launch_has_whole_warps_of_whole_heads) {
  for (int64_t tokens : {1, 7, 63, 4096, 16384})
    for (auto [q_heads, k_heads] : {std::pair{32, 8}, {1, 0}, {3, 1}, {24, 20}, {128, 128}})
      for (auto [dim, rotary] :
           {std::pair{128, 128}, {256, 64}, {136, 136}, {144, 144}, {96, 64}, {88, 64}, {80, 32}, {40, 24}, {16, 8}})
        for (DType dtype : {DType::bf16, DType::f32})
          for (bool heads_outer : {false, true}) {
            QkNormRopeParams p = dense(tokens, q_heads, k_heads, dim, rotary, false, dtype);
            if (heads_outer)
              for (RopeHeads* side : {&p.rope.q, &p.rope.k}) {
                side->in_token = side->out_token = dim;
                side->in_head = side->out_head = tokens * dim;
              }
            const QkNormRopeLaunch all = choose_qk_norm_rope_launch(p, kDevice);
            CHECK(all.narrow);
            const RopeLaunch& launch = all.forward;
            CHECK(launch.width >= 4 && launch.lane_chunks == 1);
            CHECK(launch.unroll == 1 || (launch.unroll <= 4 && launch.width * size_of(dtype) == 16));
            const int group = launch.lanes_per_block;
            CHECK(group >= launch.lanes && group <= 32 && (group & (group - 1)) == 0);
            CHECK(launch.threads() % 32 == 0 && launch.threads() <= 2 * kNormBlockThreads);
            CHECK((launch.token_inner ? launch.slots_per_block : launch.tokens_per_block) <= 64);
            CHECK(int64_t(launch.slots) * launch.unroll >= q_heads + k_heads);
            CHECK(launch.slots_per_block * launch.slot_chunks >= launch.slots);
            CHECK(launch.slots_per_block * (launch.slot_chunks - 1) < launch.slots);
            CHECK(launch.tokens_per_block * launch.token_blocks >= tokens);
            CHECK(launch.tokens_per_block * (launch.token_blocks - 1) < tokens);
          }
}

CASE(a_narrow_forward_launch_has_four_heads_a_thread_where_there_is_work) {
  const auto launch = [](int64_t tokens, int dim, DType dtype = DType::bf16) {
    return choose_qk_norm_rope_launch(dense(tokens, 32, 8, dim, dim, false, dtype), kDevice).forward;
  };
  CHECK_EQ(launch(16384, 128).unroll, 4);
  CHECK_EQ(launch(16384, 128).threads(), kNormBlockThreads);  // two tokens
  CHECK_EQ(launch(4096, 128).unroll, 2);
  CHECK_EQ(launch(4096, 128).threads(), kNormBlockThreads);  // one token
  CHECK_EQ(launch(16, 128).unroll, 1);
  CHECK_EQ(launch(16384, 88).unroll, 1);  // vectors of eight bytes
  CHECK_EQ(launch(16384, 88, DType::f32).unroll, 4);
}

CASE(misaligned_or_long_heads_take_the_wide_kernel) {
  auto launch = [](QkNormRopeParams p, bool backward = false) {
    p.rope.transposed = backward;
    return choose_qk_norm_rope_launch(p, kDevice);
  };
  CHECK(launch(dense(64, 32, 8, 128, 128, false)).narrow);
  CHECK(launch(dense(64, 32, 8, 256, 256, false)).narrow);
  CHECK(!launch(dense(64, 32, 8, 264, 264, false)).narrow);
  CHECK(!launch(dense(64, 32, 8, 128, 128, true)).narrow);
  CHECK(!launch(dense(64, 32, 8, 126, 126, false)).narrow);
  QkNormRopeParams p = dense(64, 32, 8, 128, 128, false);
  p.k_grad.in_token += 1;  // a gradient that the forward never sees
  CHECK(launch(p).narrow);
  CHECK(!launch(p, true).narrow);
}

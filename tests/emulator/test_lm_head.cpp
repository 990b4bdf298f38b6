// The lm_head's products, emulated, against fp64.
#include "lm_head.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"

using namespace packops;

namespace {

struct Options {
  double logit_scale = 1, softcap = 0;
  bool bias = false, entropy = true, spread = true;
};

template <typename T>
struct Problem {
  static constexpr DType kType = std::is_same_v<T, half_t> ? DType::f16 : DType::bf16;
  int64_t rows, vocab, width;
  Options o;
  std::vector<T> hidden, weight, bias;
  std::vector<int32_t> target;
  std::vector<double> logits;  // before scale and cap
  LmHeadParams p;

  Problem(int64_t rows, int64_t vocab, int64_t width, const Options& o)
      : rows(rows), vocab(vocab), width(width), o(o), hidden(rows * width), weight(vocab * width), bias(vocab), target(rows) {
    check::Random random(uint64_t(rows * 1000 + vocab));
    for (T& x : weight) x = from_float<T>(float(random.normal()));
    for (T& x : bias) x = from_float<T>(float(random.normal()));
    for (int64_t t = 0; t < rows; t++) {
      target[t] = int32_t(random.below(vocab));
      const double size = !o.spread ? 0.2 : t % 5 == 1 ? 4 : t % 5 == 2 ? -4 : 0;  // sure rows, very wrong ones, and others
      for (int64_t k = 0; k < width; k++)
        hidden[t * width + k] = from_float<T>(
            float(size != 0 && o.spread ? size * to_float(weight[target[t] * width + k]) : random.normal() / std::sqrt(width)));
      if (t % 7 == 3) target[t] = -1 - int32_t(t % 2);
    }
    if (rows > 2) target[0] = 0, target[1] = int32_t(vocab - 1);
    logits.resize(size_t(rows * vocab));
    for (int64_t t = 0; t < rows; t++)
      for (int64_t j = 0; j < vocab; j++) {
        double sum = o.bias ? to_float(bias[j]) : 0;
        for (int64_t k = 0; k < width; k++) sum += double(to_float(hidden[t * width + k])) * to_float(weight[j * width + k]);
        logits[t * vocab + j] = sum;
      }
    p.rows = rows, p.vocab = vocab, p.width = width, p.dtype = kType, p.hidden = hidden.data(), p.weight = weight.data();
    p.bias = o.bias ? bias.data() : nullptr, p.target = target.data();
    p.logit_scale = float(o.logit_scale), p.softcap = float(o.softcap);
  }

  double capped(double z) const {
    const double x = z * p.logit_scale;
    return o.softcap > 0 ? p.softcap * std::tanh(x / p.softcap) : x;
  }
  double slope(double z) const {
    if (o.softcap <= 0) return p.logit_scale;
    const double c = 1 / std::cosh(z * p.logit_scale / p.softcap);
    return p.logit_scale * c * c;
  }
};

// Of a row: the largest logit, log sum exp relative to it, -log p of the label to the digits that a sure row has, entropy.
struct Exact {
  double top = -INFINITY, log_sum, loss, entropy;
  template <typename T>
  Exact(const Problem<T>& x, int64_t t) {
    const double* z = &x.logits[t * x.vocab];
    for (int64_t j = 0; j < x.vocab; j++) top = std::max(top, x.capped(z[j]));
    const int32_t y = x.target[t];
    double sum = 0, mean = 0, rest = 0;
    for (int64_t j = 0; j < x.vocab; j++) {
      const double e = std::exp(x.capped(z[j]) - top);
      sum += e, mean += e * (x.capped(z[j]) - top);
      if (j != y) rest += std::exp(x.capped(z[j]) - x.capped(z[std::max(y, 0)]));
    }
    log_sum = std::log(sum), entropy = log_sum - mean / sum, loss = std::log1p(rest);
  }
};

template <typename T>
void compare(int64_t rows, int64_t vocab, int64_t width, const Options& o) {
  Problem<T> x(rows, vocab, width, o);
  LmHeadParams p = x.p;
  std::vector<float> workspace(size_t(lm_head_workspace(p)), NAN);
  std::vector<float> log_prob(rows, NAN), entropy(rows, NAN), row_max(rows, NAN), log_sum(rows, NAN);
  p.workspace = workspace.data(), p.log_prob = log_prob.data(), p.row_max = row_max.data(), p.log_sum = log_sum.data();
  p.entropy = o.entropy ? entropy.data() : nullptr;
  CHECK_EQ(lm_head_cuda(LmHeadPass::statistics, p, nullptr), cudaSuccess);
  int wrong = 0;
  for (int64_t t = 0; t < rows; t++) {
    const Exact e(x, t);
    if (x.target[t] < 0) {
      wrong += log_prob[t] != 0 || (o.entropy && entropy[t] != 0) || row_max[t] != 0 || log_sum[t] != 0;
      continue;
    }
    const double size = 1 + std::fabs(e.top) + e.loss;
    wrong += !(std::fabs(-log_prob[t] - e.loss) <= 3e-6 * size) ||
             !(std::fabs(row_max[t] + double(log_sum[t]) - e.top - e.log_sum) <= 3e-6 * size);
    if (e.loss < 1e-3 && e.loss > 1e-36)
      wrong += !(std::fabs(-log_prob[t] - e.loss) <= 1e-3 * e.loss);  // a sure row keeps its digits
    if (o.entropy) wrong += !(std::fabs(entropy[t] - e.entropy) <= 1e-5 * size);
  }
  CHECK_EQ(wrong, 0);

  std::vector<float> on_p(rows), on_p_log(rows), on_label(rows);
  check::Random random(5);
  for (int64_t t = 0; t < rows; t++)
    on_p[t] = float(random.normal()), on_p_log[t] = float(random.normal()), on_label[t] = -on_p[t];
  const int64_t stride = (vocab + 7) / 8 * 8 + 8;
  std::vector<T> out(size_t(rows * stride), from_float<T>(77));
  p.out = out.data(), p.out_stride = stride, p.on_p = on_p.data(), p.on_p_log = on_p_log.data(), p.on_label = on_label.data();
  CHECK_EQ(lm_head_cuda(LmHeadPass::gradient, p, nullptr), cudaSuccess);
  const double unit = std::is_same_v<T, half_t> ? 0x1p-10 : 0x1p-7;
  wrong = 0;
  for (int64_t t = 0; t < rows; t++) {
    const Exact e(x, t);
    for (int64_t j = 0; j < stride; j++) {
      const double found = to_float(out[t * stride + j]);
      if (j >= vocab) {
        wrong += found != (j < (vocab + 7) / 8 * 8 ? 0 : 77);
        continue;
      }
      const double z = x.logits[t * vocab + j], log_p = x.capped(z) - e.top - e.log_sum, q = std::exp(log_p);
      double expected = q * on_p[t] + (q > 0 ? q * log_p * on_p_log[t] : 0);
      if (j == x.target[t]) {  // 1 - p cancels
        const double p_y = std::exp(-e.loss);
        expected = on_label[t] * -std::expm1(-e.loss) + p_y * (on_p[t] + on_label[t] - on_p_log[t] * e.loss);
      }
      expected = x.target[t] < 0 ? 0 : expected * x.slope(z);
      wrong += !(std::fabs(found - expected) <=
                 unit * std::fabs(expected) + 2e-5 * std::fabs(x.slope(z)) * q * (1 + std::fabs(e.top)) + 1e-7);
    }
  }
  CHECK_EQ(wrong, 0);

  std::fill(out.begin(), out.end(), from_float<T>(77));
  CHECK_EQ(lm_head_cuda(LmHeadPass::logits, p, nullptr), cudaSuccess);
  wrong = 0;
  for (int64_t t = 0; t < rows; t++)
    for (int64_t j = 0; j < stride; j++) {
      const double found = to_float(out[t * stride + j]);
      if (j >= vocab) wrong += found != (j < (vocab + 7) / 8 * 8 ? 0 : 77);
      else wrong += !(std::fabs(found - x.logits[t * vocab + j]) <= unit * std::fabs(x.logits[t * vocab + j]) + 1e-5);
    }
  CHECK_EQ(wrong, 0);
}

}  // namespace

// Code without wgmma has no product: nothing to compare.
CASE(only_code_with_wgmma_fits) {
  const Problem<bf16_t> x(4, 16, 16, {});
  CHECK_EQ(lm_head_fits(x.p), emulator::code_has_wgmma);
  LmHeadParams odd = x.p;
  odd.width = 12;
  CHECK(!lm_head_fits(odd));
}

CASE(statistics_gradient_and_logits) {
  if (!emulator::code_has_wgmma) return;
  compare<bf16_t>(9, 400, 24, {});
  compare<bf16_t>(1, 7, 16, {.bias = true});
  compare<half_t>(130, 193, 16, {.logit_scale = 1.4, .bias = true});  // two blocks of rows, a column in a second tile
  compare<bf16_t>(12, 50, 32, {.logit_scale = 0.7, .softcap = 3, .bias = true});
  compare<half_t>(5, 386, 16, {.softcap = 20, .entropy = false});
  compare<bf16_t>(270, 900, 392, {.spread = false});  // several turns of each consumer, and of the ring in each
}

// Tokens and classes that fill no tile, strides that are none of the sizes, and memory beside the result that stays as it is.
template <typename T>
static void weight_gradient(int64_t tokens, int64_t vocab, int64_t width, bool wide, bool add, bool has_factor) {
  check::Random random(uint64_t(tokens + vocab));
  const int64_t stride = (vocab + 7) / 8 * 8 + 16;
  std::vector<T> grad_logits(size_t(tokens * stride), from_float<T>(NAN)), hidden(size_t(tokens * width));
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t j = 0; j < vocab; j++) grad_logits[size_t(t * stride + j)] = from_float<T>(float(random.normal()));
  for (T& x : hidden) x = from_float<T>(float(random.normal()));
  const float factor = 0.37f, before = 3, beside = 77;
  const size_t count = size_t(vocab * width), more = size_t(8 * width);
  std::vector<T> narrow(count + more, from_float<T>(beside));
  std::vector<float> fp32(count + more, beside);
  std::fill(fp32.begin(), fp32.begin() + int64_t(count), before);
  LmHeadWeightGradientParams p;
  p.tokens = tokens, p.vocab = vocab, p.width = width;
  p.dtype = Problem<T>::kType;
  p.grad_logits = grad_logits.data(), p.grad_logits_stride = stride, p.hidden = hidden.data();
  p.out = wide ? static_cast<void*>(fp32.data()) : narrow.data();
  p.wide = wide, p.add = add, p.factor = has_factor ? &factor : nullptr;
  CHECK(lm_head_weight_gradient_fits(p));
  CHECK_EQ(lm_head_weight_gradient_cuda(p, nullptr), cudaSuccess);
  const double unit = wide ? 0x1p-20 : std::is_same_v<T, half_t> ? 0x1p-10 : 0x1p-7;
  int wrong = 0;
  for (size_t at = 0; at < count + more; at++) {
    const double found = wide ? fp32[at] : to_float(narrow[at]);
    if (at >= count) {
      wrong += found != beside;
      continue;
    }
    const int64_t j = int64_t(at) / width, h = int64_t(at) % width;
    double sum = 0, size = 0;
    for (int64_t t = 0; t < tokens; t++) {
      const double term = double(to_float(grad_logits[size_t(t * stride + j)])) * to_float(hidden[size_t(t * width + h)]);
      sum += term, size += std::fabs(term);
    }
    const double expected = (has_factor ? factor : 1) * sum + (add ? before : 0);
    wrong += !(std::fabs(found - expected) <= unit * std::fabs(expected) + 0x1p-20 * (size + before));
  }
  CHECK_EQ(wrong, 0);
}

CASE(weight_gradients) {
  if (!emulator::code_has_wgmma) return;
  weight_gradient<bf16_t>(5, 7, 8, false, false, true);
  weight_gradient<bf16_t>(130, 200, 136, false, false, false);
  weight_gradient<half_t>(70, 385, 72, false, false, true);
  weight_gradient<bf16_t>(65, 193, 40, true, false, false);
  weight_gradient<half_t>(1, 400, 264, true, true, true);
  weight_gradient<bf16_t>(400, 1000, 392, true, true, false);  // several turns of each consumer, and of the ring in each
  weight_gradient<bf16_t>(400, 1000, 392, false, false, true);
}

CASE(weight_gradients_that_do_not_fit) {
  LmHeadWeightGradientParams p;
  alignas(16) static char memory[64];
  p.tokens = 4, p.vocab = 9, p.width = 8, p.grad_logits = p.hidden = memory, p.out = memory, p.grad_logits_stride = 16;
  CHECK_EQ(lm_head_weight_gradient_fits(p), emulator::code_has_wgmma);
  for (const auto& spoil : std::vector<void (*)(LmHeadWeightGradientParams&)>{
           [](auto& q) { q.grad_logits_stride = 9; }, [](auto& q) { q.width = 12; }, [](auto& q) { q.tokens = 0; },
           [](auto& q) { q.out = memory + 8; }, [](auto& q) { q.hidden = memory + 2; },
           [](auto& q) { q.grad_logits = memory + 4; }, [](auto& q) { q.dtype = DType::f32; }}) {
    LmHeadWeightGradientParams q = p;
    spoil(q);
    CHECK(!lm_head_weight_gradient_fits(q));
  }
}

// Logits so large that e^x tells only equal from smaller: the largest share the probability. Sums are exact: one product each.
CASE(huge_logits) {
  if (!emulator::code_has_wgmma) return;
  constexpr int64_t kVocab = 400, kWidth = 16;
  const std::vector<float> sizes = {1e3f, 1e8f, 1e9f, 2.1e9f, 3e9f, 1e12f, 1e20f, 1.2e38f};
  for (double scale : {1.0, 0.7, 1.3, 1e-3})
    for (double softcap : {0.0, 30.0})
      for (int ties : {1, 3}) {
        Problem<bf16_t> x(int64_t(4 * sizes.size()), kVocab, kWidth, {.logit_scale = scale, .softcap = softcap, .bias = true});
        std::fill(x.hidden.begin(), x.hidden.end(), from_float<bf16_t>(0));
        std::fill(x.weight.begin(), x.weight.end(), from_float<bf16_t>(0));
        std::fill(x.bias.begin(), x.bias.end(), from_float<bf16_t>(0));
        x.bias[5] = x.bias[390] = from_float<bf16_t>(-INFINITY);
        for (int64_t j = 0; j < kVocab; j++)  // the largest and the smallest are in each of the three tiles, or in one
          x.weight[size_t(j * kWidth)] = from_float<bf16_t>(j % 192 == 7 && j / 192 < ties    ? 1.9921875f
                                                            : j % 192 == 11 && j / 192 < ties ? 1.0078125f
                                                                                              : 1.5f);
        for (int64_t t = 0; t < x.rows; t++) {
          const bool positive = t % 2 == 0;
          x.hidden[size_t(t * kWidth)] = from_float<bf16_t>(positive ? sizes[size_t(t / 4)] : -sizes[size_t(t / 4)]);
          const int32_t largest = positive ? 7 : 11, in_last = largest + 192 * (ties - 1);
          x.target[size_t(t)] = t % 4 < 2 ? in_last : 100;
        }
        LmHeadParams p = x.p;
        std::vector<float> workspace(size_t(lm_head_workspace(p)), NAN), log_prob(x.rows), entropy(x.rows), row_max(x.rows),
            log_sum(x.rows), ones(x.rows, 1), zeros(x.rows, 0);
        p.workspace = workspace.data(), p.log_prob = log_prob.data(), p.row_max = row_max.data(), p.log_sum = log_sum.data();
        p.entropy = entropy.data();
        CHECK_EQ(lm_head_cuda(LmHeadPass::statistics, p, nullptr), cudaSuccess);
        std::vector<bf16_t> out(size_t(x.rows * kVocab));
        p.out = out.data(), p.out_stride = kVocab, p.on_p = ones.data(), p.on_p_log = zeros.data(), p.on_label = zeros.data();
        CHECK_EQ(lm_head_cuda(LmHeadPass::gradient, p, nullptr), cudaSuccess);
        for (int64_t t = 0; t < x.rows; t++) {
          const double h = to_float(x.hidden[size_t(t * kWidth)]), largest = x.capped(h * (h > 0 ? 1.9921875 : 1.0078125));
          const double others = x.capped(h * 1.5), gap = largest - others;
          if (softcap > 0 && std::fabs(h * scale) > 1e3) {  // all are at the cap; the two that are -inf at the lower end of it
            CHECK(std::fabs(log_prob[t] + std::log(h > 0 ? 398 : 400)) <= 1e-5);
            for (int64_t j = 0; j < kVocab; j++) CHECK(to_float(out[size_t(t * kVocab + j)]) == 0);
          }
          if (gap < 50) continue;
          CHECK(std::fabs(row_max[t] + double(log_sum[t]) - largest - std::log(ties)) <= 1e-6 * std::fabs(largest) + 1e-5);
          CHECK(std::fabs(entropy[t] - std::log(ties)) <= 1e-5);
          if (t % 4 < 2) CHECK(std::fabs(log_prob[t] + std::log(ties)) <= 1e-5);
          else CHECK(std::fabs(log_prob[t] + gap + std::log(ties)) <= 1e-6 * std::fabs(largest) + 1e-4);
          for (int64_t j = 0; j < kVocab; j++) {
            const bool shares = j % 192 == (h > 0 ? 7 : 11) && j / 192 < ties;
            const double slope = shares ? x.slope(largest / scale) : 0, found = to_float(out[size_t(t * kVocab + j)]);
            CHECK(std::fabs(found - (shares ? slope / ties : 0)) <= 0.01 * slope);
          }
        }
      }
}

// The epilogues of the lm_head's product, emulated, against fp64: the emulator forms the sums and has no copies and no wgmma.
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
}

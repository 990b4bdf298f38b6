// Cross entropy on the CPU against its formula in double precision, through the plain interface of ce_loss.h.
#include "ce_loss.h"

#include <algorithm>
#include <limits>

#define PACKOPS_SIMD_FILE "ce_loss_simd.h"
#include "common/simd_targets.h"

#include "isa.h"

using namespace packops;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kIgnore = -100;

// Rows of logits with a stride beyond their length, labels, documents, and room for every output.
struct Problem {
  int64_t rows, vocab, stride;
  std::vector<float> logits, grad;
  std::vector<int64_t> labels;
  std::vector<int32_t> cu_seqlens;
  std::vector<int32_t> target;
  std::vector<float> scale, row_max, row_sum, row_loss, entropy;
  std::vector<int32_t> prediction;
  std::vector<float> loss;
  int64_t counts[2] = {-1, -1};
  CeLossParams p;
  CeLossStatus status;

  Problem(int64_t rows, int64_t vocab, uint64_t seed)
      : rows(rows),
        vocab(vocab),
        stride(vocab + 3),
        logits(rows * stride, NAN),
        grad(rows * stride, 77.0f),
        labels(rows),
        target(rows),
        scale(rows),
        row_max(rows),
        row_sum(rows),
        row_loss(rows),
        entropy(rows),
        prediction(rows),
        loss(std::max<int64_t>(rows, 1)) {
    check::Random random(seed);
    for (int64_t t = 0; t < rows; t++) {
      for (int64_t c = 0; c < vocab; c++) logits[t * stride + c] = float(4 * random.normal());
      labels[t] = random.below(vocab);
    }
  }

  void run() {
    p.rows = rows;
    p.vocab = vocab;
    p.logits = logits.data();
    p.logits_layout = p.grad_layout = {1, stride, 0};
    p.labels = labels.data();
    p.ignore_index = kIgnore;
    if (!cu_seqlens.empty()) {
      p.axis.cu_seqlens = cu_seqlens.data();
      p.axis.documents = int64_t(cu_seqlens.size()) - 1;
    } else {
      p.axis.documents = 1;
      p.doc_length = rows;
    }
    p.target = target.data();
    p.scale = scale.data();
    p.row_max = row_max.data();
    p.row_sum = row_sum.data();
    p.row_loss = row_loss.data();
    p.entropy = entropy.data();
    p.prediction = prediction.data();
    p.loss = loss.data();
    p.counts = counts;
    p.grad = grad.data();
    status = ce_loss_prepare_cpu(p);
    if (status.error != CeLossError::ok) return;
    ce_loss_rows_cpu(p, 0, rows / 2);  // as two threads would
    ce_loss_rows_cpu(p, rows / 2, rows);
    ce_loss_reduce_cpu(p);
  }

  double logit(int64_t t, int64_t c) const { return logits[t * stride + c]; }
  double lse(int64_t t) const {
    double peak = -kInf, sum = 0;
    for (int64_t c = 0; c < vocab; c++) peak = std::max(peak, logit(t, c));
    for (int64_t c = 0; c < vocab; c++) sum += std::exp(logit(t, c) - peak);
    return peak + std::log(sum);
  }
  // Row t scored against class y with d(reduced)/d(row) = share.
  void check_row(int64_t t, int64_t y, double share) {
    CHECK_EQ(target[t], y);
    CHECK_CLOSE(row_loss[t], lse(t) - logit(t, y), 2e-6);
    CHECK_CLOSE(scale[t], share, 1e-6);
    double worst = 0;
    for (int64_t c = 0; c < vocab; c++)
      worst = std::max(worst, std::abs(grad[t * stride + c] - share * (std::exp(logit(t, c) - lse(t)) - (c == y))));
    CHECK(worst < 2e-6);
  }
  void check_silent(int64_t t) {
    CHECK_EQ(target[t], kIgnored);
    for (int64_t c = 0; c < vocab; c++) CHECK_EQ(grad[t * stride + c], 0.0f);
  }
};

}  // namespace

CASE(mean_over_tokens) {
  for (int64_t vocab : {1, 2, 15, 16, 17, 63, 1000, 5003}) {  // around every vector width
    Problem problem(5, vocab, 1);
    problem.labels[2] = kIgnore;
    problem.run();
    double total = 0;
    for (int64_t t : {0, 1, 3, 4}) {
      problem.check_row(t, problem.labels[t], 0.25);
      total += 0.25 * (problem.lse(t) - problem.logit(t, problem.labels[t]));
    }
    problem.check_silent(2);
    CHECK_CLOSE(problem.loss[0], total, 2e-6);
    CHECK_EQ(problem.counts[0], 4);
    CHECK_EQ(problem.grad[vocab], 77.0f);  // between the rows lies someone else's memory
  }
}

CASE(shift_stops_at_documents_and_padding) {
  Problem problem(9, 50, 2);
  problem.cu_seqlens = {0, 3, 3, 7};  // documents of 3, 0 and 4 tokens, then padding
  problem.p.shift = true;
  for (int64_t t : {2, 6, 7, 8})
    for (int64_t c = 0; c < problem.vocab; c++) problem.logits[t * problem.stride + c] = NAN;  // never read
  problem.run();
  for (int64_t t : {0, 1, 3, 4, 5}) problem.check_row(t, problem.labels[t + 1], 0.2);
  for (int64_t t : {2, 6, 7, 8}) problem.check_silent(t);
  CHECK(std::isfinite(problem.loss[0]));
}

CASE(mean_over_documents_of_their_mean) {
  Problem problem(8, 33, 3);
  problem.cu_seqlens = {0, 2, 7, 8};
  problem.labels[7] = kIgnore;  // a document that counts no token does not count
  problem.p.reduction = Reduction::seq_mean_token_mean;
  problem.run();
  for (int64_t t = 0; t < 7; t++) problem.check_row(t, problem.labels[t], t < 2 ? 1.0 / 4 : 1.0 / 10);
  CHECK_EQ(problem.counts[0], 7);
  CHECK_EQ(problem.counts[1], 2);
}

CASE(num_items_replaces_the_denominator) {
  Problem problem(4, 10, 4);
  problem.p.has_num_items = true;
  problem.p.num_items_value = 40;
  problem.run();
  for (int64_t t = 0; t < 4; t++) problem.check_row(t, problem.labels[t], 1.0 / 40);
}

CASE(nothing_counted_is_zero) {
  Problem problem(3, 10, 5);
  problem.labels.assign(3, kIgnore);
  problem.run();
  CHECK_EQ(problem.loss[0], 0.0f);
  for (int64_t t = 0; t < 3; t++) problem.check_silent(t);

  Problem empty(0, 10, 6);
  empty.run();
  CHECK_EQ(empty.loss[0], 0.0f);
}

CASE(minus_infinity_and_huge_logits) {
  Problem problem(3, 40, 7);
  for (int64_t c = 0; c < 20; c++) problem.logits[c] = float(-kInf);  // a leading block
  problem.labels[0] = 25;
  for (int64_t c = 0; c < 40; c++) problem.logits[problem.stride + c] = 3e38f;
  problem.run();
  problem.check_row(0, 25, 1.0 / 3);
  CHECK_CLOSE(problem.row_loss[1], std::log(40.0), 1e-6);  // max and sum apart: 3e38 + log 40 would lose it
}

// Beside the 1 of a confident row's target, the other classes' terms are smaller than what fp32 can add to it one by one: the
// error must not grow with the row. 3 roundings in a group of four, 1 of the sum, and a little for the terms themselves.
CASE(confident_rows_keep_their_gradient_however_long) {
  for_each_isa([](CpuIsa isa) {
    for (int64_t vocab : {63, 1000, 5003}) {
      for (float above : {14.f, 20.f}) {
        Problem problem(64, vocab, 13);
        for (float& x : problem.logits) x /= 4;
        for (int64_t t = 0; t < 64; t++) problem.logits[t * problem.stride + problem.labels[t]] = above;
        problem.p.reduction = Reduction::sum;
        problem.run();  // fills the parameters
        PACKOPS_OF_ISA(isa, ce_rows_any)(problem.p, 0, 64, CePass::forward);
        double worst = 0;
        for (int64_t t = 0; t < 64; t++) {
          const int64_t y = problem.labels[t];
          const double want = std::expm1(problem.logit(t, y) - problem.lse(t));
          worst = std::max(worst, std::abs(problem.grad[t * problem.stride + y] - want));
        }
        CHECK(worst <= 5 * 0x1p-24);
      }
    }
  });
}

CASE(largest_class_is_the_first_of_equals) {
  Problem problem(2, 100, 8);
  problem.logits[70] = problem.logits[31] = 1000;
  problem.run();
  CHECK_EQ(problem.prediction[0], 31);
  CHECK_CLOSE(problem.entropy[0], std::log(2.0), 1e-6);
}

CASE(bad_labels_are_named) {
  Problem problem(4, 10, 9);
  problem.labels[2] = 10;
  problem.run();
  CHECK(problem.status.error == CeLossError::bad_label);
  CHECK_EQ(problem.status.index, 2);
  CHECK_EQ(problem.status.value, 10);
}

CASE(backward_scales_by_grad_output) {
  Problem problem(6, 37, 11);
  problem.p.reduction = Reduction::none;
  problem.run();
  std::vector<float> incoming = {2, 0, -1, 0.5f, 3, 1};
  problem.p.grad_output = incoming.data();
  problem.p.grad_output_layout = {1, 1, 0};
  ce_loss_backward_cpu(problem.p, 0, 6);
  for (int64_t t = 0; t < 6; t++)
    for (int64_t c = 0; c < 37; c++)
      CHECK_CLOSE(problem.grad[t * problem.stride + c],
                  incoming[t] * (std::exp(problem.logit(t, c) - problem.lse(t)) - (c == problem.labels[t])), 4e-6);
}

// Every option at once, in every number type, around every vector: only here does a machine with AVX-512 run the other two.
template <typename T>
static void check_isa(CpuIsa isa, DType dtype, double tolerance) {
  for (int64_t vocab : {1, 3, 4, 7, 8, 15, 17, 100, 1030, 2051}) {
    Problem problem(4, vocab, uint64_t(vocab));
    problem.labels[2] = kIgnore;
    std::vector<T> logits(problem.logits.size()), grad(logits.size());
    for (size_t i = 0; i < logits.size(); i++) {
      logits[i] = from_float<T>(problem.logits[i]);
      problem.logits[i] = to_float(logits[i]);
    }
    check::Random random(3);
    std::vector<float> class_weight(vocab);
    for (float& w : class_weight) w = float(random.uniform() + 0.1);
    CeLossParams& p = problem.p;
    p.class_weight = class_weight.data();
    p.label_smoothing = 0.2f;
    p.z_loss = 0.01f;
    p.softcap = 5;
    p.logit_scale = 0.7f;
    p.reduction = Reduction::sum;
    problem.run();  // fills the parameters; the float results are not looked at
    p.logits = logits.data();
    p.logits_dtype = dtype;
    p.grad = grad.data();
    PACKOPS_OF_ISA(isa, ce_rows_any)(p, 0, 4, CePass::forward);

    for (int64_t t = 0; t < 4; t++) {
      if (t == 2) {
        for (int64_t c = 0; c < vocab; c++) CHECK_EQ(to_float(grad[t * problem.stride + c]), 0.f);
        continue;
      }
      std::vector<double> x(vocab);
      double sum = 0, weights = 0, smooth = 0, entropy = 0;
      for (int64_t c = 0; c < vocab; c++) x[c] = 5 * std::tanh(problem.logit(t, c) * double(0.7f) / 5);
      for (double v : x) sum += std::exp(v);
      const double lse = std::log(sum), eps = double(0.2f), z = double(0.01f);
      for (int64_t c = 0; c < vocab; c++) {
        weights += class_weight[c];
        smooth += class_weight[c] * (lse - x[c]);
        entropy -= std::exp(x[c] - lse) * (x[c] - lse);
      }
      const int64_t y = problem.labels[t];
      CHECK_CLOSE(problem.row_loss[t], (1 - eps) * class_weight[y] * (lse - x[y]) + eps / double(vocab) * smooth + z * lse * lse,
                  3e-6);
      CHECK_CLOSE(problem.entropy[t], entropy, 3e-6);
      CHECK(x[problem.prediction[t]] >= *std::max_element(x.begin(), x.end()) - 1e-5);
      const double alpha = (1 - eps) * class_weight[y] + eps / double(vocab) * weights + 2 * z * lse;
      for (int64_t c = 0; c < vocab; c++) {
        const double inner =
            alpha * std::exp(x[c] - lse) - eps / double(vocab) * class_weight[c] - (c == y ? (1 - eps) * class_weight[y] : 0);
        const double want = inner * double(0.7f) * (1 - x[c] * x[c] / 25), got = to_float(grad[t * problem.stride + c]);
        CHECK(std::abs(got - want) <= tolerance * std::abs(want) + 4e-6);
      }
    }
  }
}

CASE(every_instruction_set_agrees_with_the_formula) {
  for_each_isa([](CpuIsa isa) {
    check_isa<float>(isa, DType::f32, 4e-6);
    check_isa<half_t>(isa, DType::f16, 0x1p-11 + 4e-6);
    check_isa<bf16_t>(isa, DType::bf16, 0x1p-8 + 4e-6);
  });
}

CASE(shards_of_the_vocabulary_make_the_whole) {
  constexpr int64_t kRows = 6, kVocab = 37, kBegin[] = {0, 20, 20, 37};  // three shards, one of them empty
  Problem whole(kRows, kVocab, 12);
  whole.labels = {0, 19, 20, 36, kIgnore, 5};
  whole.p.z_loss = 0.01f;
  whole.run();
  Problem parts[] = {Problem(kRows, kVocab, 12), Problem(kRows, kVocab, 12), Problem(kRows, kVocab, 12)};
  const int64_t size = kPartialStates * kRows + 2;
  std::vector<float> partials(3 * size, NAN);
  for (int64_t s = 0; s < 3; s++) {
    Problem& part = parts[s];
    part.labels = whole.labels;
    part.run();  // everything but the columns is as in the whole
    part.p.z_loss = 0.01f;
    part.p.vocab = kBegin[s + 1] - kBegin[s];
    part.p.first_class = kBegin[s];
    part.p.classes = kVocab;
    part.p.logits = part.logits.data() + kBegin[s];
    part.p.grad = nullptr;
    part.p.entropy = nullptr;
    part.p.prediction = nullptr;
    part.p.partial = partials.data() + s * size;
    CHECK_EQ(partial_size(part.p), size);
    CHECK(ce_loss_prepare_cpu(part.p).error == CeLossError::ok);
    ce_loss_rows_cpu(part.p, 0, kRows);
  }
  const float one = 1;
  for (int64_t s = 0; s < 3; s++) {
    Problem& part = parts[s];
    part.p.partial = nullptr;
    part.p.partials = partials.data();
    part.p.shards = 3;
    CHECK(ce_loss_combine_cpu(part.p).error == CeLossError::ok);
    ce_loss_reduce_cpu(part.p);
    CHECK_CLOSE(part.loss[0], whole.loss[0], 1e-6);
    CHECK_EQ(part.loss[0], parts[0].loss[0]);
    std::fill(part.grad.begin(), part.grad.end(), 77.0f);
    part.p.grad = part.grad.data() + kBegin[s];
    part.p.grad_output = &one;
    part.p.grad_output_layout = {};
    ce_loss_backward_cpu(part.p, 0, kRows);
    for (int64_t t = 0; t < kRows; t++)
      for (int64_t c = 0; c < kVocab; c++) {
        const bool here = kBegin[s] <= c && c < kBegin[s + 1];
        CHECK_CLOSE(part.grad[t * part.stride + c], here ? whole.grad[t * whole.stride + c] : 77.0f, 1e-6);
      }
  }
  partials[size - 1] += 1;  // the first shard says that it is wider
  const CeLossStatus status = ce_loss_combine_cpu(parts[1].p);
  CHECK(status.error == CeLossError::bad_shards);
  CHECK_EQ(status.index, 1);
}

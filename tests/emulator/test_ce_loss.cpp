// The CUDA kernels of cross entropy, emulated, against those of the CPU.
#include "ce_loss.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "kernel_dtype.h"

// Aligned as memory of a GPU is. The last digit of a row's sum depends on where in memory the row begins, and with malloc's
// alignment that would depend on what was allocated before.
void* operator new(std::size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

using namespace packops;

namespace {

template <typename T>
constexpr double kEpsilon = std::is_same_v<T, float>    ? 0x1p-22
                            : std::is_same_v<T, half_t> ? 0x1p-10
                                                        : 0x1p-7;
constexpr double kHalfSmallest = 0x1p-24;

struct Options {
  Reduction reduction = Reduction::mean;
  double label_smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1;
  bool weights = false, statistics = false, shift = false, documents = false, grad = true;
};

template <typename T>
struct Problem {
  int64_t rows, vocab, offset, stride, grad_stride;
  std::vector<T> logits;
  std::vector<int64_t> labels;
  std::vector<int32_t> cu_seqlens;
  std::vector<float> class_weight, token_weight;
  CeLossParams p;

  // Rows begin `offset` elements into their memory and lie `gap` apart. Those of the gradient are further apart, aligned alike.
  Problem(int64_t rows, int64_t vocab, const Options& o, uint64_t seed, int64_t offset = 0, int64_t gap = 0)
      : rows(rows),
        vocab(vocab),
        offset(offset),
        stride(vocab + gap),
        grad_stride(stride + 16),
        logits(offset + rows * stride + 8),
        labels(rows) {
    check::Random random(seed);
    for (T& x : logits) x = from_float<T>(float(3 * random.normal()));
    if (o.statistics && vocab > 2)  // ties: the first index counts
      for (int64_t t = 0; t < rows; t += 2)
        for (int i = 0; i < 2; i++) logits[offset + t * stride + random.below(vocab)] = from_float<T>(20);
    for (int64_t& y : labels) y = random.below(5) == 0 ? -100 : random.below(vocab);
    for (int64_t i = 0; i < vocab; i++) class_weight.push_back(float(random.uniform() + 0.2));
    for (int64_t i = 0; i < rows; i++) token_weight.push_back(random.below(6) ? float(random.uniform() + 0.1) : 0.f);
    p.rows = rows;
    p.vocab = vocab;
    p.logits = logits.data() + offset;
    p.logits_dtype = kType<T>;
    p.logits_layout = {1, stride, 0};
    p.grad_layout = {1, grad_stride, 0};
    p.labels = labels.data();
    p.ignore_index = -100;
    p.shift = o.shift;
    if (o.documents) {  // with empty ones, and padding
      cu_seqlens = {0, 0};
      while (cu_seqlens.back() + 1 < rows)
        cu_seqlens.push_back(std::min<int32_t>(int32_t(rows) - 1, cu_seqlens.back() + int32_t(random.below(40))));
      p.axis.cu_seqlens = cu_seqlens.data();
      p.axis.documents = int64_t(cu_seqlens.size()) - 1;
    } else {
      p.axis.documents = 1;
      p.doc_length = rows;
    }
    p.reduction = o.reduction;
    p.label_smoothing = float(o.label_smoothing);
    p.z_loss = float(o.z_loss);
    p.softcap = float(o.softcap);
    p.logit_scale = float(o.logit_scale);
    if (o.weights) p.class_weight = class_weight.data(), p.token_weight = token_weight.data();
  }
};

template <typename T>
struct Outputs {
  std::vector<int32_t> target, prediction;
  std::vector<float> scale, row_max, row_sum, row_loss, entropy, loss, sequence_loss, workspace;
  std::vector<int64_t> counts;
  std::vector<T> grad;
  CeLossParams p;

  Outputs(const Problem<T>& in, const Options& o)
      : target(in.rows, -9),
        prediction(in.rows),
        scale(in.rows),
        row_max(in.rows),
        row_sum(in.rows),
        row_loss(in.rows),
        entropy(in.rows),
        loss(std::max<int64_t>(in.rows, 1), NAN),
        sequence_loss(in.p.axis.documents, NAN),
        counts(2, -1),
        grad(in.offset + in.rows * in.grad_stride + 8, from_float<T>(7)),
        p(in.p) {
    p.target = target.data();
    p.scale = scale.data();
    p.row_max = row_max.data();
    p.row_sum = row_sum.data();
    p.row_loss = row_loss.data();
    p.loss = loss.data();
    if (o.grad) p.grad = grad.data() + in.offset;
    if (o.statistics) {
      p.entropy = entropy.data();
      p.prediction = prediction.data();
      p.counts = counts.data();
      p.sequence_loss = sequence_loss.data();
    }
  }
  void run_cpu() {
    CHECK(ce_loss_prepare_cpu(p).error == CeLossError::ok);
    ce_loss_rows_cpu(p, 0, p.rows);
    ce_loss_reduce_cpu(p);
  }
  void provide_workspace() {
    workspace.assign(ce_loss_workspace(p) + 2, NAN);
    p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 7) / 8 * 8);
  }
  void run_cuda() {
    provide_workspace();
    CHECK_EQ(ce_loss_forward_cuda(p, nullptr), 0);
  }
};

template <typename T>
void compare_gradients(const Problem<T>& in, const std::vector<T>& got, const std::vector<T>& want) {
  double largest = 0, worst = 0;
  for (const T& x : want) largest = std::max(largest, to_float(x) == 7 ? 0.0 : std::abs(double(to_float(x))));
  for (size_t i = 0; i < want.size(); i++) {
    const int64_t place = int64_t(i) - in.offset;
    if (place < 0 || place >= in.rows * in.grad_stride || place % in.grad_stride >= in.vocab) {
      CHECK_EQ(to_float(got[i]), 7.f);  // between the rows lies someone else's memory
      continue;
    }
    const double a = to_float(got[i]), b = to_float(want[i]);
    worst = std::max(worst, std::isnan(a) ? INFINITY : std::abs(a - b) - kEpsilon<T> * std::abs(b));
  }
  CHECK(worst <= 5e-6 * largest + kHalfSmallest);
}

template <typename T>
void compare(const Problem<T>& in, const Options& o) {
  Outputs<T> cpu(in, o), cuda(in, o);
  cpu.run_cpu();
  cuda.run_cuda();
  CHECK(cuda.target == cpu.target);
  for (int64_t t = 0; t < in.rows; t++) {
    CHECK_CLOSE(cuda.row_loss[t], cpu.row_loss[t], 2e-5);
    if (cpu.target[t] < 0) continue;
    CHECK_CLOSE(cuda.scale[t], cpu.scale[t], 2e-6);
    CHECK_CLOSE(cuda.row_max[t] + std::log(cuda.row_sum[t]), cpu.row_max[t] + std::log(cpu.row_sum[t]), 2e-6);
    if (!o.statistics) continue;
    CHECK_CLOSE(cuda.entropy[t], cpu.entropy[t], 2e-5);
    if (!o.softcap && o.logit_scale == 1) {
      CHECK_EQ(cuda.prediction[t], cpu.prediction[t]);
    } else {  // capped logits may tie in fp32 on one of the two alone
      const auto logit = [&](int32_t c) { return to_float(in.logits[in.offset + t * in.stride + c]); };
      CHECK_CLOSE(logit(cuda.prediction[t]), logit(cpu.prediction[t]), 1e-4);
    }
  }
  for (int64_t i = 0; i < (o.reduction == Reduction::none ? in.rows : 1); i++) CHECK_CLOSE(cuda.loss[i], cpu.loss[i], 5e-6);
  if (o.statistics) {
    CHECK(cuda.counts == cpu.counts);
    for (int64_t d = 0; d < in.p.axis.documents; d++) CHECK_CLOSE(cuda.sequence_loss[d], cpu.sequence_loss[d], 5e-6);
  }
  compare_gradients(in, cuda.grad, cpu.grad);
}

const Options kOptions[] = {
    {},
    {.label_smoothing = 0.1, .z_loss = 1e-3, .weights = true},
    {.reduction = Reduction::sum, .softcap = 6, .logit_scale = 0.5},
    {.reduction = Reduction::sum, .softcap = 6, .logit_scale = -0.5},  // falling: no reciprocals are shared
    {.logit_scale = 0.5},
    {.statistics = true, .documents = true},
    {.reduction = Reduction::sum, .softcap = 6, .logit_scale = 0.5, .statistics = true},
    {.reduction = Reduction::seq_mean_token_mean, .label_smoothing = 0.1, .softcap = 5, .statistics = true, .documents = true},
    {.reduction = Reduction::none, .weights = true, .shift = true, .documents = true, .grad = false},
};

// emulator::cluster_launches of a call.
template <typename F>
int cluster_launches(F&& f) {
  const int before = emulator::cluster_launches;
  f();
  return emulator::cluster_launches - before;
}

// Rows that are read once: by clusters, into rings, where there is no gradient or a row is too long for two on a multiprocessor.
// Every set of options meets every schedule that the emulator draws; rows begin aligned or not, by turns, or both ways in long
// runs.
template <typename T>
void check_read_once(int64_t rows, int64_t vocab, bool staged = false) {
  int64_t turn = rows;
  for (const Options& o : kOptions) {
    turn++;
    for (int64_t offset : {0, 3}) {  // odd strides and addresses, the gradient's like the logits'
      if (!emulator::is_long && (turn + offset) % 2) continue;
      const Problem<T> problem(rows, vocab, o, uint64_t(vocab), offset, offset);
      const bool in_ring = emulator::code_architecture >= 90 && !(staged && o.grad);
      CHECK_EQ(cluster_launches([&] { compare(problem, o); }), in_ring);
    }
  }
}

}  // namespace

CASE(staged_rows) {
  check_read_once<float>(90, 300, true);  // without a gradient 13 rows are in a ring, so the exchanges go round more than twice
  check_read_once<float>(9, 8003, true);
  check_read_once<half_t>(19, 2048, true);
  check_read_once<bf16_t>(3, 4099, true);  // a step of the unrolled loop and two vectors
  check_read_once<bf16_t>(7, 32000, true);
  check_read_once<bf16_t>(2, 57601 - 8, true);  // nearly as long as there can be
}

CASE(rows_that_one_block_holds) {
  check_read_once<bf16_t>(5, 57608);
  check_read_once<half_t>(7, 66011);
}

CASE(rows_that_a_cluster_shares) {
  check_read_once<bf16_t>(17, 90257);
  check_read_once<bf16_t>(5, 128256);
  check_read_once<float>(5, 100003);
}

// More rows than exchanges, so that without its waits a role could overtake another by a whole round of the rings.
CASE(many_short_rows_without_a_gradient) {
  for (Options o : kOptions) {
    o.grad = false;
    for (int i = 0; i < emulator::repetitions(); i++) {
      const Problem<bf16_t> problem(70, 528 + 8 * i, o, uint64_t(i));
      CHECK_EQ(cluster_launches([&] { compare(problem, o); }), emulator::code_architecture >= 90);
      const Problem<float> longer(40, 5003, o, uint64_t(i), 1, 3);
      compare(longer, o);
    }
  }
}

CASE(one_row_many_times) {  // whatever order its threads run in, and wherever it lies
  const Options o{.label_smoothing = 0.1};
  const Problem<bf16_t> problem(1, 50257, o, 5);
  Outputs<bf16_t> first(problem, o);
  first.run_cuda();
  for (int i = 0; i < 20; i++) {
    Outputs<bf16_t> again(problem, o);
    again.run_cuda();
    CHECK_EQ(again.loss[0], first.loss[0]);
    CHECK(std::memcmp(again.grad.data(), first.grad.data(), again.grad.size() * 2) == 0);
  }
}

CASE(rows_that_are_streamed) {
  for (const Options& o : kOptions)
    for (int64_t vocab : {1, 2, 15, 63, 255}) {
      compare(Problem<float>(5, vocab, o, uint64_t(vocab), 0, 3), o);
      compare(Problem<bf16_t>(5, vocab, o, uint64_t(vocab), 1, 1), o);
    }
}

CASE(a_gradient_that_is_aligned_otherwise) {
  const Options o{.z_loss = 1e-3};
  const Problem<bf16_t> problem(5, 4000, o, 4);
  Outputs<bf16_t> cpu(problem, o), cuda(problem, o);
  cpu.run_cpu();
  std::vector<bf16_t> elsewhere(cuda.grad.size() + 1, from_float<bf16_t>(7));
  cuda.p.grad = elsewhere.data() + 1;
  CHECK_EQ(cluster_launches([&] { cuda.run_cuda(); }), 0);
  elsewhere.erase(elsewhere.begin());
  compare_gradients(problem, elsewhere, cpu.grad);
}

void check_prepared(int64_t rows, const Options& o) {
  const Problem<float> problem(rows, 12, o, uint64_t(rows));
  Outputs<float> cpu(problem, o), cuda(problem, o);
  CHECK(ce_loss_prepare_cpu(cpu.p).error == CeLossError::ok);
  cuda.provide_workspace();
  CHECK_EQ(ce_loss_prepare_cuda(cuda.p, nullptr), 0);
  CHECK(cuda.target == cpu.target);
  if (o.statistics) CHECK(cuda.counts == cpu.counts);
  for (int64_t t = 0; t < rows; t++)
    if (cpu.target[t] >= 0) CHECK_CLOSE(cuda.scale[t], cpu.scale[t], 2e-6);
}

CASE(targets_and_scales_of_many_rows) {  // by one block, a cluster, and several launches
  for (Reduction reduction : {Reduction::mean, Reduction::sum, Reduction::seq_mean_token_mean, Reduction::seq_mean_token_sum})
    for (int64_t rows : {300, 2048, 2049, 5000})
      check_prepared(rows, {.reduction = reduction, .weights = true, .statistics = true, .shift = true, .documents = true});
  for (int64_t rows : {1024, 1025, 5000, 9000, 70000})
    CHECK_EQ(cluster_launches([&] { check_prepared(rows, {.weights = true, .shift = true, .documents = true}); }),
             emulator::code_architecture >= 90 && rows > 1024 && rows <= 65536);
}

CASE(backward_for_any_grad_output) {
  for (const Options& o : kOptions) {
    for (bool per_row : {false, true})
      for (bool holds_gradient : {false, true}) {
        if (!o.grad) continue;
        const Problem<half_t> problem(11, 700, o, 3);
        check::Random random(7);
        std::vector<float> incoming(per_row ? 11 : 1);
        for (float& g : incoming) g = random.below(3) ? float(random.normal()) : 1;
        Outputs<half_t> cpu(problem, o), cuda(problem, o);
        cpu.run_cpu();
        cuda.run_cuda();
        for (CeLossParams* p : {&cpu.p, &cuda.p}) {
          p->entropy = p->prediction = nullptr;  // backward knows nothing of them, so its kernel may be another
          p->grad_output = incoming.data();
          p->grad_output_layout = {1, per_row, 0};
          p->grad_holds_gradient = holds_gradient;
        }
        ce_loss_backward_cpu(cpu.p, 0, 11);
        CHECK_EQ(ce_loss_backward_cuda(cuda.p, nullptr), 0);
        compare_gradients(problem, cuda.grad, cpu.grad);
      }
  }
}

CASE(shards_of_the_vocabulary_make_the_whole) {
  constexpr int64_t kRows = 9, kVocab = 4100, kBegin[] = {0, 700, 700, 4100};  // one of them empty
  for (const Options& o : {Options{}, Options{.label_smoothing = 0.1, .z_loss = 1e-3, .softcap = 6, .weights = true}}) {
    const Problem<float> problem(kRows, kVocab, o, 12);
    Outputs<float> whole(problem, o);
    whole.run_cpu();
    const int64_t size = kPartialStates * kRows + 2;
    std::vector<float> partials(3 * size, NAN);
    std::vector<Outputs<float>> parts(3, whole);
    for (int64_t s = 0; s < 3; s++) {
      Outputs<float>& part = parts[s] = Outputs<float>(problem, o);
      part.p.vocab = kBegin[s + 1] - kBegin[s];
      part.p.first_class = kBegin[s];
      part.p.classes = kVocab;
      part.p.logits = static_cast<const float*>(problem.p.logits) + kBegin[s];
      if (part.p.class_weight) part.p.class_weight = static_cast<const float*>(part.p.class_weight) + kBegin[s];
      part.p.grad = nullptr;
      part.p.partial = partials.data() + s * size;
      part.run_cuda();
    }
    const float one = 1;
    for (int64_t s = 0; s < 3; s++) {
      CeLossParams& p = parts[s].p;
      p.partial = nullptr;
      p.partials = partials.data();
      p.shards = 3;
      CHECK_EQ(ce_loss_combine_cuda(p, nullptr), 0);
      CHECK_CLOSE(parts[s].loss[0], whole.loss[0], 5e-6);
      CHECK_EQ(parts[s].loss[0], parts[0].loss[0]);
      p.grad = whole.grad.data() + kBegin[s];  // overwritten, shard by shard, with what it holds
      std::vector<float> before = whole.grad;
      p.grad_output = &one;
      p.grad_output_layout = {};
      CHECK_EQ(ce_loss_backward_cuda(p, nullptr), 0);
      compare_gradients(problem, whole.grad, before);
    }
    partials[size - 1] += 1;  // the first shard says that it is wider
    CHECK_EQ(ce_loss_combine_cuda(parts[1].p, nullptr), 0);
    CHECK(std::isnan(parts[1].loss[0]));
  }
}

// Capped rows of 16-bit logits share reciprocals, four elements each, so that no neighbour may spoil another: every kind of
// number beside every other, against the formula in fp64.
template <typename T>
void check_softcap(int64_t vocab, double softcap, double logit_scale, bool staged) {
  constexpr int64_t kRows = 8;
  const Options o{.reduction = Reduction::sum, .softcap = softcap, .logit_scale = logit_scale};
  Problem<T> problem(kRows, vocab, o, uint64_t(vocab), 3, 3);
  const float largest = std::is_same_v<T, half_t> ? 65504 : 3e38f;
  const float saturated = std::min(largest, float(softcap / std::abs(logit_scale)) * 12);
  const auto set = [&](int64_t t, int64_t c, float x) {
    problem.logits[problem.offset + t * problem.stride + c] = from_float<T>(x);
  };
  for (int64_t t = 0; t < kRows; t++) {
    problem.labels[t] = (t * 131 + 70) % vocab;
    check::Random random{uint64_t(t)};
    for (int64_t c = t % 4; c < vocab; c += t < 6 ? 5 : 1) {
      if (t == 1) set(t, c, c % 3 ? INFINITY : -INFINITY);
      if (t == 2) set(t, c, c % 2 ? largest : -largest);
      if (t == 3) set(t, c, random.below(2) ? saturated : -saturated);
      if (t == 4) set(t, c, -INFINITY);
      if (t == 5) set(t, c, float(random.uniform()) * saturated);
      if (t == 6) set(t, c, saturated);
      if (t == 7) set(t, c, -saturated);
    }
  }
  problem.token_weight.resize(kRows);
  for (int64_t t = 0; t < kRows; t++) problem.token_weight[t] = t % 3 ? 1.5f : -0.5f;
  problem.p.token_weight = problem.token_weight.data();
  Outputs<T> cuda(problem, o);
  const bool in_ring = emulator::code_architecture >= 90 && !staged;
  CHECK_EQ(cluster_launches([&] { cuda.run_cuda(); }), in_ring);

  for (int64_t t = 0; t < kRows; t++) {
    const int64_t y = problem.labels[t], row = problem.offset + t * problem.stride;
    const T* grad = cuda.grad.data() + problem.offset + t * problem.grad_stride;
    std::vector<double> x(vocab);
    const double scale = problem.p.logit_scale, cap = problem.p.softcap;
    for (int64_t c = 0; c < vocab; c++) x[c] = cap * std::tanh(double(to_float(problem.logits[row + c])) * scale / cap);
    const double max = *std::max_element(x.begin(), x.end());
    double sum = 0, worst = 0;
    for (double v : x) sum += std::exp(v - max);
    const double loss = std::log(sum) + max - x[y];
    CHECK_CLOSE(cuda.row_loss[t], loss, 2e-6 + cap * 0x1p-22);
    for (int64_t c = 0; c < vocab; c++) {
      const double probability = std::exp(x[c] - max) / sum, factor = scale * problem.token_weight[t],
                   want = factor * (probability - (c == y)) * (1 - x[c] / cap * x[c] / cap);
      const double noise = std::abs(factor) * (probability + (c == y)) * (0x1p-20 + (c == y ? cap * probability * 0x1p-22 : 0));
      const double smallest = std::is_same_v<T, half_t> ? kHalfSmallest : 0x1p-120;
      const double allowed = std::abs(want) * (kEpsilon<T> / 2 + cap * 0x1p-21) + noise + smallest;
      const double error = std::abs(to_float(grad[c]) - want) / allowed;
      worst = std::max(worst, std::isnan(error) ? INFINITY : error);
    }
    CHECK(worst <= 1);
  }
}

CASE(softcapped_logits_of_every_size) {
  for (double cap : {0.5, 30.0, 32.0, 1000.0})
    for (double scale : {1.0, -0.7, 3e4}) {
      check_softcap<bf16_t>(1100, cap, scale, true);
      check_softcap<half_t>(1100, cap, scale, true);
    }
  check_softcap<half_t>(1100, 1e4, 1, true);  // beyond 65504 there is no logit to clamp to
  check_softcap<half_t>(1100, 1e-6, 1, true);
  check_softcap<bf16_t>(66001, 30, 1, false);
}

template <typename T>
void check_extremes(int64_t vocab, float largest) {
  const Options o{.reduction = Reduction::none, .statistics = true};
  Problem<T> problem(4, vocab, o, uint64_t(vocab));
  const auto row = [&](int64_t t) { return problem.logits.data() + problem.offset + t * problem.stride; };
  for (int64_t t = 0; t < 4; t++) problem.labels[t] = vocab - 1;
  row(0)[vocab / 2] = from_float<T>(-INFINITY);
  std::fill(row(1), row(1) + vocab - 2, from_float<T>(-INFINITY));
  std::fill(row(2), row(2) + vocab - 2, from_float<T>(-largest));  // the distance to the maximum is infinite in fp32
  row(2)[vocab - 2] = from_float<T>(largest);
  row(3)[vocab / 3] = from_float<T>(largest / 4);
  compare(problem, o);
}

CASE(statistics_of_extreme_logits) {
  for (int64_t vocab : {5, 300, 4099}) {
    check_extremes<float>(vocab, 2e38f);
    check_extremes<bf16_t>(vocab, 2e38f);
    check_extremes<half_t>(vocab, 65504);
  }
  check_extremes<bf16_t>(60000, 2e38f);
}

CASE(a_nan_shows_wherever_it_is) {
  for (int64_t at = 60; at < 80; at++) {  // on the edge and in vectors
    const Options o{.softcap = 30};
    Problem<bf16_t> problem(1, 700, o, 3);
    problem.labels[0] = 70;
    problem.logits[at] = from_float<bf16_t>(NAN);
    Outputs<bf16_t> cuda(problem, o);
    cuda.run_cuda();
    CHECK(std::isnan(cuda.loss[0]));
    for (int64_t c = 0; c < 700; c++) CHECK(std::isnan(to_float(cuda.grad[c])));
  }
}

// The loss and p - 1 of a confident class keep their digits only if the sum and the target have the same x', to the last bit,
// wherever the class is and whichever kernel makes the gradient.
void check_confident_classes(int64_t vocab, int64_t offset, bool grad_later) {
  constexpr int64_t kRows = 160;
  const Options o{.reduction = Reduction::sum, .softcap = 30};
  Problem<bf16_t> problem(kRows, vocab, o, 2, offset, offset);
  const auto place = [&](int64_t t, int64_t c) { return problem.offset + t * problem.stride + c; };
  for (int64_t t = 0; t < kRows; t++) {
    problem.labels[t] = t < 80 ? t : t < 90 ? vocab - 1 - (t - 80) : (80 + 29 * t) % vocab;
    problem.logits[place(t, problem.labels[t])] = from_float<bf16_t>(float(22 + 0.1 * double(t % 64)));
  }
  Outputs<bf16_t> cuda(problem, o);
  const float one = 1;
  if (grad_later) cuda.p.grad = nullptr;
  cuda.run_cuda();
  if (grad_later) {
    cuda.p.grad = cuda.grad.data() + problem.offset;
    cuda.p.grad_output = &one;
    cuda.p.grad_output_layout = {};
    CHECK_EQ(ce_loss_backward_cuda(cuda.p, nullptr), 0);
  }
  double worst = 0, worst_loss = 0;
  for (int64_t t = 0; t < kRows; t++) {
    const int64_t y = problem.labels[t];
    const double target = 30 * std::tanh(to_float(problem.logits[place(t, y)]) / 30.0);
    double others = 0;
    for (int64_t c = 0; c < vocab; c++)
      if (c != y) others += std::exp(30 * std::tanh(to_float(problem.logits[place(t, c)]) / 30.0) - target);
    const double rest = others / (1 + others), slope = 1 - target * target / 900;
    const double off = std::abs(to_float(cuda.grad[problem.offset + t * problem.grad_stride + y]) + rest * slope) / slope -
                       rest * kEpsilon<bf16_t> / 2;
    worst = std::max(worst, off);
    const double loss = std::log1p(others), of_terms = loss * 30 * 0x1.7p-21;  // a capped logit is off by 2^-20.5 softcap at most
    worst_loss = std::max(worst_loss, std::abs(cuda.row_loss[t] - loss) - of_terms);
  }
  CHECK(worst <= 3 * 0x1p-23);
  CHECK(worst_loss <= double(3 + vocab / 8192) * 0x1p-23);  // every addition to a sum that holds the class rounds it
}

CASE(a_confident_class_is_capped_like_its_neighbours) {
  for (bool grad_later : {false, true})
    for (int64_t offset : {0, 1, 2, 7}) check_confident_classes(2048, offset, grad_later);
  for (bool grad_later : {false, true}) check_confident_classes(70001, 3, grad_later);
}

CASE(rows_of_weight_zero_are_not_read) {
  for (const bool grad : {false, true})
    for (const Options& o : {Options{.statistics = true, .grad = grad}, Options{.reduction = Reduction::none, .grad = grad}}) {
      Problem<bf16_t> problem(9, 600, o, 8);
      for (int64_t t : {1, 2, 7}) {
        problem.labels[t] = t;
        problem.token_weight[t] = t == 2 ? -0.f : 0.f;
        for (int64_t c = 0; c < 600; c++) problem.logits[t * problem.stride + c] = from_float<bf16_t>(t == 1 ? NAN : INFINITY);
      }
      problem.p.token_weight = problem.token_weight.data();
      compare(problem, o);
      Outputs<bf16_t> cuda(problem, o);
      cuda.run_cuda();
      for (int64_t t : {1, 2, 7}) {
        CHECK_EQ(cuda.target[t], kIgnored);
        CHECK_EQ(cuda.row_loss[t], 0.f);
        if (grad)
          for (int64_t c = 0; c < 600; c++) CHECK_EQ(to_float(cuda.grad[t * problem.grad_stride + c]), 0.f);
      }
      CHECK(std::isfinite(cuda.loss[0]));
    }
}

CASE(num_items_of_every_type) {
  const auto check = [](auto number, DType dtype) {
    for (Reduction reduction : {Reduction::mean, Reduction::seq_mean_token_mean, Reduction::seq_mean_token_sum}) {
      const Options o{.reduction = reduction, .weights = true, .documents = true};
      Problem<float> problem(30, 40, o, 5);
      problem.p.has_num_items = true;
      problem.p.num_items_value = double(number);
      Outputs<float> cpu(problem, o), cuda(problem, o);
      cpu.run_cpu();
      cuda.p.num_items = &number;
      cuda.p.num_items_dtype = dtype;
      cuda.p.num_items_value = NAN;  // not to be read
      cuda.run_cuda();
      CHECK_CLOSE(cuda.loss[0], cpu.loss[0], 5e-6);
      compare_gradients(problem, cuda.grad, cpu.grad);
    }
  };
  check(7.5f, DType::f32);
  check(7.25, DType::f64);
  check(int32_t(7), DType::i32);
  check(int64_t(7), DType::i64);
}

CASE(bad_labels_are_nan) {
  const Options o{.reduction = Reduction::none};
  Problem<float> problem(6, 900, o, 8);
  problem.labels = {4, 900, -100, -1, 5, 6};
  Outputs<float> cuda(problem, o);
  cuda.run_cuda();
  for (int64_t t = 0; t < 6; t++) {
    CHECK_EQ(std::isnan(cuda.loss[t]), t == 1 || t == 3);
    if (t < 1 || t > 3) continue;
    for (int64_t c = 0; c < 900; c++) CHECK_EQ(cuda.grad[t * problem.grad_stride + c], 0.f);
  }
}

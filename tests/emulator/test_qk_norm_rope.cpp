// The CUDA kernels of the fused norm and RoPE, emulated, against those of the CPU.
#include "qk_norm_rope.h"

#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "kernel_dtype.h"

using namespace packops;

namespace {

template <typename T>
constexpr double kTolerance = std::is_same_v<T, float>    ? 2e-5
                              : std::is_same_v<T, half_t> ? 0x1p-8
                                                          : 0x1p-5;

struct Shape {
  int64_t tokens, q_heads, k_heads;
  int head_dim, rotary_dim, offset;
  int64_t gap;  // between heads: 0 keeps vectors aligned
  bool across_heads = false;
  int64_t weight_shift = 0;  // by which weights miss the alignment of a vector
  int64_t batch = 1;
};

// More between heads of the gradient than of x, and of the output: aligned alike, not the same strides.
constexpr int64_t kGradGap = 8, kOutGap = 16;

template <typename T>
struct Side {
  std::vector<T> x, y, g, dx, weight;
  std::vector<float> weight_grad, partial;

  Side(const Shape& s, int64_t heads, check::Random& random)
      : x(size_t(s.batch * s.tokens * heads * (s.head_dim + s.gap))),
        y(size_t(s.batch * s.tokens * heads * (s.head_dim + s.gap + kOutGap)), from_float<T>(7)),
        g(size_t(s.batch * s.tokens * heads * (s.head_dim + s.gap + kGradGap))),
        dx(y),
        weight(size_t(s.across_heads ? heads * s.head_dim : s.head_dim)),
        weight_grad(weight.size(), 7) {
    for (auto* values : {&x, &g, &weight})
      for (T& v : *values) v = from_float<T>(float(random.normal()));
  }
};

template <typename T, typename U>
void check_same(const std::vector<T>& got, const std::vector<U>& want, double tolerance) {
  double worst = 0, largest = 1;
  for (size_t i = 0; i < want.size(); i++) {
    largest = std::max(largest, std::abs(double(to_float(want[i]))));
    const double difference = std::abs(double(to_float(got[i])) - to_float(want[i]));
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
  }
  CHECK(worst <= tolerance * largest);
}

template <typename T>
void compare(const Shape& s, bool interleaved, bool zero_centered, bool documents, bool mrope = false) {
  check::Random random{uint64_t(s.tokens * 100 + s.head_dim)};
  Side<T> inputs[2] = {Side<T>(s, s.q_heads, random), Side<T>(s, s.k_heads, random)};
  // Full-width tables whose columns all differ, cos and sin of their own strides.
  const int64_t cos_row = s.rotary_dim, sin_row = cos_row + 4, rows = s.batch * s.tokens;
  std::vector<float> cos(size_t(rows * cos_row)), sin(size_t(rows * sin_row));
  for (float& c : cos) c = float(2 * random.uniform() - 1);
  for (float& x : sin) x = float(2 * random.uniform() - 1);
  const std::vector<int32_t> cu_seqlens = {0, 0, int32_t(rows / 3), int32_t(rows - rows / 5)};

  QkNormRopeParams p;
  RopeParams& r = p.rope;
  r.dtype = kType<T>;
  r.batch = s.batch, r.tokens = s.tokens;
  r.head_dim = s.head_dim, r.rotary_dim = s.rotary_dim, r.rotary_offset = s.offset;
  r.interleaved = interleaved;
  r.cos = cos.data(), r.sin = sin.data(), r.table_rows = rows, r.cos_row = cos_row, r.sin_row = sin_row;
  r.table_step = interleaved && zero_centered ? 2 : 1;
  if (documents) r.axis = {cu_seqlens.data(), DType::i32, 3};
  std::vector<int64_t> ids(size_t(3 * rows));
  for (int64_t& id : ids) id = random.below(rows);
  if (mrope) {
    r.mrope = true, r.mrope_interleaved = !documents;
    r.position_ids = ids.data(), r.position_axis = rows, r.position_batch = s.tokens, r.position_token = 1;
    const int third = s.rotary_dim / 6;
    r.mrope_section[0] = s.rotary_dim / 2 - 2 * third, r.mrope_section[1] = r.mrope_section[2] = third;
  }
  p.weight_dtype = kType<T>;
  p.zero_centered = zero_centered;
  p.across_heads = s.across_heads;
  p.eps = 1e-3;

  const auto shifted = [&](auto type, const std::vector<T>& weight) {
    std::vector<decltype(type)> result(size_t(s.weight_shift));
    for (const T& w : weight) {
      if constexpr (std::is_same_v<decltype(type), float>) result.push_back(to_float(w));
      else result.push_back(w);
    }
    return result;
  };
  Side<T> results[2][2] = {{inputs[0], inputs[1]}, {inputs[0], inputs[1]}};  // [CUDA][k]
  for (bool cuda : {false, true})
    for (bool backward : {false, true}) {
      Side<T>*q = &results[cuda][0], *k = &results[cuda][1];
      const auto heads = [&](int64_t count, T* in, T* out) {
        const int64_t head = s.head_dim + s.gap + (out ? 0 : kGradGap), token = count * head;
        const int64_t out_head = s.head_dim + s.gap + kOutGap, out_token = count * out_head;
        return RopeHeads{in, out, count, s.tokens * token, token, head, s.tokens * out_token, out_token, out_head};
      };
      r.transposed = backward;
      r.q = heads(s.q_heads, q->x.data(), backward ? q->dx.data() : q->y.data());
      r.k = heads(s.k_heads, k->x.data(), backward ? k->dx.data() : k->y.data());
      const std::vector<T> q_weight = shifted(T{}, q->weight), k_weight = shifted(T{}, k->weight);
      p.q_weight = q_weight.data() + s.weight_shift, p.k_weight = s.k_heads ? k_weight.data() + s.weight_shift : nullptr;
      if (backward) {
        p.q_grad = heads(s.q_heads, q->g.data(), nullptr), p.k_grad = heads(s.k_heads, k->g.data(), nullptr);
        if (cuda) qk_norm_rope_cuda_partials(p);
        else p.q_partials = p.k_partials = qk_norm_rope_cpu_shares(p);
        q->partial.assign(size_t(p.q_partials) * q->weight.size(), NAN);
        k->partial.assign(size_t(p.k_partials) * k->weight.size(), NAN);
        p.q_partial = q->partial.data(), p.k_partial = k->partial.data();
        p.weight_dtype = DType::f32;  // of its gradient: a second rounding would hide differences
        p.q_weight_grad = q->weight_grad.data(), p.k_weight_grad = k->weight_grad.data();
        const std::vector<float> q_floats = shifted(0.f, q->weight), k_floats = shifted(0.f, k->weight);
        p.q_weight = q_floats.data() + s.weight_shift, p.k_weight = s.k_heads ? k_floats.data() + s.weight_shift : nullptr;
        if (cuda) CHECK_EQ(qk_norm_rope_cuda(p, nullptr), cudaSuccess);
        else qk_norm_rope_cpu(p, 0, qk_norm_rope_cpu_shares(p)), qk_norm_rope_cpu_finish(p);
        p.weight_dtype = kType<T>;
      } else if (cuda) {
        CHECK_EQ(qk_norm_rope_cuda(p, nullptr), cudaSuccess);
      } else {
        qk_norm_rope_cpu(p, 0, qk_norm_rope_cpu_shares(p));
      }
    }
  for (int side : {0, 1}) {
    const Side<T>&cpu = results[0][side], &cuda = results[1][side];
    check_same(cuda.y, cpu.y, kTolerance<T>);
    check_same(cuda.dx, cpu.dx, kTolerance<T>);
    if (side == 0 || s.k_heads) check_same(cuda.weight_grad, cpu.weight_grad, 1e-4);
  }
}

const Shape kShapes[] = {
    {9, 4, 2, 64, 64, 0, 0},
    {17, 3, 1, 96, 32, 64, 0},
    {7, 5, 0, 40, 24, 8, 0},
    {40, 8, 4, 128, 128, 0, 0},
    {5, 2, 2, 256, 64, 0, 0},
    {6, 3, 2, 30, 12, 4, 1},
    {9, 4, 2, 64, 32, 0, 0, true},
    {3, 1, 1, 320, 320, 0, 0},
    {9, 4, 2, 64, 32, 0, 0, true, 1},
    {5, 3, 1, 64, 32, 0, 0, false, 0, 3},
    {3, 2, 1, 64, 32, 0, 0, true, 0, 2},  // batch rows
};

template <typename T>
void check_everything() {
  for (const Shape& shape : kShapes)
    for (int flags = 0; flags < 16; flags++) compare<T>(shape, flags & 1, flags & 2, flags & 4, flags & 8);
}

}  // namespace

CASE(every_layout_forward_and_backward) {
  check_everything<float>();
  check_everything<half_t>();
  check_everything<bf16_t>();
}

CASE(several_heads_per_thread) {
  const Shape two{260, 5, 3, 128, 128, 0, 0, false, 1},
      four{1030, 5, 3, 128, 128, 0, 0, false, 1};  // enough work for it; and a rest
  compare<bf16_t>(two, false, false, true);
  compare<bf16_t>(two, true, true, false, true);
  compare<bf16_t>(four, false, true, true, true);
  compare<bf16_t>(four, true, false, false);
}

CASE(positions_outside_the_table) {
  // One token in the table, one that is not, for a kernel of one warp's heads and a wide one. Rotated features are NaN, the
  // others as they would be; backward, no rotated gradient comes through, NaN included.
  for (int head_dim : {16, 320}) {
    const size_t size = size_t(2 * head_dim);
    std::vector<float> x(size, 1), y(size), dx(size), g(size, NAN), weight(size_t(head_dim), 1), weight_grad(weight), partial;
    for (int i = 0; i < head_dim; i++) g[size_t(i)] = 1;
    for (int i = 8; i < head_dim; i++) g[size_t(head_dim + i)] = 0;
    const std::vector<float> cos(4, 1), sin(4, 0);
    const std::vector<int64_t> ids = {0, 1};
    QkNormRopeParams p;
    p.rope.tokens = 2, p.rope.head_dim = head_dim, p.rope.rotary_dim = 8;
    p.rope.q = {x.data(), y.data(), 1, 0, head_dim, head_dim, 0, head_dim, head_dim};
    p.rope.cos = cos.data(), p.rope.sin = sin.data(), p.rope.table_rows = 1;
    p.rope.position_ids = ids.data(), p.rope.position_token = 1;
    p.q_weight = weight.data();
    CHECK_EQ(qk_norm_rope_cuda(p, nullptr), cudaSuccess);
    for (int i = 0; i < int(size); i++) CHECK_EQ(std::isnan(y[size_t(i)]), i >= head_dim && i < head_dim + 8);
    p.rope.transposed = true;
    p.rope.q.out = dx.data();
    p.q_grad = p.rope.q, p.q_grad.in = g.data();
    qk_norm_rope_cuda_partials(p);
    partial.resize(size_t(p.q_partials * head_dim));
    p.q_partial = partial.data(), p.q_weight_grad = weight_grad.data();
    CHECK_EQ(qk_norm_rope_cuda(p, nullptr), cudaSuccess);
    for (int i = head_dim; i < int(size); i++) CHECK_EQ(dx[size_t(i)], 0.f);
    for (float d : weight_grad) CHECK(!std::isnan(d));
  }
}

// A table of two rows that would be misread (see RopeTable), or not. The first token has position 0. Kernels of one warp's heads,
// and wide ones.
CASE(misread_tables) {
  enum Columns { half, halves, neighbours };
  for (int head_dim : {16, 320})
    for (RopeTable read : {RopeTable::guessed, RopeTable::full})
      for (Columns columns : {half, halves, neighbours})
        for (int flags = 0; flags < 8; flags++) {
          const bool interleaved = flags & 1, mrope = flags & 2, across = flags & 4, full = read == RopeTable::full;
          const bool faulty = full ? columns != (interleaved ? neighbours : halves) : columns != half;
          constexpr int kTurning = 8;
          const int width = full ? kTurning : kTurning / 2;
          const size_t size = size_t(2 * head_dim);
          std::vector<float> x(size), y(size), dx(size), g(size), weight(size_t(head_dim), 1), weight_grad(weight), partial;
          for (size_t i = 0; i < size; i++) x[i] = float(i % 5) + 1, g[i] = float(i % 7) + 1;
          std::vector<float> cos(size_t(2 * width), 1), sin(size_t(2 * width), 0);
          for (int i = 0; i < width; i++) {
            const int angle = columns == half ? i : columns == halves ? i % (width / 2) : i / 2;
            cos[size_t(width + i)] = std::cos(float(angle + 1)), sin[size_t(width + i)] = std::sin(float(angle + 1));
          }
          const std::vector<int64_t> ids = {0, 1, 0, 1, 0, 1};
          QkNormRopeParams p;
          p.across_heads = across;
          p.rope.tokens = 2, p.rope.head_dim = head_dim, p.rope.rotary_dim = kTurning, p.rope.interleaved = interleaved;
          p.rope.q = {x.data(), y.data(), 1, 0, head_dim, head_dim, 0, head_dim, head_dim};
          p.rope.cos = cos.data(), p.rope.sin = sin.data(), p.rope.table_rows = 2, p.rope.cos_row = p.rope.sin_row = width;
          p.rope.table = read, p.rope.table_step = full && interleaved ? 2 : 1;
          p.rope.position_ids = ids.data(), p.rope.position_axis = 2, p.rope.position_token = 1;
          p.rope.mrope = mrope;
          p.rope.mrope_section[0] = 2, p.rope.mrope_section[1] = p.rope.mrope_section[2] = 1;
          p.q_weight = weight.data();
          CHECK_EQ(qk_norm_rope_cuda(p, nullptr), cudaSuccess);
          p.rope.transposed = true;
          p.rope.q.out = dx.data();
          p.q_grad = p.rope.q, p.q_grad.in = g.data();
          qk_norm_rope_cuda_partials(p);
          partial.resize(size_t(p.q_partials * head_dim));
          p.q_partial = partial.data(), p.q_weight_grad = weight_grad.data();
          CHECK_EQ(qk_norm_rope_cuda(p, nullptr), cudaSuccess);
          int faults = 0;
          for (int i = 0; i < int(size); i++) {
            const bool turns = i % head_dim < kTurning, bad = std::isnan(y[size_t(i)]);
            faults += bad;
            if (!faulty || !turns) CHECK(!bad);
            else if (!full && i < head_dim) CHECK(bad);  // of a full-width table, only pairs of two numbers
            CHECK(!std::isnan(dx[size_t(i)]));
          }
          CHECK_EQ(faults > 0, faulty);
          for (int i = 0; i < head_dim; i++) CHECK(weight_grad[size_t(i)] != 0);
        }
}

// The CUDA kernel of RoPE, emulated, against that of the CPU.
#include "rope_launch.h"

#include <cstring>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"

using namespace packops;

namespace {

template <typename T>
constexpr DType kType = std::is_same_v<T, float>    ? DType::f32
                        : std::is_same_v<T, double> ? DType::f64
                        : std::is_same_v<T, half_t> ? DType::f16
                                                    : DType::bf16;

// Axes: sections that end inside vectors, at their ends, and none for two of them; dealt out in turn, of documents.
enum class Positions { counted, documents, given, per_token_table, three_axes, aligned_axes, one_axis, axes_in_turn };
constexpr Positions kPositions[] = {Positions::counted,         Positions::documents,   Positions::given,
                                    Positions::per_token_table, Positions::three_axes,  Positions::aligned_axes,
                                    Positions::one_axis,        Positions::axes_in_turn};

struct Shape {
  int64_t batch, tokens, q_heads, k_heads;
  int head_dim, rotary_dim, offset;
  int64_t gap;  // between heads: 0 keeps vectors aligned
  bool heads_outer = false;
};

template <typename T>
struct Side {
  std::vector<T> in, out;
  RopeHeads heads;
  Side(const Shape& s, int64_t count, check::Random& random)
      : in(size_t(s.batch * s.tokens * count * (s.head_dim + s.gap)) + 8), out(in) {
    for (T& x : in) x = from_float<T>(float(random.normal()));
    heads.heads = count;
    const int64_t head = s.head_dim + s.gap, batch = s.tokens * count * head;
    heads.in_batch = heads.out_batch = batch;
    heads.in_token = heads.out_token = s.heads_outer ? head : count * head;
    heads.in_head = heads.out_head = s.heads_outer ? s.tokens * head : head;
  }
};

// Table: a type of cosines and sines; shift: numbers by which they miss the alignment of a vector.
template <typename T, typename Table = float>
void compare(const Shape& s, Positions positions, bool interleaved, bool transposed, bool in_place, int shift = 0,
             bool full_width = false) {
  constexpr int64_t kRows = 64;
  check::Random random{uint64_t(s.tokens * 100 + s.head_dim)};
  Side<T> q(s, s.q_heads, random), k(s, s.k_heads, random);
  const int64_t all = s.batch * s.tokens, width = s.rotary_dim / 2, cos_row = full_width ? 2 * width : width,
                sin_row = cos_row + 8;
  std::vector<Table> cos(size_t(std::max(kRows, all) * cos_row + shift)), sin(size_t(std::max(kRows, all) * sin_row + shift));
  for (auto* table : {&cos, &sin})
    for (Table& x : *table) {
      const double number = 2 * random.uniform() - 1;
      if constexpr (std::is_same_v<Table, double>) x = number;
      else x = from_float<Table>(float(number));
    }
  std::vector<int64_t> ids(size_t(3 * all));
  for (int64_t& id : ids) id = random.below(kRows);
  std::vector<int32_t> cu_seqlens = {0, 0, int32_t(all / 3), int32_t(all - all / 5)};  // an empty document, and padding

  RopeParams p;
  p.dtype = kType<T>;
  p.batch = s.batch, p.tokens = s.tokens;
  p.head_dim = s.head_dim, p.rotary_dim = s.rotary_dim, p.rotary_offset = s.offset;
  p.interleaved = interleaved, p.transposed = transposed, p.in_place = in_place;
  p.cos = cos.data() + shift, p.sin = sin.data() + shift, p.table_dtype = kType<Table>;
  p.table_rows = kRows;
  p.cos_row = cos_row, p.sin_row = sin_row;
  p.table_step = full_width && interleaved ? 2 : 1;
  if (positions == Positions::documents || positions == Positions::axes_in_turn) {
    p.axis = {cu_seqlens.data(), DType::i32, 3};
  }
  if (positions == Positions::per_token_table) {
    p.per_token_table = true;
    p.table_rows = all;
    p.cos_batch = s.tokens * cos_row, p.sin_batch = s.tokens * sin_row;
  } else if (positions != Positions::counted && positions != Positions::documents) {
    p.position_ids = ids.data();
    p.position_axis = all, p.position_batch = s.tokens, p.position_token = 1;
    p.mrope = positions != Positions::given;
    p.mrope_interleaved = positions == Positions::axes_in_turn;
    const int third = positions == Positions::one_axis       ? 0
                      : positions == Positions::aligned_axes ? int(width) / 24 * 8
                                                             : int(width) / 3;
    p.mrope_section[0] = int(width) - 2 * third, p.mrope_section[1] = p.mrope_section[2] = third;
  }
  std::vector<T> results[2][2];
  for (bool cuda : {false, true}) {
    Side<T> sides[2] = {q, k};
    p.q = q.heads, p.k = k.heads;
    RopeHeads* heads[2] = {&p.q, &p.k};
    for (int i : {0, 1}) {
      heads[i]->in = sides[i].in.data();
      heads[i]->out = in_place ? sides[i].in.data() : sides[i].out.data();
    }
    if (cuda) CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
    else rope_cpu(p, 0, all);
    for (int i : {0, 1}) results[cuda][i] = in_place ? sides[i].in : sides[i].out;
  }
  for (int i : {0, 1}) {
    double worst = 0;  // the compilers may fuse other products
    for (size_t j = 0; j < results[0][i].size(); j++)
      worst = std::max(worst, std::abs(double(to_float(results[0][i][j])) - to_float(results[1][i][j])));
    CHECK(worst <= (sizeof(T) == 4 ? 1e-6 : std::is_same_v<T, half_t> ? 0x1p-8 : 0x1p-5));
  }
}

const Shape kShapes[] = {
    {1, 9, 4, 2, 64, 64, 0, 0},          {2, 5, 3, 1, 96, 32, 64, 0},  {1, 7, 5, 0, 36, 12, 4, 1},
    {2, 17, 4, 4, 128, 128, 0, 0, true}, {1, 40, 2, 1, 256, 64, 0, 0}, {1, 1, 1, 1, 2, 2, 0, 0},
};

template <typename T>
void check_everything() {
  for (const Shape& shape : kShapes)
    for (Positions positions : kPositions)
      for (int flags = 0; flags < 8; flags++) compare<T>(shape, positions, flags & 1, flags & 2, flags & 4);
}

}  // namespace

CASE(every_layout_and_position) {
  check_everything<float>();
  check_everything<half_t>();
  check_everything<bf16_t>();
}

CASE(tables_of_every_type_and_alignment) {
  const auto check = [](auto table) {
    using Table = decltype(table);
    for (const Shape& shape : {kShapes[0], kShapes[2], kShapes[3]})
      for (Positions positions : {Positions::given, Positions::three_axes, Positions::axes_in_turn})
        for (bool interleaved : {false, true})
          for (int shift : {0, 1}) {
            compare<bf16_t, Table>(shape, positions, interleaved, false, false, shift);
            compare<float, Table>(shape, positions, interleaved, true, false, shift);
          }
  };
  check(float{});
  check(half_t{});
  check(bf16_t{});
  check(double{});
}

CASE(full_width_tables) {
  for (const Shape& shape : kShapes)
    for (Positions positions : {Positions::documents, Positions::per_token_table, Positions::axes_in_turn})
      for (bool interleaved : {false, true}) {
        compare<bf16_t, bf16_t>(shape, positions, interleaved, false, false, 0, true);
        compare<float>(shape, positions, interleaved, true, true, 0, true);
      }
}

CASE(every_launch_gives_the_same_bits) {
  constexpr int kTokens = 11, kDim = 64;
  check::Random random{3};
  for (auto [q_heads, k_heads] : {std::pair{5, 3}, {8, 2}, {3, 0}, {1, 1}}) {
    std::vector<bf16_t> q(size_t(kTokens * q_heads * kDim)), k(size_t(kTokens * k_heads * kDim));
    std::vector<float> cos(kTokens * kDim / 2), sin(cos.size());
    for (auto* side : {&q, &k})
      for (bf16_t& x : *side) x = from_float<bf16_t>(float(random.normal()));
    for (float& c : cos) c = float(2 * random.uniform() - 1);
    for (float& x : sin) x = float(2 * random.uniform() - 1);
    std::vector<int64_t> ids(3 * kTokens);
    for (int64_t& id : ids) id = random.below(kTokens);
    RopeParams p;
    p.dtype = DType::bf16;
    p.tokens = p.table_rows = kTokens, p.head_dim = p.rotary_dim = kDim;
    p.cos = cos.data(), p.sin = sin.data(), p.cos_row = p.sin_row = kDim / 2;
    const auto run = [&](const auto&... choice) {
      std::vector<bf16_t> q_out(q.size()), k_out(k.size());
      const auto heads = [](const auto& in, auto& out, int64_t count) {
        return RopeHeads{in.data(), out.data(), count, 0, count * kDim, kDim, 0, count * kDim, kDim};
      };
      p.q = heads(q, q_out, q_heads), p.k = heads(k, k_out, k_heads);
      CHECK_EQ(rope_cuda_as(p, choose_rope_launch(p, {.multiprocessors = 132}, choice...), nullptr), cudaSuccess);
      q_out.insert(q_out.end(), k_out.begin(), k_out.end());
      return q_out;
    };
    const int32_t cu_seqlens[] = {0, 0, 4, 9};
    enum Kind { indexed, interleaved, documents, mrope };
    for (Kind kind : {indexed, interleaved, documents, mrope}) {
      p.interleaved = kind == interleaved;
      p.axis = {kind == documents ? cu_seqlens : nullptr, DType::i32, 3};
      p.mrope = p.mrope_interleaved = kind == mrope;
      if (p.mrope) {
        p.position_ids = ids.data(), p.position_axis = kTokens, p.position_token = 1;
        p.mrope_section[0] = 12, p.mrope_section[1] = p.mrope_section[2] = 10;
      }
      const std::vector<bf16_t> want = run();
      for (int unroll : {1, 2, 4})
        for (int threads : {32, 128, 512})
          for (int inner : {0, 1}) {
            const std::vector<bf16_t> got = run(unroll, threads, inner);
            CHECK(std::memcmp(got.data(), want.data(), got.size() * sizeof(bf16_t)) == 0);
          }
    }
  }
}

CASE(positions_outside_the_table_are_nan) {
  std::vector<float> x(3 * 8, 1), y(x), cos(2 * 4, 1), sin(2 * 4, 0);
  const std::vector<int64_t> ids = {0, 2, -1};
  RopeParams p;
  p.tokens = 3, p.head_dim = p.rotary_dim = 8;
  p.q = {x.data(), y.data(), 1, 24, 8, 8, 24, 8, 8};
  p.cos = cos.data(), p.sin = sin.data(), p.table_rows = 2, p.cos_row = p.sin_row = 4;
  p.position_ids = ids.data(), p.position_axis = p.position_batch = 3, p.position_token = 1;
  CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
  for (int i = 0; i < 24; i++) CHECK_EQ(std::isnan(y[i]), i >= 8);
}

CASE(of_three_positions_one_outside_the_table_is_enough) {
  for (bool transposed : {false, true}) {
    std::vector<float> x(4 * 10, transposed ? NAN : 1), y(x.size(), 7), cos(2 * 4, 1), sin(2 * 4, 0);
    const std::vector<int64_t> ids = {0, 2, 1, 1, 1, 1, -1, 0, 0, 1, 1, 9};  // tokens 1, 2 and 3, by axis 0, 1 and 2
    RopeParams p;
    p.tokens = 4, p.head_dim = 10, p.rotary_dim = 8, p.transposed = transposed;
    p.q = {x.data(), y.data(), 1, 40, 10, 10, 40, 10, 10};
    p.cos = cos.data(), p.sin = sin.data(), p.table_rows = 2, p.cos_row = p.sin_row = 4;
    p.position_ids = ids.data(), p.position_axis = p.position_batch = 4, p.position_token = 1;
    p.mrope = true;
    p.mrope_section[0] = 2, p.mrope_section[1] = p.mrope_section[2] = 1;
    CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
    for (int i = 0; i < 40; i++) {
      const bool turns = i % 10 < 8, bad = i >= 10;
      if (turns && bad && transposed) CHECK_EQ(y[i], 0.f);
      else CHECK_EQ(std::isnan(y[i]), transposed || (turns && bad));
    }
  }
}

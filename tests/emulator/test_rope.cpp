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

constexpr int64_t kOutGap = 8;  // more between heads of the output than of the input: aligned alike, not the same strides

template <typename T>
struct Side {
  std::vector<T> in, out;
  RopeHeads heads;
  Side(const Shape& s, int64_t count, bool in_place, check::Random& random) {
    heads.heads = count;
    const int64_t head = s.head_dim + s.gap, out_head = head + (in_place ? 0 : kOutGap);
    in.resize(size_t(s.batch * s.tokens * count * head) + 8);
    out.resize(size_t(s.batch * s.tokens * count * out_head) + 8, from_float<T>(7));
    for (T& x : in) x = from_float<T>(float(random.normal()));
    heads.in_batch = s.tokens * count * head, heads.out_batch = s.tokens * count * out_head;
    heads.in_token = s.heads_outer ? head : count * head, heads.out_token = s.heads_outer ? out_head : count * out_head;
    heads.in_head = s.heads_outer ? s.tokens * head : head, heads.out_head = s.heads_outer ? s.tokens * out_head : out_head;
  }
};

// Table: a type of cosines and sines; shift: numbers by which they miss the alignment of a vector.
template <typename T, typename Table = float>
void compare(const Shape& s, Positions positions, bool interleaved, bool transposed, bool in_place, int shift = 0,
             bool full_width = false) {
  constexpr int64_t kRows = 64;
  check::Random random{uint64_t(s.tokens * 100 + s.head_dim)};
  Side<T> q(s, s.q_heads, in_place, random), k(s, s.k_heads, in_place, random);
  const int64_t all = s.batch * s.tokens, width = s.rotary_dim / 2, cos_row = full_width ? 2 * width : width,
                sin_row = cos_row + 8;
  std::vector<Table> cos(size_t(std::max(kRows, all) * cos_row + shift)), sin(size_t(std::max(kRows, all) * sin_row + shift));
  for (auto* table : {&cos, &sin})
    for (Table& x : *table) {
      const double number = 2 * random.uniform() - 1;
      if constexpr (std::is_same_v<Table, double>) x = number;
      else x = from_float<Table>(float(number));
    }
  if (full_width)
    for (int64_t row = 0; row < std::max(kRows, all); row++)
      for (int i = 0; i < width; i++) {
        const int64_t one = shift + (interleaved ? 2 * i : i), other = interleaved ? one + 1 : one + width;
        cos[size_t(row * cos_row + other)] = cos[size_t(row * cos_row + one)];
        sin[size_t(row * sin_row + other)] = sin[size_t(row * sin_row + one)];
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
  p.table = full_width ? RopeTable::full : width % 2 == 0 ? RopeTable::guessed : RopeTable::half;
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

namespace {

// Tables of real angles. Position 0 turns nothing, and some tokens have it.
enum class Columns { half, halves, neighbours };

template <typename Table>
std::vector<Table> table_of(Columns columns, int width, int64_t rows, bool sines) {
  std::vector<Table> table(size_t(rows * width));
  for (int64_t row = 0; row < rows; row++)
    for (int i = 0; i < width; i++) {
      const int frequency = columns == Columns::half ? i : columns == Columns::halves ? i % (width / 2) : i / 2;
      const double angle = double(row) * std::pow(100., -frequency / double(width)),
                   number = sines ? std::sin(angle) : std::cos(angle);
      if constexpr (std::is_same_v<Table, double>) table[size_t(row * width + i)] = number;
      else table[size_t(row * width + i)] = from_float<Table>(float(number));
    }
  return table;
}

// A table of `width` columns read as `read`: are rotated features of the first token NaN, and all that do not turn what they were?
template <typename T, typename Table>
void check_read(int head_dim, int rotary_dim, int offset, Columns columns, RopeTable read, bool interleaved, Positions positions,
                bool faulty, int64_t rows = 9) {
  constexpr int64_t kTokens = 9;
  const int width = read == RopeTable::full ? rotary_dim : rotary_dim / 2;
  const auto cos = table_of<Table>(columns, width, rows, false), sin = table_of<Table>(columns, width, rows, true);
  const std::vector<int32_t> cu_seqlens = {0, 3, 7};  // the last two tokens are padding
  const std::vector<int64_t> ids = {0, 3, 1, 4, 1, 5, 8, 2, 6, 0, 5, 3, 5, 8, 8, 7, 8, 3, 0, 8, 4, 6, 2, 6, 4, 3, 3};
  for (bool transposed : {false, true}) {
    std::vector<T> x(size_t(kTokens * 3 * head_dim), from_float<T>(1)), y(x);
    for (size_t i = 0; i < x.size(); i++) x[i] = from_float<T>(float(int(i % 7) + 1));
    RopeParams p;
    p.dtype = kType<T>, p.table_dtype = kType<Table>;
    p.tokens = kTokens, p.head_dim = head_dim, p.rotary_dim = rotary_dim, p.rotary_offset = offset;
    p.interleaved = interleaved, p.transposed = transposed;
    p.q = {x.data(), y.data(), 3, 0, 3 * head_dim, head_dim, 0, 3 * head_dim, head_dim};
    p.cos = cos.data(), p.sin = sin.data(), p.table_rows = rows, p.cos_row = p.sin_row = width;
    p.table = read;
    p.table_step = read == RopeTable::full && interleaved ? 2 : 1;
    if (positions == Positions::documents) p.axis = {cu_seqlens.data(), DType::i32, 2};
    if (positions == Positions::given || positions == Positions::three_axes)
      p.position_ids = ids.data(), p.position_axis = kTokens, p.position_token = 1;
    if (positions == Positions::per_token_table) p.per_token_table = true;
    if (positions == Positions::three_axes) {
      p.mrope = true;
      p.mrope_section[0] = rotary_dim / 2 - 2, p.mrope_section[1] = p.mrope_section[2] = 1;
    }
    CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
    int faults = 0, wrong = 0, zeros = 0;
    for (int64_t i = 0; i < int64_t(y.size()); i++) {
      const int64_t token = i / (3 * head_dim), feature = i % head_dim - offset;
      const bool turns = feature >= 0 && feature < rotary_dim && !(p.axis.cu_seqlens && token >= 7);
      const float value = to_float(y[size_t(i)]);
      if (!turns) wrong += value != to_float(x[size_t(i)]);
      else if (faulty && !transposed) faults += std::isnan(value);
      else wrong += std::isnan(value), zeros += value == 0;
      if (turns && faulty && !transposed && token == 0 && read == RopeTable::guessed) wrong += !std::isnan(value);
    }
    CHECK_EQ(wrong, 0);
    if (faulty && !transposed) CHECK(faults > 0);
    if (!faulty) CHECK(zeros < 4);
  }
}

// Heads of every kernel: vectors of 16 bytes that all turn, the same with features that pass, and narrow ones.
template <typename T, typename Table>
void check_reads(Columns columns, RopeTable read, bool interleaved, bool faulty, int64_t rows = 9) {
  for (Positions positions :
       {Positions::counted, Positions::documents, Positions::given, Positions::per_token_table, Positions::three_axes}) {
    check_read<T, Table>(64, 64, 0, columns, read, interleaved, positions, faulty, rows);
    check_read<T, Table>(96, 64, 8, columns, read, interleaved, positions, faulty, rows);
    check_read<T, Table>(21, 12, 4, columns, read, interleaved, positions, faulty, rows);
  }
}

}  // namespace

CASE(a_full_width_table_taken_for_half_a_table_is_a_fault) {
  for (Columns columns : {Columns::half, Columns::halves, Columns::neighbours})
    for (bool interleaved : {false, true}) {
      const bool faulty = columns != Columns::half;
      check_reads<bf16_t, float>(columns, RopeTable::guessed, interleaved, faulty);
      check_reads<bf16_t, bf16_t>(columns, RopeTable::guessed, interleaved, faulty);
      check_reads<float, double>(columns, RopeTable::guessed, interleaved, faulty);
      check_reads<half_t, half_t>(columns, RopeTable::half, interleaved, false);  // said to be half a table
    }
}

CASE(a_pair_with_two_numbers_in_a_full_width_table_is_a_fault) {
  for (Columns columns : {Columns::half, Columns::halves, Columns::neighbours})
    for (bool interleaved : {false, true}) {
      const bool faulty = columns != (interleaved ? Columns::neighbours : Columns::halves);
      check_reads<bf16_t, float>(columns, RopeTable::full, interleaved, faulty);
      check_reads<half_t, half_t>(columns, RopeTable::full, interleaved, faulty);
      check_reads<float, double>(columns, RopeTable::full, interleaved, faulty);
    }
}

// A table of position 0 alone turns nothing, however it is read. Of a table of another single row, that row decides.
CASE(one_row_of_a_guessed_table) {
  for (int position : {0, 5})
    for (Columns columns : {Columns::half, Columns::halves, Columns::neighbours}) {
      auto cos = table_of<float>(columns, 16, 6, false), sin = table_of<float>(columns, 16, 6, true);
      std::vector<float> x(32, 1), y(x);
      RopeParams p;
      p.tokens = 1, p.head_dim = p.rotary_dim = 32;
      p.q = {x.data(), y.data(), 1, 32, 32, 32, 32, 32, 32};
      p.cos = cos.data() + position * 16, p.sin = sin.data() + position * 16, p.table_rows = 1, p.cos_row = p.sin_row = 16;
      p.per_token_table = true;
      p.table = RopeTable::guessed;
      CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
      for (float value : y) CHECK_EQ(std::isnan(value), position != 0 && columns != Columns::half);
    }
}

// Two batch rows with tables of their own: half a table, and a full-width one.
CASE(each_batch_row_of_a_table_per_token_is_asked_for_itself) {
  constexpr int kTokens = 6, kWidth = 16;
  std::vector<float> x(2 * kTokens * 32, 1), y(x), cos, sin;
  for (Columns columns : {Columns::half, Columns::halves})
    for (auto [table, sines] : {std::pair{&cos, false}, {&sin, true}}) {
      const auto rows = table_of<float>(columns, kWidth, kTokens, sines);
      table->insert(table->end(), rows.begin(), rows.end());
    }
  for (int first : {0, 1}) {  // the table of the first batch row
    RopeParams p;
    p.batch = 2, p.tokens = kTokens, p.head_dim = p.rotary_dim = 32;
    p.q = {x.data(), y.data(), 1, kTokens * 32, 32, 32, kTokens * 32, 32, 32};
    const int64_t start = first * kTokens * kWidth, step = (1 - 2 * first) * kTokens * kWidth;
    p.cos = cos.data() + start, p.sin = sin.data() + start, p.cos_batch = p.sin_batch = step;
    p.cos_row = p.sin_row = kWidth, p.table_rows = kTokens, p.per_token_table = true, p.table = RopeTable::guessed;
    CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
    for (size_t i = 0; i < y.size(); i++) CHECK_EQ(std::isnan(y[i]), (int(i) / (kTokens * 32) == 1) != (first == 1));
  }
}

// Half a table of an image: one half of the columns are the angles of a patch's row, the other those of its column, of the same
// frequencies. On the diagonal it holds every number twice, as do tokens before the image, at (0, 0).
CASE(patches_on_the_diagonal_of_an_image_are_no_fault) {
  for (int side : {2, 3, 5, 8})
    for (int before : {0, 1, 5})
      for (bool neighbours : {false, true}) {
        constexpr int kWidth = 16;
        const int tokens = before + side * side;
        std::vector<float> cos(size_t(tokens * kWidth), 1), sin(size_t(tokens * kWidth), 0);
        for (int t = before; t < tokens; t++)
          for (int i = 0; i < kWidth; i++) {
            const int place[] = {(t - before) / side, (t - before) % side};
            const int axis = neighbours ? i % 2 : i / (kWidth / 2), frequency = neighbours ? i / 2 : i % (kWidth / 2);
            const double angle = place[axis] * std::pow(100., -frequency / 8.);
            cos[size_t(t * kWidth + i)] = float(std::cos(angle)), sin[size_t(t * kWidth + i)] = float(std::sin(angle));
          }
        for (bool per_token : {false, true}) {
          std::vector<float> x(size_t(tokens * 32), 1), y(x);
          RopeParams p;
          p.tokens = tokens, p.head_dim = p.rotary_dim = 32;
          p.q = {x.data(), y.data(), 1, 0, 32, 32, 0, 32, 32};
          p.cos = cos.data(), p.sin = sin.data(), p.table_rows = tokens, p.cos_row = p.sin_row = kWidth;
          p.per_token_table = per_token;
          p.table = RopeTable::guessed;
          CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
          for (float value : y) CHECK(!std::isnan(value));
        }
      }
}

// Frequencies of 0 at the end, as of proportional scaling, and sines that a 16-bit type cannot hold.
CASE(columns_that_turn_nothing_are_no_fault) {
  constexpr int kWidth = 16, kRows = 5;
  for (int turning : {1, 2, 5, 8}) {
    std::vector<half_t> cos(kRows * kWidth, from_float<half_t>(1)), sin(kRows * kWidth, from_float<half_t>(0));
    for (int row = 0; row < kRows; row++)
      for (int i = 0; i < turning; i++) {
        const double angle = row * std::pow(1e8, -i / double(kWidth));
        cos[size_t(row * kWidth + i)] = from_float<half_t>(float(std::cos(angle)));
        sin[size_t(row * kWidth + i)] = from_float<half_t>(float(std::sin(angle)));
      }
    std::vector<float> x(kRows * 32, 1), y(x);
    RopeParams p;
    p.tokens = kRows, p.head_dim = p.rotary_dim = 32;
    p.q = {x.data(), y.data(), 1, 0, 32, 32, 0, 32, 32};
    p.cos = cos.data(), p.sin = sin.data(), p.table_dtype = DType::f16, p.table_rows = kRows, p.cos_row = p.sin_row = kWidth;
    p.table = RopeTable::guessed;
    CHECK_EQ(rope_cuda(p, nullptr), cudaSuccess);
    for (float value : y) CHECK(!std::isnan(value));
  }
}

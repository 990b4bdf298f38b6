// RoPE on the CPU against its formula in double precision, through the plain interface of rope.h; and how rope.cu cuts its work.
#include <algorithm>
#include <array>

#include "rope_launch.h"

#define PACKOPS_SIMD_FILE "rope_simd.h"
#include "common/simd_targets.h"

#include "isa.h"

using namespace packops;

namespace {

template <typename T>
double number(T x) {
  if constexpr (std::is_same_v<T, double>) return x;
  else return to_float(x);
}
template <typename T>
T stored(double x) {
  if constexpr (std::is_same_v<T, double>) return x;
  else return from_float<T>(float(x));
}
template <typename T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::f32
                         : std::is_same_v<T, half_t> ? DType::f16
                         : std::is_same_v<T, bf16_t> ? DType::bf16
                                                     : DType::f64;
// One rounding of the result, and the arithmetic's own.
template <typename T>
constexpr double kTolerance = std::is_same_v<T, float>    ? 3e-7
                              : std::is_same_v<T, half_t> ? 0x1p-11
                              : std::is_same_v<T, bf16_t> ? 0x1p-8
                                                          : 1e-15;

// q alone, with room between its heads and between its tokens, and a table of cosines and sines that are not of one angle: a
// rotation that scales shows which of the two was taken.
template <typename T>
struct Problem {
  static constexpr double kGuard = 77;
  int64_t batch, tokens, heads, head_dim, head_stride, token_stride, rows;
  std::vector<T> in, out;
  std::vector<float> cos, sin;
  std::vector<int64_t> position_ids;
  std::vector<int32_t> cu_seqlens;
  RopeParams p;

  Problem(int64_t batch, int64_t tokens, int64_t heads, int head_dim, int rotary_dim, int offset, int64_t rows, uint64_t seed = 1)
      : batch(batch),
        tokens(tokens),
        heads(heads),
        head_dim(head_dim),
        head_stride(head_dim + 1),
        token_stride(heads * head_stride + 3),
        rows(rows),
        in(batch * tokens * token_stride),
        out(in.size(), stored<T>(kGuard)),
        cos(rows * rotary_dim / 2),
        sin(cos.size()) {
    check::Random random(seed);
    for (T& x : in) x = stored<T>(random.normal());
    for (float& c : cos) c = float(2 * random.uniform() - 1);
    for (float& s : sin) s = float(2 * random.uniform() - 1);
    p.dtype = kDType<T>;
    p.batch = batch;
    p.tokens = tokens;
    p.head_dim = head_dim;
    p.rotary_dim = rotary_dim;
    p.rotary_offset = offset;
    p.table_rows = rows;
    p.cos_row = p.sin_row = rotary_dim / 2;
  }

  void prepare() {
    p.q = {in.data(),    out.data(), heads, tokens * token_stride, token_stride, head_stride, tokens * token_stride,
           token_stride, head_stride};
    p.cos = cos.data();
    p.sin = sin.data();
    if (!position_ids.empty()) {
      p.position_ids = position_ids.data();
      p.position_axis = batch * tokens;
      p.position_batch = tokens;
      p.position_token = 1;
    }
    if (!cu_seqlens.empty()) {
      p.axis = {cu_seqlens.data(), DType::i32, int64_t(cu_seqlens.size()) - 1};
    }
  }
  void run() {
    prepare();
    const int64_t all = batch * tokens;
    for (auto [begin, end] : {std::pair{int64_t(0), all / 3}, std::pair{all / 3, all}})
      rope_cpu(p, begin, end);  // as two threads would
  }

  double at(const std::vector<T>& data, int64_t t, int64_t h, int64_t i) const {
    return number(data[t * token_stride + h * head_stride + i]);
  }

  // Flattened token t turned by the row position(pair) of the table.
  template <typename F>
  void check_token(int64_t t, F position) const {
    const int half = p.rotary_dim / 2, begin = p.rotary_offset;
    double worst = 0;
    for (int64_t h = 0; h < heads; h++) {
      for (int i = 0; i < head_dim; i++)
        if (i < begin || i >= begin + p.rotary_dim) worst = std::max(worst, std::abs(at(out, t, h, i) - at(in, t, h, i)));
      CHECK_EQ(worst, 0.0);  // what does not turn passes through bit for bit
      for (int i = 0; i < half; i++) {
        const int first = begin + (p.interleaved ? 2 * i : i), second = p.interleaved ? first + 1 : first + half;
        const double c = cos[position(i) * half + i], s = (p.transposed ? -1 : 1) * sin[position(i) * half + i];
        const double x = at(in, t, h, first), y = at(in, t, h, second);
        CHECK_CLOSE(at(out, t, h, first), x * c - y * s, 2 * kTolerance<T>);
        CHECK_CLOSE(at(out, t, h, second), y * c + x * s, 2 * kTolerance<T>);
      }
      if (h + 1 < heads) CHECK_EQ(at(out, t, h, head_dim), kGuard);  // between the heads lies someone else's memory
    }
  }
  void check_untouched(int64_t t) const {
    for (int64_t h = 0; h < heads; h++)
      for (int i = 0; i < head_dim; i++) CHECK_EQ(at(out, t, h, i), at(in, t, h, i));
  }
};

// Rotary widths around every vector, in the middle of a head.
template <typename T>
void check_widths() {
  for (int rotary : {2, 6, 8, 16, 18, 32, 34, 64, 70, 128}) {
    for (bool interleaved : {false, true}) {
      for (bool transposed : {false, true}) {
        Problem<T> problem(1, 3, 2, rotary + 5, rotary, 2, 3);
        problem.p.interleaved = interleaved;
        problem.p.transposed = transposed;
        problem.run();
        for (int64_t t = 0; t < 3; t++) problem.check_token(t, [&](int) { return t; });
      }
    }
  }
}

}  // namespace

CASE(turns_pairs_as_the_formula_says) {
  check_widths<float>();
  check_widths<double>();
  check_widths<half_t>();
  check_widths<bf16_t>();
}

CASE(every_instruction_set_turns_alike) {
  for_each_isa([](CpuIsa isa) {
    for (int rotary : {2, 16, 30, 64, 126}) {
      for (bool interleaved : {false, true}) {
        Problem<bf16_t> problem(1, 1, 3, rotary + 2, rotary, 1, 1);
        problem.p.interleaved = interleaved;
        problem.prepare();
        std::vector<float> c(rotary), s(rotary);
        for (int i = 0; i < rotary / 2; i++) {  // as fill_coefficients lays them out
          if (interleaved) c[2 * i] = c[2 * i + 1] = problem.cos[i], s[2 * i] = -problem.sin[i], s[2 * i + 1] = problem.sin[i];
          else c[i] = problem.cos[i], s[i] = problem.sin[i];
        }
        PACKOPS_OF_ISA(isa, rope_heads_any)(problem.p, problem.p.q, 0, 0, c.data(), s.data());
        problem.check_token(0, [](int) { return 0; });
      }
    }
  });
}

CASE(positions_restart_in_every_document) {
  Problem<float> problem(2, 5, 2, 8, 8, 0, 4);  // two batch rows are one axis of ten tokens
  problem.cu_seqlens = {0, 3, 3, 7, 8};
  problem.run();
  const std::array<int, 8> want = {0, 1, 2, 0, 1, 2, 3, 0};
  for (int64_t t = 0; t < 8; t++) problem.check_token(t, [&](int) { return want[t]; });
  for (int64_t t : {8, 9}) problem.check_untouched(t);
}

CASE(positions_count_in_every_batch_row) {
  Problem<float> problem(3, 4, 1, 6, 4, 1, 4);
  problem.run();
  for (int64_t t = 0; t < 12; t++) problem.check_token(t, [&](int) { return t % 4; });
}

CASE(given_positions_are_taken_and_documents_still_end) {
  Problem<float> problem(2, 3, 1, 6, 6, 0, 9);
  problem.position_ids = {8, 0, 3, 3, 100, -5};
  problem.cu_seqlens = {0, 2, 4};  // the last two ids belong to padding, and are never looked up
  problem.run();
  CHECK(rope_check_cpu(problem.p).token < 0);
  for (int64_t t = 0; t < 4; t++) problem.check_token(t, [&](int) { return problem.position_ids[t]; });
  for (int64_t t : {4, 5}) problem.check_untouched(t);
}

CASE(three_axes_turn_their_own_pairs) {
  const int half = 12;
  for (bool interleaved : {false, true}) {
    Problem<float> problem(1, 2, 1, 2 * half, 2 * half, 0, 50);
    problem.p.mrope = true;
    problem.p.mrope_interleaved = interleaved;
    const int section[3] = {6, 4, 2};
    std::copy(section, section + 3, problem.p.mrope_section);
    problem.position_ids = {1, 2, 11, 12, 21, 22};  // (3, tokens)
    problem.run();
    // By hand: blocks of 6, 4 and 2; or in turn while a section lasts.
    const std::array<int, 12> blocks = {0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2}, turns = {0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 1, 0};
    for (int64_t t : {0, 1})
      problem.check_token(t, [&](int i) { return problem.position_ids[(interleaved ? turns : blocks)[i] * 2 + t]; });
  }
}

CASE(a_row_of_the_table_per_token) {
  Problem<float> problem(2, 3, 1, 4, 4, 0, 6);
  problem.p.per_token_table = true;
  problem.p.cos_batch = problem.p.sin_batch = 3 * 2;
  problem.run();
  for (int64_t t = 0; t < 6; t++) problem.check_token(t, [&](int) { return t; });
}

CASE(in_place_writes_what_turns_and_nothing_else) {
  Problem<float> problem(1, 4, 2, 10, 4, 3, 4);
  Problem<float> apart = problem;
  apart.run();
  problem.p.in_place = true;
  problem.prepare();
  problem.p.q.out = problem.in.data();
  rope_cpu(problem.p, 0, 4);
  for (int64_t t = 0; t < 4; t++)
    for (int64_t h = 0; h < 2; h++)
      for (int i = 0; i < 10; i++) CHECK_EQ(problem.at(problem.in, t, h, i), apart.at(apart.out, t, h, i));
}

CASE(q_and_k_have_their_own_heads_and_strides) {
  Problem<float> q(1, 3, 4, 8, 8, 0, 3, 5), k(1, 3, 1, 8, 8, 0, 3, 6);
  k.cos = q.cos;
  k.sin = q.sin;
  q.prepare();
  k.prepare();
  q.p.k = k.p.q;
  rope_cpu(q.p, 0, 3);
  for (int64_t t = 0; t < 3; t++) {
    q.check_token(t, [&](int) { return t; });
    k.check_token(t, [&](int) { return t; });
  }
}

CASE(positions_outside_the_table_are_found) {
  auto fault = [](std::vector<int64_t> ids, std::vector<int32_t> cu, int64_t rows) {
    Problem<float> problem(1, 4, 1, 4, 4, 0, rows);
    problem.position_ids = std::move(ids);
    problem.cu_seqlens = std::move(cu);
    problem.prepare();
    return rope_check_cpu(problem.p);
  };
  auto is = [](RopeFault got, int64_t token, int64_t position) {
    CHECK_EQ(got.token, token);
    CHECK_EQ(got.position, position);
  };
  is(fault({0, 1, 2, 3}, {}, 4), -1, 0);
  is(fault({0, 1, 4, 9}, {}, 4), 2, 4);
  is(fault({0, -1, 2, 3}, {}, 4), 1, -1);
  is(fault({}, {}, 3), 3, 3);
  is(fault({}, {0, 1, 4}, 3), -1, 0);
  is(fault({}, {0, 1, 4}, 2), 3, 2);
}

// ---- How rope.cu cuts its work.

namespace {

// Dense (tokens, heads, head_dim), or with the heads outside; `address` is where it begins.
RopeParams dense(int64_t tokens, int64_t q_heads, int64_t k_heads, int head_dim, int rotary, int offset, uintptr_t address,
                 bool in_place, bool heads_outer, DType dtype = DType::bf16) {
  RopeParams p;
  p.dtype = dtype;
  p.tokens = tokens;
  p.head_dim = head_dim;
  p.rotary_dim = rotary;
  p.rotary_offset = offset;
  p.in_place = in_place;
  for (auto [side, heads] : {std::pair{&p.q, q_heads}, std::pair{&p.k, k_heads}}) {
    side->heads = heads;
    side->in = side->out = reinterpret_cast<void*>(address);
    side->in_token = side->out_token = heads_outer ? head_dim : heads * head_dim;
    side->in_head = side->out_head = heads_outer ? tokens * head_dim : head_dim;
  }
  return p;
}
constexpr DeviceLimits kDevice = {.multiprocessors = 132};
int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_launch(const RopeParams& p, const RopeLaunch& launch) {
  const int size = size_of(p.dtype);
  const int rotary_vectors = p.rotary_dim / launch.width, passing = p.in_place ? 0 : p.head_dim - p.rotary_dim;
  CHECK(launch.width * size <= 16);
  CHECK(p.rotary_dim / 2 % launch.width == 0 && p.rotary_offset % launch.width == 0 && passing % launch.width == 0);
  for (const RopeHeads* side : {&p.q, &p.k}) {
    if (side->heads == 0) continue;
    CHECK(reinterpret_cast<uintptr_t>(side->in) % (launch.width * size) == 0);
    for (int64_t stride : {side->in_batch, side->in_token, side->in_head}) CHECK(stride % launch.width == 0);
  }
  // Every vector of a head has a lane, and at most one lane is half empty.
  const int vectors = rotary_vectors + passing / launch.width;
  CHECK(2 * launch.lanes - 1 <= vectors && vectors <= 2 * launch.lanes);
  CHECK(launch.unroll == 1 || launch.unroll == 2 || launch.unroll == 4);
  CHECK(launch.unroll <= rope_max_unroll(launch.width * size));
  CHECK_EQ(launch.q_slots, ceil_divide(p.q.heads, launch.unroll));  // no slot has heads of both
  CHECK_EQ(launch.slots, std::max<int64_t>(launch.q_slots + ceil_divide(p.k.heads, launch.unroll), 1));
  // Every lane of every slot of every token has a thread, and no block is empty.
  const auto covers = [](int64_t part, int64_t parts, int64_t all) { CHECK(part * (parts - 1) < all && all <= part * parts); };
  covers(launch.lanes_per_block, launch.lane_chunks, launch.lanes);
  covers(launch.slots_per_block, launch.slot_chunks, launch.slots);
  if (p.tokens > 0) covers(launch.tokens_per_block, launch.token_blocks, p.tokens);
  else CHECK_EQ(launch.token_blocks, 0);
  CHECK(launch.threads() >= 32 && launch.threads() <= kRopeMostThreads);                 // documents are looked up by whole warps
  CHECK((launch.token_inner ? launch.slots_per_block : launch.tokens_per_block) <= 64);  // a block's third dimension
}

}  // namespace

CASE(a_launch_covers_every_item_once) {
  constexpr std::array<std::array<int, 3>, 9> kDims = {{{128, 128, 0},
                                                        {256, 64, 0},
                                                        {192, 64, 128},
                                                        {96, 64, 4},
                                                        {80, 80, 0},
                                                        {7, 6, 1},
                                                        {2, 2, 0},
                                                        {512, 512, 0},
                                                        {4096, 4096, 0}}};
  for (int64_t tokens : {0, 1, 5, 4096, 70000})
    for (auto [q_heads, k_heads] : {std::pair{32, 8}, {1, 0}, {3, 1}, {128, 128}, {16, 16}})
      for (auto [head_dim, rotary, offset] : kDims)
        for (DType dtype : {DType::bf16, DType::f32})
          for (uintptr_t address : {0, 16, 4, 2})
            for (bool in_place : {false, true})
              for (bool heads_outer : {false, true}) {
                if (address % size_of(dtype)) continue;
                const RopeParams p =
                    dense(tokens, q_heads, k_heads, head_dim, rotary, offset, address, in_place, heads_outer, dtype);
                const RopeLaunch launch = choose_rope_launch(p, kDevice);
                check_launch(p, launch);
                if (launch.token_inner) CHECK(heads_outer);
                for (int unroll : {1, 2, 4})  // what tests ask for
                  for (int threads : {128, 256, 512})
                    for (int inner : {0, 1}) check_launch(p, choose_rope_launch(p, kDevice, unroll, threads, inner));
              }
}

CASE(a_launch_takes_the_widest_vectors_that_addresses_allow) {
  auto width = [](DType dtype, uintptr_t address, int rotary = 128, int offset = 0, int head_dim = 128) {
    return choose_rope_launch(dense(16384, 32, 8, head_dim, rotary, offset, address, false, false, dtype), kDevice).width;
  };
  CHECK_EQ(width(DType::bf16, 0), 8);
  CHECK_EQ(width(DType::f32, 0), 4);
  CHECK_EQ(width(DType::bf16, 8), 4);
  CHECK_EQ(width(DType::bf16, 6), 1);
  CHECK_EQ(width(DType::bf16, 0, 24), 4);         // half of it: 12 pairs
  CHECK_EQ(width(DType::bf16, 0, 64, 2), 2);      // begins at the third feature
  CHECK_EQ(width(DType::bf16, 0, 64, 0, 66), 2);  // heads of 66 lie 132 bytes apart
  RopeParams p = dense(16384, 32, 8, 128, 128, 0, 0, false, false);
  p.k.in_token += 4;  // one odd stride of k alone narrows both: one kernel serves both
  CHECK_EQ(choose_rope_launch(p, kDevice).width, 4);
  p.k.heads = 0;
  CHECK_EQ(choose_rope_launch(p, kDevice).width, 8);  // no k, no matter
}

CASE(a_launch_for_mrope_shares_cosines_and_sines) {
  RopeParams p = dense(16384, 32, 8, 128, 128, 0, 0, false, false);
  const int32_t cu_seqlens[] = {0, 16384};
  CHECK_EQ(rope_shared_bytes(p, choose_rope_launch(p, kDevice)), 0);
  p.axis.cu_seqlens = cu_seqlens;
  CHECK_EQ(rope_shared_bytes(p, choose_rope_launch(p, kDevice)), 8);
  p.mrope = true;
  const RopeLaunch launch = choose_rope_launch(p, kDevice);
  CHECK_EQ(launch.unroll, 4);
  CHECK_EQ(launch.tokens_per_block, 2);
  CHECK_EQ(rope_shared_bytes(p, launch), 2 * (64 * 2 * 4 + 8));
  p.head_dim = p.rotary_dim = 1 << 20;  // chunks of lanes keep it below what a kernel gets without asking
  for (int threads : {0, 512}) CHECK(rope_shared_bytes(p, choose_rope_launch(p, kDevice, 1, threads)) <= 48 << 10);
}

CASE(a_launch_prefers_threads_where_work_is_scarce) {
  CHECK_EQ(choose_rope_launch(dense(16, 32, 8, 128, 128, 0, 0, false, false), kDevice).unroll, 1);
  CHECK_EQ(choose_rope_launch(dense(4096, 32, 8, 128, 128, 0, 0, false, false), kDevice).unroll, 2);
  CHECK_EQ(choose_rope_launch(dense(16384, 32, 8, 128, 128, 0, 0, false, false), kDevice).unroll, 2);
  CHECK_EQ(choose_rope_launch(dense(16384, 32, 8, 128, 128, 0, 8, false, false), kDevice).unroll, 2);  // narrow vectors
  CHECK(choose_rope_launch(dense(4096, 32, 8, 128, 128, 0, 0, false, true), kDevice).token_inner);
  CHECK(!choose_rope_launch(dense(4096, 32, 8, 128, 128, 0, 0, false, false), kDevice).token_inner);
}

CASE(a_launch_is_plain_where_the_short_kernel_is_right) {
  const auto is_plain = [](const RopeParams& p) { return choose_rope_launch(p, kDevice).plain; };
  RopeParams p = dense(4096, 32, 8, 128, 128, 0, 0, false, false);
  p.cos_row = p.sin_row = 64;
  CHECK(is_plain(p));
  const auto without = [&](auto change) {
    RopeParams other = p;
    change(other);
    CHECK(!is_plain(other));
  };
  without([](RopeParams& p) { p.cos = reinterpret_cast<void*>(8); });  // a row that is not aligned
  without([](RopeParams& p) { p.sin_row = 66; });
  without([](RopeParams& p) { p.table_dtype = DType::f64; });
  without([](RopeParams& p) { p.table_step = 2; });
  without([](RopeParams& p) { p.mrope = true; });
  without([](RopeParams& p) { p.rotary_dim = 64; });               // features that pass through
  without([](RopeParams& p) { p.k.in_head = int64_t(1) << 31; });  // a stride, and tokens, of more than 31 bits
  without([](RopeParams& p) { p.q.out_token = int64_t(1) << 35; });
  without([](RopeParams& p) { p.tokens = int64_t(1) << 31; });
  without([](RopeParams& p) { p.q.in = reinterpret_cast<void*>(8); });  // narrow vectors
  p.interleaved = true, p.table_dtype = DType::bf16, p.cos_row = 60;    // a run of four numbers is 8 bytes
  CHECK(is_plain(p));
  p.rotary_dim = 64, p.in_place = true;  // nothing else is written
  CHECK(is_plain(p));
}

CASE(a_launch_leaves_few_threads_idle) {
  auto launch = [](int64_t q_heads, int64_t k_heads, int head_dim, int64_t tokens = 16384) {
    return choose_rope_launch(dense(tokens, q_heads, k_heads, head_dim, head_dim, 0, 0, false, false), kDevice);
  };
  CHECK_EQ(launch(32, 8, 128).threads(), 160);  // one token
  CHECK_EQ(launch(64, 8, 128).threads(), 144);  // one token, four heads per thread; with two it would be half a token
  CHECK_EQ(launch(64, 8, 128).unroll, 4);
  CHECK_EQ(launch(64, 8, 128, 1024).unroll, 2);  // too little work
  CHECK_EQ(launch(96, 8, 128).unroll, 2);        // more than a block with four as well
  CHECK(launch(64, 8, 128).plain);
  CHECK_EQ(launch(16, 16, 64).threads(), 128);  // two tokens of two warps
}

// The CUDA kernel of rows times a factor, emulated, against that of the CPU.
#include "scaled_rows.h"

#include <cstring>
#include <type_traits>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "kernel_dtype.h"

using namespace packops;

namespace {

struct Layout {
  int64_t rows, columns, gap = 0,
                         late = 0;  // gap: elements between the rows of x; late: how far into its memory each tensor begins
};

// What of each row is given.
struct Given {
  bool factors = false, index = false, target = false, add = false, in_place = false;
};

template <typename In, typename Out>
void compare(const Layout& at, const Given& given) {
  check::Random random{uint64_t(at.rows * 1000 + at.columns)};
  const int64_t stride = at.columns + at.gap;
  std::vector<In> x(size_t(at.late + at.rows * stride));
  std::vector<Out> results[2];
  for (In& v : x) v = from_float<In>(float(random.normal()));
  std::vector<float> factor;
  std::vector<int64_t> index;
  std::vector<int32_t> target;
  for (int64_t r = 0; r < at.rows; r++) {
    factor.push_back(given.factors ? float(random.normal()) : 0.37f);
    index.push_back(at.rows - 1 - r);
    target.push_back(int32_t(r % 3) - 1);
  }
  if (given.target)  // what is not read may be anything
    for (int64_t r = 0; r < at.rows; r++)
      if (target[size_t(r)] < 0)
        for (int64_t c = 0; c < at.columns; c++)
          x[size_t(at.late + (given.index ? index[size_t(r)] : r) * stride + c)] = from_float<In>(NAN);
  for (bool cuda : {false, true}) {
    auto& out = results[cuda];
    std::vector<In> own = x;
    for (int64_t i = 0; i < at.late + at.rows * at.columns + 3; i++) out.push_back(from_float<Out>(float(i % 11)));
    ScaledRowsParams p;
    p.x = own.data() + at.late, p.x_row = stride, p.x_dtype = kType<In>;
    p.out = out.data() + at.late, p.dtype = kType<Out>;
    if constexpr (std::is_same_v<In, Out>)
      if (given.in_place) p.out = own.data() + at.late;
    p.rows = at.rows, p.columns = at.columns;
    p.factor = factor.data(), p.factor_step = given.factors;
    if (given.index) p.index = index.data();
    if (given.target) p.target = target.data();
    p.add = given.add;
    if (cuda) CHECK_EQ(scaled_rows_cuda(p, nullptr), cudaSuccess);
    else scaled_rows_cpu(p, 0, at.rows);
    if constexpr (std::is_same_v<In, Out>)
      if (given.in_place) out = own;
  }
  // With `add` the product is rounded on the CPU and not on CUDA.
  const double unit = std::is_same_v<Out, float> ? 5e-7 : std::is_same_v<Out, half_t> ? 0x1p-10 : 0x1p-7;
  int wrong = 0;
  for (size_t i = 0; i < results[0].size(); i++)
    wrong += given.add ? !check::close(to_float(results[1][i]), to_float(results[0][i]), unit)
                       : std::memcmp(&results[1][i], &results[0][i], sizeof(Out)) != 0;
  CHECK_EQ(wrong, 0);
}

template <typename In, typename Out>
void check_everything() {
  for (const Layout& at :
       {Layout{1, 1}, {5, 7}, {3, 1031}, {3, 896, 8}, {2, 2304, 2304}, {7, 33, 1}, {300, 8, 8}, {2, 5000, 0, 1}})
    for (bool add : {false, true}) {
      compare<In, Out>(at, {.add = add});
      compare<In, Out>(at, {.factors = true, .add = add});
      compare<In, Out>(at, {.target = true, .add = add});
      compare<In, Out>(at, {.factors = true, .index = true, .target = true, .add = add});
    }
  if constexpr (std::is_same_v<In, Out>)
    for (bool factors : {false, true}) compare<In, Out>({9, 136}, {.factors = factors, .target = true, .in_place = true});
}

}  // namespace

CASE(every_layout_and_pair_of_types) {
  check_everything<float, float>();
  check_everything<float, bf16_t>();
  check_everything<float, half_t>();
  check_everything<bf16_t, bf16_t>();
  check_everything<half_t, half_t>();
  check_everything<bf16_t, float>();
}

CASE(a_factor_of_one_leaves_what_is_overwritten_alone) {
  float x[4] = {1, NAN, -0.f, 4}, factor = 1;
  ScaledRowsParams p;
  p.x = p.out = x, p.x_row = 2, p.rows = 2, p.columns = 2, p.factor = &factor;
  int32_t target[2] = {-1, 0};
  p.target = target;
  CHECK_EQ(scaled_rows_cuda(p, nullptr), cudaSuccess);
  CHECK(x[0] == 0 && x[1] == 0 && std::signbit(x[2]) && x[3] == 4);  // but rows that do not count
}

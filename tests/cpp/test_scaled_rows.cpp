// How rows times a factor are spread over a GPU.
#include "scaled_rows_launch.h"

#include "check.h"

using namespace packops;

namespace {

ScaledRowsParams problem(int64_t rows, int64_t columns, int64_t gap, DType x_dtype, DType dtype, uintptr_t address = 0) {
  ScaledRowsParams p;
  p.x = reinterpret_cast<const void*>((uintptr_t(1) << 40) + address);
  p.out = reinterpret_cast<void*>(uintptr_t(2) << 40);
  p.rows = rows, p.columns = columns, p.x_row = columns + gap;
  p.x_dtype = x_dtype, p.dtype = dtype;
  return p;
}

}  // namespace

CASE(a_launch_covers_every_element_and_little_else) {
  for (DType x_dtype : {DType::f32, DType::bf16})
    for (DType dtype : {DType::f32, DType::f16})
      for (int64_t rows : {int64_t(1), int64_t(7), int64_t(256000)})
        for (int64_t columns : {1, 7, 896, 2304, 4096, 28672})
          for (int64_t gap : {0, 8}) {
            const ScaledRowsParams p = scaled_rows_as_one(problem(rows, columns, gap, x_dtype, dtype));
            CHECK_EQ(p.rows, gap ? rows : 1);
            const ScaledRowsLaunch launch = choose_scaled_rows_launch(p);
            const int64_t width =
                launch.threads_per_row * kScaledRowsVectors * scaled_rows_width(size_of(x_dtype), size_of(dtype));
            const int threads = launch.threads_per_row * launch.rows_per_block;
            CHECK(threads >= 1 && threads <= kScaledRowsThreads);
            CHECK(int64_t(launch.column_blocks) * width >= p.columns);
            CHECK((int64_t(launch.column_blocks) - 1) * width < p.columns);
            CHECK(int64_t(launch.row_blocks) * launch.rows_per_block >= p.rows);
            CHECK((int64_t(launch.row_blocks) - 1) * launch.rows_per_block < p.rows);
          }
}

CASE(rows_that_share_nothing_stay_rows) {
  const float factors[3] = {};
  const int64_t index[3] = {};
  const int32_t target[3] = {};
  const auto rows = [&](auto change) {
    ScaledRowsParams p = problem(3, 8, 0, DType::f32, DType::f32);
    change(p);
    return scaled_rows_as_one(p).rows;
  };
  CHECK_EQ(rows([&](auto& p) { p.factor = factors; }), 1);
  CHECK_EQ(rows([&](auto& p) { p.factor = factors, p.factor_step = 1; }), 3);
  CHECK_EQ(rows([&](auto& p) { p.index = index; }), 3);
  CHECK_EQ(rows([&](auto& p) { p.target = target; }), 3);
}

CASE(a_launch_takes_vectors_where_addresses_allow) {
  const auto aligned = [](int64_t columns, int64_t gap, DType x_dtype, DType dtype, uintptr_t address = 0, int64_t rows = 3) {
    return choose_scaled_rows_launch(problem(rows, columns, gap, x_dtype, dtype, address)).aligned;
  };
  CHECK(aligned(8, 0, DType::bf16, DType::bf16));
  CHECK(!aligned(8, 4, DType::bf16, DType::bf16));   // every second row 8 bytes off
  CHECK(aligned(8, 4, DType::bf16, DType::f32));     // whose vectors are of 8 bytes
  CHECK(!aligned(12, 4, DType::bf16, DType::bf16));  // the rows of out
  CHECK(!aligned(8, 0, DType::f32, DType::bf16, 8));
  CHECK(aligned(8, 0, DType::bf16, DType::f32, 8));
  CHECK(aligned(7, 2, DType::f32, DType::f32, 0, 1));  // one row: no stride matters
}

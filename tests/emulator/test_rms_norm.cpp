// The CUDA kernels of RMS norm, emulated, against those of the CPU; and how they cut their work.
#include "rms_norm.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "common/convert.h"
#include "emulator.h"
#include "kernel_dtype.h"
#include "rms_norm_launch.h"

using namespace packops;

namespace {

template <typename T>
void compare(int64_t rows, int64_t columns, int64_t gap, bool zero_centered, bool adds = false, double size = 1) {  // size: of x
  check::Random random{uint64_t(rows * 1000 + columns)};
  const auto draw = [&](int64_t count, double size = 1) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T& v : x) v = from_float<T>(float(size * random.normal()));
    return x;
  };
  const std::vector<T> x = draw(rows * (columns + gap), size), grad = draw(rows * (columns + 2 * gap)), weight = draw(columns);
  const std::vector<T> added = draw(rows * (columns + 3 * gap));
  for (bool backward : {false, true}) {
    std::vector<T> out[2], weight_grad[2], total[2];
    for (bool cuda : {false, true}) {
      out[cuda].assign(size_t(rows * columns), from_float<T>(77)), weight_grad[cuda].assign(size_t(columns), from_float<T>(77));
      RmsNormParams p;
      p.x = x.data(), p.x_row = columns + gap, p.grad_row = columns + 2 * gap, p.weight = weight.data(), p.out = out[cuda].data();
      p.rows = rows, p.columns = columns, p.dtype = kType<T>, p.zero_centered = zero_centered;
      if (adds) p.added = added.data(), p.added_row = columns + 3 * gap;
      if (adds && !backward) {
        total[cuda].assign(size_t(rows * columns), from_float<T>(77));
        p.total = total[cuda].data();
      }
      if (backward) p.grad = grad.data(), p.weight_grad = weight_grad[cuda].data();
      if (cuda) CHECK_EQ(rms_norm_cuda_partials(p), cudaSuccess);
      else p.partials = rms_norm_cpu_shares(p);
      std::vector<float> partial(size_t(p.partials * columns), NAN);
      p.partial = partial.data();
      if (cuda) CHECK_EQ(rms_norm_cuda(p, nullptr), cudaSuccess);
      else rms_norm_cpu(p, 0, rms_norm_cpu_shares(p));
      if (!cuda && backward) rms_norm_cpu_finish(p);
    }
    const double unit = sizeof(T) == 4 ? 2e-6 : std::is_same_v<T, half_t> ? 0x1p-10 : 0x1p-7;
    int wrong = 0;
    for (size_t i = 0; i < out[0].size(); i++) wrong += !check::close(to_float(out[1][i]), to_float(out[0][i]), unit);
    if (backward)
      for (size_t i = 0; i < weight_grad[0].size(); i++)
        wrong += !check::close(to_float(weight_grad[1][i]), to_float(weight_grad[0][i]), 4 * unit);
    CHECK_EQ(wrong, 0);
    if (!total[0].empty()) CHECK_EQ(std::memcmp(total[0].data(), total[1].data(), total[0].size() * sizeof(T)), 0);
  }
}

}  // namespace

CASE(every_team_and_type) {
  for (bool zero_centered : {false, true}) {
    compare<bf16_t>(37, 64, 0, zero_centered);
    compare<bf16_t>(19, 1032, 8, zero_centered);  // a team of two warps, the last vectors not there
    compare<half_t>(9, 2304, 0, zero_centered);
    compare<bf16_t>(5, 8192, 0, zero_centered);
    compare<bf16_t>(701, 5120, 8, zero_centered);  // an odd number of teams in a block, several rounds of each
    compare<bf16_t>(300, 6144, 0, zero_centered);  // one team in a block, of 192 threads
    compare<float>(37, 500, 4, zero_centered);
    compare<float>(9, 4096, 0, zero_centered);
  }
  compare<float>(3, 64, 0, false, false, 1e-4);  // where epsilon matters
  compare<bf16_t>(0, 64, 0, false);              // the weight's gradient is 0
}

CASE(sums_of_every_team_and_type) {
  for (bool zero_centered : {false, true}) {
    compare<bf16_t>(37, 64, 8, zero_centered, true);
    compare<bf16_t>(19, 1032, 8, zero_centered, true);
    compare<half_t>(9, 2304, 0, zero_centered, true);
    compare<bf16_t>(701, 5120, 8, zero_centered, true);
    compare<float>(37, 500, 4, zero_centered, true);
    compare<float>(9, 4096, 0, zero_centered, true);
  }
  compare<bf16_t>(0, 64, 0, false, true);
}

CASE(a_launch_covers_every_row_and_column) {
  constexpr DeviceLimits kDevice = {.multiprocessors = 132};
  for (DType dtype : {DType::bf16, DType::f32})
    for (int64_t vector = 16 / size_of(dtype), columns = vector; columns <= rms_norm_most_columns(dtype); columns += vector)
      for (int64_t rows : {int64_t(1), int64_t(7), int64_t(100000)}) {
        RmsNormParams p;
        p.rows = rows, p.columns = columns, p.dtype = dtype;
        const RmsNormLaunch forward = choose_rms_norm_launch(p, kDevice);
        p.weight_grad = &p;
        const RmsNormLaunch backward = choose_rms_norm_launch(p, kDevice);
        CHECK(forward.team % 32 == 0 && forward.team <= kRmsNormTeam && (forward.vectors == 3 || forward.vectors == 4));
        const int64_t places = forward.team * forward.vectors * vector;
        CHECK(places >= columns && places - columns < 32 * forward.vectors * vector);  // no wider than it must be
        CHECK(forward.threads == std::max(forward.team, 64) && forward.blocks * (forward.threads / forward.team) >= rows);
        CHECK(backward.team == forward.team && backward.vectors == forward.vectors && backward.threads % backward.team == 0);
        const int most = rms_norm_threads(backward.vectors, true), blocks = most / backward.team % 2 == 0 ? 2 : 1;
        CHECK(blocks * backward.threads <= most && blocks * backward.threads > most - backward.team);  // all that registers hold
        CHECK(backward.blocks >= 1 && backward.blocks <= 132 * blocks &&
              (backward.blocks - 1) * backward.threads / backward.team < rows);
      }
  CHECK(!rms_norm_fits(0, DType::f16) && !rms_norm_fits(12, DType::f16) && !rms_norm_fits(8192, DType::f32));
  CHECK(rms_norm_fits(8192, DType::f16) && !rms_norm_fits(8200, DType::f16));
}

CASE(widths_of_models_leave_no_place_empty) {
  for (int64_t columns : {1024, 2048, 2304, 2560, 3072, 4096, 5120, 6144, 7168, 8192}) {
    RmsNormParams p;
    p.rows = 1, p.columns = columns, p.dtype = DType::bf16;
    const RmsNormLaunch launch = choose_rms_norm_launch(p, {});
    CHECK_EQ(launch.team * launch.vectors * 8, columns == 2560 ? 3072 : columns);
  }
}

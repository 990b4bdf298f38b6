// How gated_linear.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without
// one.
//
// A thread takes `unroll` 16-byte vectors of one row, a block's width apart. A block takes a part of a row, or several short
// rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gated_linear.h"

namespace packops {

struct GatedLaunch {
  bool aligned = false;  // every row of every tensor begins at a multiple of 16 bytes
  int threads_per_row = 1, rows_per_block = 1;
  uint32_t column_blocks = 1, row_blocks = 1;
};

inline constexpr int kGatedThreads = 256;
// Vectors per thread and tensor: 64 bytes in flight per thread forward, 48 backward.
constexpr int gated_unroll(bool backward) { return backward ? 1 : 2; }

inline bool gated_is_aligned(const GatedParams& p) {
  uintptr_t bits = 0;
  for (const void* data : {p.gate, p.up, p.grad, (const void*)p.product, (const void*)p.grad_gate, (const void*)p.grad_up})
    bits |= reinterpret_cast<uintptr_t>(data);
  if (p.rows > 1)
    for (int64_t stride : {p.gate_row, p.up_row, p.grad_row, p.columns}) bits |= uintptr_t(stride * size_of(p.dtype));
  return bits % 16 == 0;
}

inline GatedLaunch choose_gated_launch(const GatedParams& p) {
  const auto parts = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
  GatedLaunch launch;
  launch.aligned = gated_is_aligned(p);
  const int64_t per_thread = 16 / size_of(p.dtype) * gated_unroll(p.grad);
  while (launch.threads_per_row < kGatedThreads && launch.threads_per_row * per_thread < p.columns) launch.threads_per_row *= 2;
  launch.rows_per_block = int(std::min<int64_t>(kGatedThreads / launch.threads_per_row, p.rows));
  launch.column_blocks = uint32_t(parts(p.columns, launch.threads_per_row * per_thread));
  launch.row_blocks = uint32_t(parts(p.rows, launch.rows_per_block));
  return launch;
}

}  // namespace packops

// How scaled_rows.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/row_blocks.h"
#include "scaled_rows.h"

namespace packops {

struct ScaledRowsLaunch : RowBlocks {
  bool aligned = false;  // every row of x and out begins where a vector may
};

inline constexpr int kScaledRowsThreads = 256, kScaledRowsVectors = 4;  // 64 bytes in flight per thread, fewer from 16 bits to 32

// Elements of a vector: 16 bytes of the wider dtype.
constexpr int scaled_rows_width(int x_bytes, int bytes) { return 16 / std::max(x_bytes, bytes); }

// As one row, where all rows follow each other and share everything.
inline ScaledRowsParams scaled_rows_as_one(ScaledRowsParams p) {
  if (p.x_row == p.columns && (!p.factor || p.factor_step == 0) && !p.index && !p.target) {
    p.x_row = p.columns *= p.rows;
    p.rows = 1;
  }
  return p;
}

inline ScaledRowsLaunch choose_scaled_rows_launch(const ScaledRowsParams& p) {
  const int x_bytes = size_of(p.x_dtype), bytes = size_of(p.dtype), width = scaled_rows_width(x_bytes, bytes);
  ScaledRowsLaunch launch{choose_row_blocks(p.rows, p.columns, width * kScaledRowsVectors, kScaledRowsThreads)};
  const auto begins_vectors = [&](const void* data, int64_t stride, int size) {
    return (reinterpret_cast<uintptr_t>(data) | uintptr_t(p.rows > 1 ? stride * size : 0)) % uintptr_t(width * size) == 0;
  };
  launch.aligned = begins_vectors(p.x, p.x_row, x_bytes) && begins_vectors(p.out, p.columns, bytes);
  return launch;
}

}  // namespace packops

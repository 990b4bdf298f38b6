// How elementwise kernels spread rows over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without one.
//
// A thread takes some vectors of one row, a block's width apart. A block takes a part of a row, or several short rows.
#pragma once

#include <algorithm>
#include <cstdint>

namespace packops {

struct RowBlocks {
  int threads_per_row = 1, rows_per_block = 1;
  uint32_t column_blocks = 1, row_blocks = 1;
};

// per_thread: elements that a thread takes; threads: of a block, at most.
inline RowBlocks choose_row_blocks(int64_t rows, int64_t columns, int64_t per_thread, int threads) {
  const auto parts = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
  RowBlocks blocks;
  while (blocks.threads_per_row < threads && blocks.threads_per_row * per_thread < columns) blocks.threads_per_row *= 2;
  blocks.rows_per_block = int(std::min<int64_t>(threads / blocks.threads_per_row, rows));
  blocks.column_blocks = uint32_t(parts(columns, blocks.threads_per_row * per_thread));
  blocks.row_blocks = uint32_t(parts(rows, blocks.rows_per_block));
  return blocks;
}

}  // namespace packops

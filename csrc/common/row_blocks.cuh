// Kernels whose launch is RowBlocks: where a thread is.
#pragma once

#include <cuda_runtime.h>

#include "common/row_blocks.h"

namespace packops {

// The launch: grid_of(blocks) blocks of block_of(blocks).
inline dim3 grid_of(const RowBlocks& blocks) { return dim3(blocks.column_blocks * blocks.row_blocks); }
inline dim3 block_of(const RowBlocks& blocks) { return dim3(unsigned(blocks.threads_per_row), unsigned(blocks.rows_per_block)); }

// A thread's row, its first column, and how far apart its vectors are, of `width` elements each.
struct RowPlace {
  int64_t row, column, step;

  __device__ __forceinline__ RowPlace(const RowBlocks& blocks, int vectors, int width) {
    uint32_t row_block = 0, column_block = blockIdx.x;
    if (blocks.row_blocks > 1) {
      row_block = blockIdx.x / blocks.column_blocks;
      column_block = blockIdx.x % blocks.column_blocks;
    }
    row = int64_t(row_block) * blockDim.y + threadIdx.y;
    column = (int64_t(column_block) * blockDim.x * vectors + threadIdx.x) * width;
    step = blockDim.x * width;
  }
};

}  // namespace packops

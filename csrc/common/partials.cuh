// Adds the rows of partial sums that blocks wrote, in a fixed order: no atomics, the same bits at every run.
#pragma once

#include "common/dtype.h"
#include "common/vec.cuh"

namespace packops {

inline constexpr int kSumColumns = 32, kSumRows = 8;  // of a block, one thread for each element

constexpr unsigned blocks_for_partials(int64_t columns) { return unsigned((columns + kSumColumns - 1) / kSumColumns); }

// out[column] = Σ of partial (rows, columns), by blocks_for_partials(columns) blocks of kSumColumns * kSumRows threads.
__device__ inline void add_partials(const float* partial, int64_t rows, int64_t columns, void* out, DType dtype) {
  __shared__ float shares[kSumRows][kSumColumns];
  const int row = threadIdx.x / kSumColumns, in_block = threadIdx.x % kSumColumns;
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + in_block;
  float total = 0.f;
  if (column < columns)
    for (int64_t i = row; i < rows; i += kSumRows) total += partial[i * columns + column];
  shares[row][in_block] = total;
  __syncthreads();
  if (row != 0 || column >= columns) return;
  for (int i = 1; i < kSumRows; i++) total += shares[i][in_block];
  switch (dtype) {
    case DType::f32: static_cast<float*>(out)[column] = total; break;
    case DType::f16: static_cast<half_t*>(out)[column] = from_float<half_t>(total); break;
    case DType::bf16: static_cast<bf16_t*>(out)[column] = from_float<bf16_t>(total); break;
    default: static_cast<double*>(out)[column] = total; break;
  }
}

}  // namespace packops

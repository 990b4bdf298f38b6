// Rows times a factor, rounded once: the plain interface of scaled_rows.cu and scaled_rows_cpu.cpp.
//
//   out[r] = s[r] x[i[r]]    or out[r] + that, or 0 where target[r] < 0, whose x is not read
//
// So an accumulated gradient meets grad_output on its way to the parameter's dtype, and a chunk gets its hidden states without those
// of rows that do not count. Computed in fp32 (fp64 for fp64).
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/dtype.h"

namespace packops {

struct ScaledRowsParams {
  const void* x = nullptr;
  int64_t x_row = 0;    // elements between its rows; those of a row are contiguous
  void* out = nullptr;  // (rows, columns), contiguous; x itself, or apart from it
  int64_t rows = 0, columns = 0;
  DType x_dtype = DType::f32, dtype = DType::f32;  // both fp64, or neither
  const void* factor = nullptr;                    // fp32 (fp64 for fp64); null: 1
  int64_t factor_step = 0;                         // 1: one for each row; 0: one for all
  const int64_t* index = nullptr;                  // (rows) of x; null: r
  const int32_t* target = nullptr;                 // (rows); null: every row counts
  bool add = false;
};

// Rows [begin, end).
void scaled_rows_cpu(const ScaledRowsParams& params, int64_t begin, int64_t end);

#ifdef PACKOPS_WITH_CUDA
cudaError_t scaled_rows_cuda(const ScaledRowsParams& params, cudaStream_t stream);  // f32, f16 and bf16
#endif

}  // namespace packops

// Tensor maps: what the copy engine of sm_90 has to know of an array in memory to fetch boxes of it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace packops {

// The driver's function, looked up so that nothing links libcuda. Rows of a box have as many bytes as the swizzle. false: the driver
// refuses.
template <int kDims>
bool encode_tiled(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&sizes)[kDims],
                  const cuuint64_t (&stride_bytes)[kDims - 1], const cuuint32_t (&box)[kDims],
                  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  const CUtensorMapDataType type = dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  cuuint32_t steps[kDims];
  for (cuuint32_t& step : steps) step = 1;
  return encode &&
         encode(map, type, kDims, const_cast<void*>(data), sizes, stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Boxes of 64 x 1 x box_rows of an array of 16-bit elements. sizes: columns, heads, rows; strides, in elements: from head to head, from
// row to row.
inline bool encode_tensor_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[3],
                              const int64_t (&strides)[2], int box_rows) {
  const auto bytes_of = [](int64_t size, int64_t stride) { return cuuint64_t(size > 1 ? stride * 2 : 16); };  // of one: whatever
  return encode_tiled<3>(map, dtype, data, {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2])},
                         {bytes_of(sizes[1], strides[0]), bytes_of(sizes[2], strides[1])}, {64, 1, cuuint32_t(box_rows)});
}

// Boxes of box_rows rows of 128 or 64 bytes of a row-major matrix of 16-bit or fp32 elements. stride: from row to row, in elements.
inline bool encode_matrix_map(CUtensorMap* map, DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride,
                              int box_rows, int row_bytes = 128) {
  return encode_tiled<2>(map, dtype, data, {cuuint64_t(columns), cuuint64_t(rows)}, {cuuint64_t(stride) * size_of(dtype)},
                         {cuuint32_t(row_bytes / size_of(dtype)), cuuint32_t(box_rows)},
                         row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace packops

#endif

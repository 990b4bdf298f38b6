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

// Boxes of 64 x 1 x box_rows of an array of 16-bit elements, 128 bytes a row with the 128-byte swizzle. sizes: columns, heads, rows;
// strides, in elements: from head to head, from row to row. false: the driver refuses. The driver's function is looked up, so
// nothing links libcuda.
inline bool encode_tensor_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[3],
                              const int64_t (&strides)[2], int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  const cuuint64_t counts[3] = {cuuint64_t(sizes[0]), cuuint64_t(sizes[1]), cuuint64_t(sizes[2])};
  const auto bytes_of = [](int64_t size, int64_t stride) { return cuuint64_t(size > 1 ? stride * 2 : 16); };  // of one: whatever
  const cuuint64_t bytes[2] = {bytes_of(sizes[1], strides[0]), bytes_of(sizes[2], strides[1])};
  const cuuint32_t box[3] = {64, 1, cuuint32_t(box_rows)}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode && encode(map, type, 3, const_cast<void*>(data), counts, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace packops

#endif

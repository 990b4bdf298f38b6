// Tensors as rows: elements contiguous, one stride between rows.
#pragma once

#include <optional>

#include "torch/allocate.h"

namespace packops {

inline bool has_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0;
}

// The one stride between all rows, if there is one and their elements are contiguous.
inline std::optional<int64_t> row_stride(const Tensor& tensor) {
  std::optional<int64_t> stride;
  int64_t next = 0;  // what the dimension before must have
  for (int64_t i = tensor.dim() - 2; i >= 0; i--) {
    if (tensor.size(i) == 1) continue;
    if (!stride) stride = tensor.stride(i);
    else if (tensor.stride(i) != next) return {};
    next = tensor.stride(i) * tensor.size(i);
  }
  if (!has_contiguous_rows(tensor)) return {};
  return stride ? stride : tensor.size(tensor.dim() - 1);
}

// What the kernel reads: the tensor itself, or a copy where its rows do not follow each other evenly.
inline Tensor set_rows(const Tensor& tensor, const void** data, int64_t* stride) {
  const auto rows = row_stride(tensor);
  const Tensor even = rows ? tensor : as_contiguous(tensor);
  *data = even.const_data_ptr();
  *stride = rows ? *rows : tensor.size(tensor.dim() - 1);
  return even;
}

}  // namespace packops

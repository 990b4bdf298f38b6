// Torch dtypes as kernel dtypes.
#pragma once

#include "common/dtype.h"
#include "torch/check.h"

namespace packops {

inline DType kernel_dtype(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Long: return DType::i64;
    default: raise("TypeError", op, ": ", argument, " has the unsupported dtype ", dtype_of(tensor));
  }
}

inline bool is_index(DType dtype) { return dtype == DType::i32 || dtype == DType::i64; }

}  // namespace packops

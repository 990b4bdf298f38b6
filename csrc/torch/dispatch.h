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

// int32 or int64.
inline DType index_dtype(const Tensor& tensor, const char* op, const char* argument) {
  const ScalarType type = tensor.scalar_type();
  PACKOPS_CHECK(type == ScalarType::Int || type == ScalarType::Long, TypeError, op, ": ", argument,
                " must be int32 or int64, got ", dtype_of(tensor));
  return type == ScalarType::Int ? DType::i32 : DType::i64;
}

// What an op computes in: float32, float16, bfloat16, and on the CPU float64.
inline DType float_dtype(const Tensor& tensor, const char* op, const char* argument) {
  const ScalarType type = tensor.scalar_type();
  const bool fits = type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                    (type == ScalarType::Double && tensor.is_cpu());
  PACKOPS_CHECK(fits, TypeError, op, ": ", argument, " must be float32, float16 or bfloat16 (float64 on the CPU), got ",
                dtype_of(tensor));
  return kernel_dtype(tensor, op, argument);
}

}  // namespace packops

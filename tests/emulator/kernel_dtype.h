// The dtype of a C++ type, as the parameters of kernels have it.
#pragma once

#include <type_traits>

#include "common/dtype.h"

template <typename T>
constexpr packops::DType kType = std::is_same_v<T, float>             ? packops::DType::f32
                                 : std::is_same_v<T, packops::half_t> ? packops::DType::f16
                                                                      : packops::DType::bf16;

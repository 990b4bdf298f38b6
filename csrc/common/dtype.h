// Element types as the kernels see them: an enum in the params structs, a C++ type in the templates.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace packops {

enum class DType : int32_t { f32, f16, bf16, f64, i32, i64 };

// Storage-only 16-bit types: kernels convert them explicitly, on the CPU and in CUDA alike.
struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

// Calls f(T{}) with the C++ type of a floating dtype. false: the dtype is not a floating one this build instantiates.
template <bool kWithDouble, typename F>
bool dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: f(float{}); return true;
    case DType::f16: f(half_t{}); return true;
    case DType::bf16: f(bf16_t{}); return true;
    case DType::f64:
      if constexpr (kWithDouble) {
        f(double{});
        return true;
      }
      return false;
    default: return false;
  }
}

}  // namespace packops

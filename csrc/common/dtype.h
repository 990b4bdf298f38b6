// Element types as the kernels see them: an enum in the params structs, a C++ type in the templates.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define PACKOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PACKOPS_HOST_DEVICE inline
#endif

namespace packops {

enum class DType : int32_t { f32, f16, bf16, f64, i32, i64 };

constexpr int size_of(DType dtype) {
  return dtype == DType::f64 || dtype == DType::i64 ? 8 : dtype == DType::f16 || dtype == DType::bf16 ? 2 : 4;
}

// Storage-only 16-bit types: kernels convert them explicitly, on the CPU and in CUDA alike.
struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

// Number i of an array of i32 or i64. The kernel must not write to that array.
PACKOPS_HOST_DEVICE int64_t integer_at(const void* data, DType dtype, int64_t i) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
  return dtype == DType::i32 ? __ldg(static_cast<const int32_t*>(data) + i) : __ldg(static_cast<const long long*>(data) + i);
#else
  return dtype == DType::i32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
#endif
}

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

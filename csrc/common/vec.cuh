// Vectors of W elements that move by one instruction, and the 16-bit types as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace packops {

template <int kBytes>
struct Bits;
template <>
struct Bits<16> {
  using type = uint4;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<2> {
  using type = uint16_t;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(half_t x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(double x) { return float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16_t from_float<bf16_t>(float x) {
  return bf16_t{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline half_t from_float<half_t>(float x) {
  return half_t{__half_as_ushort(__float2half_rn(x))};
}

// Addresses are multiples of the vector's size.
template <typename T, int W>
struct Vec {
  using Storage = typename Bits<W * sizeof(T)>::type;
  union {
    Storage bits;
    T element[W];
  };
  __device__ Vec() {}
  __device__ void load(const T* p) { bits = *reinterpret_cast<const Storage*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Storage*>(p) = bits; }
  // For what is touched once: evicted first.
  __device__ void load_streaming(const T* p) { bits = __ldcs(reinterpret_cast<const Storage*>(p)); }
  __device__ void store_streaming(T* p) const { __stcs(reinterpret_cast<Storage*>(p), bits); }
  __device__ void to_floats(float (&x)[W]) const {
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = to_float(element[i]);
  }
  __device__ void from_floats(const float (&x)[W]) {
#pragma unroll
    for (int i = 0; i < W; i++) element[i] = from_float<T>(x[i]);
  }
  __device__ void fill(float x) {
#pragma unroll
    for (int i = 0; i < W; i++) element[i] = from_float<T>(x);
  }
};

}  // namespace packops

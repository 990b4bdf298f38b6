// 16-byte vectors of f32, f16 and bf16: global loads and stores with streaming hints, and conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dtype.h"

namespace packops {
inline namespace on_device {  // the host's functions of the same names (convert.h) are others; the emulator links both

template <typename T>
inline constexpr int kVec = 16 / int(sizeof(T));  // elements of a 16-byte vector

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(bf16_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// Two 16-bit elements in a register <-> two floats.
__device__ __forceinline__ float2 unpack2(uint32_t bits, bf16_t) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack2(uint32_t bits, half_t) {
  return __half22float2(__halves2half2(__ushort_as_half(bits & 0xffff), __ushort_as_half(bits >> 16)));
}
__device__ __forceinline__ uint32_t pack2(float a, float b, bf16_t) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, half_t) {
  const __half2 v = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(v);
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[kVec<T>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack2(words[i], T{});
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kVec<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = pack2(x[2 * i], x[2 * i + 1], T{});
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// The largest element of a vector; NaN only if all are.
template <typename T>
__device__ __forceinline__ float max_of(uint4 raw) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    const auto two = [](uint32_t w) { return reinterpret_cast<const __nv_bfloat162&>(w); };
    const __nv_bfloat162 m = __hmax2(__hmax2(two(raw.x), two(raw.y)), __hmax2(two(raw.z), two(raw.w)));
    return fmaxf(__low2float(m), __high2float(m));
  } else if constexpr (std::is_same_v<T, half_t>) {
    const auto two = [](uint32_t w) { return reinterpret_cast<const __half2&>(w); };
    const __half2 m = __hmax2(__hmax2(two(raw.x), two(raw.y)), __hmax2(two(raw.z), two(raw.w)));
    return fmaxf(__low2float(m), __high2float(m));
  } else {
    float x[kVec<T>];
    unpack<T>(raw, x);
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  }
}

// The smaller of two pairs of 16-bit elements; NaN where either is.
__device__ __forceinline__ uint32_t min2(uint32_t a, uint32_t b, bf16_t) {
  const auto m = __hmin2_nan(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(m);
}
__device__ __forceinline__ uint32_t min2(uint32_t a, uint32_t b, half_t) {
  const auto m = __hmin2_nan(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(m);
}

// Streaming: the line is not needed again soon and should be evicted first.
__device__ __forceinline__ uint4 load_streaming(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ __forceinline__ uint4 load_cached(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store_streaming(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

// Compiler barrier: forces re-unpacking later instead of keeping the floats live (twice the registers).
__device__ __forceinline__ void forget(uint2& bits) { asm("" : "+r"(bits.x), "+r"(bits.y)); }
__device__ __forceinline__ void forget(uint4& bits) { asm("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)); }

// Vectors of any power-of-two width up to 16 bytes. Addresses are multiples of the vector's size.
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

template <typename T, int W>
struct Vec {
  using Storage = typename Bits<W * sizeof(T)>::type;
  static constexpr bool kPairs = sizeof(T) == 2 && W % 2 == 0;  // one instruction converts both: the compiler would not find that
  union {
    Storage bits;
    T element[W];
    uint32_t words[(W * sizeof(T) + 3) / 4];
  };
  __device__ Vec() {}
  __device__ void load(const T* p) { bits = *reinterpret_cast<const Storage*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Storage*>(p) = bits; }
  // For data that is touched once: evicted first.
  __device__ void load_streaming(const T* p) { bits = __ldcs(reinterpret_cast<const Storage*>(p)); }
  __device__ void store_streaming(T* p) const { __stcs(reinterpret_cast<Storage*>(p), bits); }
  __device__ void to_floats(float (&x)[W]) const {
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < W / 2; i++) {
        const float2 pair = unpack2(words[i], T{});
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < W; i++) x[i] = to_float(element[i]);
    }
  }
  __device__ void from_floats(const float (&x)[W]) {
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < W / 2; i++) words[i] = pack2(x[2 * i], x[2 * i + 1], T{});
    } else {
#pragma unroll
      for (int i = 0; i < W; i++) element[i] = from_float<T>(x[i]);
    }
  }
  __device__ void fill(float x) {
#pragma unroll
    for (int i = 0; i < W; i++) element[i] = from_float<T>(x);
  }
};

}  // namespace on_device
}  // namespace packops

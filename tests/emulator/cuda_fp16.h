// As much of CUDA's cuda_fp16.h as packops uses, for emulator.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return float(same_bits<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {same_bits<uint16_t>(_Float16(x))}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(std::fmax(__low2float(a), __low2float(b)), std::fmax(__high2float(a), __high2float(b)));
}
inline __half2 __hmin2_nan(__half2 a, __half2 b) {
  const auto min = [](float x, float y) { return std::isnan(x) || x < y ? x : y; };
  return __floats2half2_rn(min(__low2float(a), __low2float(b)), min(__high2float(a), __high2float(b)));
}

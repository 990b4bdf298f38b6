// As much of CUDA's cuda_bf16.h as packops uses, for emulator.h.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline float __low2float(__nv_bfloat162 v) { return __uint_as_float(uint32_t(v.x.bits) << 16); }
inline float __high2float(__nv_bfloat162 v) { return __uint_as_float(uint32_t(v.y.bits) << 16); }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(std::fmax(__low2float(a), __low2float(b)), std::fmax(__high2float(a), __high2float(b)));
}
inline __nv_bfloat162 __hmin2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto min = [](float x, float y) { return std::isnan(x) || x < y ? x : y; };
  return __floats2bfloat162_rn(min(__low2float(a), __low2float(b)), min(__high2float(a), __high2float(b)));
}

// Scalars on the host: the 16-bit types as floats and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace packops {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(half_t x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // Scaling a float whose exponent field holds the half's fixes the bias and normalises subnormals at once.
  float scaled = float_of(magnitude << 13) * float_of(0x77800000);  // 2^112
  return float_of(bits_of(scaled) | sign);
}

// Rounds to nearest even; NaN stays NaN.
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16_t from_float<bf16_t>(float x) {
  uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > 0x7f800000) return bf16_t{uint16_t((u >> 16) | 0x40)};
  return bf16_t{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline half_t from_float<half_t>(float x) {
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return half_t{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return half_t{uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                         // below 2^-14: subnormal, rounded by an addition
    float shifted = float_of(magnitude) + float_of(0x3f000000);         // 0.5 has an ulp of 2^-24
    return half_t{uint16_t(sign | (bits_of(shifted) - 0x3f000000))};
  }
  uint32_t rebiased = magnitude - 0x38000000;
  return half_t{uint16_t(sign | ((rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13))};
}

}  // namespace packops

// Numbers of any dtype as what plain CPU code computes in, fp32 or for fp64 fp64, and back.
#pragma once

#include "common/convert.h"

namespace packops {

inline double to_real(double x) { return x; }
template <typename T>
float to_real(T x) {
  return to_float(x);
}

inline void store(double& to, double x) { to = x; }
template <typename T>
void store(T& to, float x) {
  to = from_float<T>(x);
}

}  // namespace packops

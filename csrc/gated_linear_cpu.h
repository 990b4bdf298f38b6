// Pointers into part of a row, for gated_linear_cpu.cpp and gated_linear_simd.h.
#pragma once

#include "gated_linear.h"

namespace packops {

// Part of a row.
template <typename T>
struct GatedStretch {
  const T *grad, *gate, *up;
  T *product, *grad_gate, *grad_up;
};

// Null pointers stay null.
template <typename T>
GatedStretch<T> gated_stretch_at(const GatedParams& p, int64_t row, int64_t column) {
  const auto in = [&](const void* data, int64_t stride) {
    return data ? static_cast<const T*>(data) + row * stride + column : nullptr;
  };
  const auto out = [&](void* data) { return data ? static_cast<T*>(data) + row * p.columns + column : nullptr; };
  return {in(p.grad, p.grad_row), in(p.gate, p.gate_row), in(p.up, p.up_row), out(p.product), out(p.grad_gate), out(p.grad_up)};
}

}  // namespace packops

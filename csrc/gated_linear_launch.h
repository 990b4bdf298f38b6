// How gated_linear.cu spreads its work over a GPU: arithmetic on sizes only, so that it runs and is tested on a machine without
// one.
#pragma once

#include <cstdint>

#include "common/row_blocks.h"
#include "gated_linear.h"

namespace packops {

struct GatedLaunch : RowBlocks {
  bool aligned = false;  // every row of every tensor begins at a multiple of 16 bytes
};

inline constexpr int kGatedThreads = 256;
// Vectors per thread and tensor: 64 bytes in flight per thread forward, 48 backward.
constexpr int gated_unroll(bool backward) { return backward ? 1 : 2; }

inline bool gated_is_aligned(const GatedParams& p) {
  uintptr_t bits = 0;
  for (const void* data : {p.gate, p.up, p.grad, (const void*)p.product, (const void*)p.grad_gate, (const void*)p.grad_up})
    bits |= reinterpret_cast<uintptr_t>(data);
  if (p.rows > 1)
    for (int64_t stride : {p.gate_row, p.up_row, p.grad_row, p.columns}) bits |= uintptr_t(stride * size_of(p.dtype));
  return bits % 16 == 0;
}

inline GatedLaunch choose_gated_launch(const GatedParams& p) {
  const int64_t per_thread = 16 / size_of(p.dtype) * gated_unroll(p.grad);
  return {choose_row_blocks(p.rows, p.columns, per_thread, kGatedThreads), gated_is_aligned(p)};
}

}  // namespace packops

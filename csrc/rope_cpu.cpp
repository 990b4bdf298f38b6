// RoPE on the CPU: the interface of rope.h. This file finds the position of each token. rope_simd.h rotates the
// heads, with the best instruction set of the machine.
#include "rope_cpu.h"

#include <vector>

#define PACKOPS_SIMD_FILE "rope_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

template <typename State>
void rope_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  std::vector<State> cos(p.rotary_dim), sin(p.rotary_dim);
  const auto rotate = PACKOPS_BEST_ISA(rope_heads_any);
  RopeWalk walk(p, begin);
  for (int64_t t = begin; t < end; t++) {
    const auto at = walk.at(t);
    if (!at.outside) fill_coefficients(p, at, cos.data(), sin.data());
    const void* cosines = at.outside ? nullptr : cos.data();
    for (const RopeHeads* side : {&p.q, &p.k})
      rotate(p, *side, at.batch * side->in_batch + at.token * side->in_token,
             at.batch * side->out_batch + at.token * side->out_token, cosines, sin.data());
  }
}

}  // namespace

RopeFault rope_check_cpu(const RopeParams& p) {
  if (p.per_token_table) return {};
  if (p.position_ids) {
    const int64_t end = p.axis.cu_seqlens ? boundary(p.axis, p.axis.documents) : p.batch * p.tokens;
    for (int axis = 0; axis < (p.mrope ? 3 : 1); axis++)
      for (int64_t b = 0; b < p.batch; b++)
        for (int64_t t = 0; t < p.tokens && b * p.tokens + t < end; t++) {
          const int64_t position = position_at(p, axis, b, t);
          if (position < 0 || position >= p.table_rows) return {b * p.tokens + t, position};
        }
  } else if (p.axis.cu_seqlens) {
    for (int64_t d = 0; d < p.axis.documents; d++)
      if (boundary(p.axis, d + 1) - boundary(p.axis, d) > p.table_rows) return {boundary(p.axis, d) + p.table_rows, p.table_rows};
  } else if (p.tokens > p.table_rows && p.batch > 0) {
    return {p.table_rows, p.table_rows};
  }
  return {};
}

void rope_cpu(const RopeParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f64) rope_tokens<double>(p, begin, end);
  else rope_tokens<float>(p, begin, end);
}

}  // namespace packops

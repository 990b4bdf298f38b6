// RoPE on the CPU: the interface of rope.h. Positions are resolved here, token by token; the turning (rope_simd.h) runs in the
// best instruction set the machine has.
#include "rope_cpu.h"

#include <vector>

#define PACKOPS_SIMD_FILE "rope_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

void turn(const RopeParams& p, const RopeHeads& heads, int64_t in, int64_t out, const void* cos, const void* sin) {
  PACKOPS_BEST_ISA(rope_heads_any)(p, heads, in, out, cos, sin);
}

template <typename State>
void rope_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  std::vector<State> cos(p.rotary_dim), sin(p.rotary_dim);
  RopeWalk walk(p, begin);
  for (int64_t t = begin; t < end; t++) {
    const auto at = walk.at(t);
    if (!at.outside) fill_coefficients(p, at, cos.data(), sin.data());
    const void* cosines = at.outside ? nullptr : cos.data();
    for (const RopeHeads* side : {&p.q, &p.k})
      turn(p, *side, at.batch * side->in_batch + at.token * side->in_token,
           at.batch * side->out_batch + at.token * side->out_token, cosines, sin.data());
  }
}

}  // namespace

RopeFault rope_check_cpu(const RopeParams& p) {
  if (p.cu_seqlens) {
    const int64_t last = p.num_documents;
    if (bound_at(p, 0) != 0) return {RopeFault::cu_start, 0, bound_at(p, 0)};
    for (int64_t d = 1; d <= last; d++)
      if (bound_at(p, d) < bound_at(p, d - 1)) return {RopeFault::cu_order, d, bound_at(p, d)};
    if (bound_at(p, last) > p.batch * p.tokens) return {RopeFault::cu_end, last, bound_at(p, last)};
  }
  if (p.per_token_table) return {};
  if (p.position_ids) {
    const int64_t end = p.cu_seqlens ? bound_at(p, p.num_documents) : p.batch * p.tokens;
    for (int axis = 0; axis < (p.mrope ? 3 : 1); axis++)
      for (int64_t b = 0; b < p.batch; b++)
        for (int64_t t = 0; t < p.tokens && b * p.tokens + t < end; t++) {
          const int64_t position = position_at(p, axis, b, t);
          if (position < 0 || position >= p.table_rows) return {RopeFault::position, b * p.tokens + t, position};
        }
  } else if (p.cu_seqlens) {
    for (int64_t d = 0; d < p.num_documents; d++)
      if (bound_at(p, d + 1) - bound_at(p, d) > p.table_rows)
        return {RopeFault::position, bound_at(p, d) + p.table_rows, p.table_rows};
  } else if (p.tokens > p.table_rows && p.batch > 0) {
    return {RopeFault::position, p.table_rows, p.table_rows};
  }
  return {};
}

void rope_cpu(const RopeParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f64) rope_tokens<double>(p, begin, end);
  else rope_tokens<float>(p, begin, end);
}

}  // namespace packops

// Turns the heads of one token; compiled once per instruction set by common/simd_targets.h: no include guard, and no includes but
// this one of the same kind.
#include "rope_row_simd.h"

// cos null: the token passes through.
template <typename T>
static void rope_heads(const RopeParams& p, const RopeHeads& heads, int64_t in_offset, int64_t out_offset,
                       const typename TurnLane<T>::State* cos, const typename TurnLane<T>::State* sin) {
  const int begin = p.rotary_offset, end = begin + p.rotary_dim;
  for (int64_t h = 0; h < heads.heads; h++) {
    const T* x = static_cast<const T*>(heads.in) + in_offset + h * heads.in_head;
    T* y = static_cast<T*>(heads.out) + out_offset + h * heads.out_head;
    if (!p.in_place) {
      if (!cos) memcpy(y, x, p.head_dim * sizeof(T));
      else {
        if (begin) memcpy(y, x, begin * sizeof(T));
        if (end < p.head_dim) memcpy(y + end, x + end, (p.head_dim - end) * sizeof(T));
      }
    }
    if (cos) rope_row(x + begin, y + begin, p.rotary_dim, p.interleaved, cos, sin);
  }
}

static void rope_heads_any(const RopeParams& p, const RopeHeads& heads, int64_t in_offset, int64_t out_offset, const void* cos,
                           const void* sin) {
  switch (p.dtype) {
    case DType::f32: return rope_heads<float>(p, heads, in_offset, out_offset, (const float*)cos, (const float*)sin);
    case DType::f16: return rope_heads<half_t>(p, heads, in_offset, out_offset, (const float*)cos, (const float*)sin);
    case DType::bf16: return rope_heads<bf16_t>(p, heads, in_offset, out_offset, (const float*)cos, (const float*)sin);
    case DType::f64: return rope_heads<double>(p, heads, in_offset, out_offset, (const double*)cos, (const double*)sin);
    default: return;
  }
}

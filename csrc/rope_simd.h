// Rotates the heads of one token; compiled once per instruction set by common/simd_targets.h: no include guard, and no includes but
// this one of the same kind.
#include "rope_row_simd.h"

// cos null: the token passes through.
template <typename T>
static void rope_heads(const RopeParams& p, const RopeHeads& heads, int64_t in_offset, int64_t out_offset,
                       const typename Lane<T>::State* cos, const typename Lane<T>::State* sin) {
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
  dispatch_float<true>(p.dtype, [&](auto type) {
    using T = decltype(type);
    using S = typename Lane<T>::State;
    rope_heads<T>(p, heads, in_offset, out_offset, static_cast<const S*>(cos), static_cast<const S*>(sin));
  });
}

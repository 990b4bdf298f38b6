// RoPE on the CPU: the interface of rope.h. Positions are resolved here, token by token; the turning (rope_simd.h) runs in the
// best instruction set the machine has.
#include "rope.h"

#include <algorithm>
#include <vector>

#define PACKOPS_SIMD_FILE "rope_simd.h"
#include "common/simd_targets.h"

namespace packops {
namespace {

int64_t integer_at(const void* data, DType dtype, int64_t i) {
  return dtype == DType::i32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}
int64_t bound_at(const RopeParams& p, int64_t i) { return integer_at(p.cu_seqlens, p.cu_dtype, i * p.cu_stride); }
int64_t position_at(const RopeParams& p, int axis, int64_t batch, int64_t token) {
  return integer_at(p.position_ids, p.position_dtype, axis * p.position_axis + batch * p.position_batch + token * p.position_token);
}

template <typename State>
State table_at(const void* table, DType dtype, int64_t i) {
  State x = 0;
  dispatch_float<true>(dtype, [&](auto type) {
    using T = decltype(type);
    const T value = static_cast<const T*>(table)[i];
    if constexpr (std::is_same_v<T, double>) x = State(value);
    else x = State(baseline::to_float(value));
  });
  return x;
}

void turn(const RopeParams& p, const RopeHeads& heads, int64_t in, int64_t out, const void* cos, const void* sin) {
  switch (cpu_isa()) {
    case CpuIsa::avx512: return avx512::rope_heads_any(p, heads, in, out, cos, sin);
    case CpuIsa::avx2: return avx2::rope_heads_any(p, heads, in, out, cos, sin);
    case CpuIsa::baseline: return baseline::rope_heads_any(p, heads, in, out, cos, sin);
  }
}

// The coefficients of one token as the turning wants them: one per pair, or for interleaved pairs one per feature, so that
// x' = x cos + swapped(x) sin with the sine's sign inside.
template <typename State>
void fill_coefficients(const RopeParams& p, int64_t batch, int64_t token, int64_t position, State* cos, State* sin) {
  const int half = p.rotary_dim / 2;
  const State sign = p.transposed ? -1 : 1;
  const int64_t table_batch = p.per_token_table ? batch : 0;
  for (int i = 0; i < half; i++) {
    const int64_t row = p.mrope ? position_at(p, rope_mrope_axis(p, i), batch, token) : position;
    const State c = table_at<State>(p.cos, p.table_dtype, table_batch * p.cos_batch + row * p.cos_row + i);
    const State s = sign * table_at<State>(p.sin, p.table_dtype, table_batch * p.sin_batch + row * p.sin_row + i);
    if (p.interleaved) {
      cos[2 * i] = cos[2 * i + 1] = c;
      sin[2 * i] = -s;
      sin[2 * i + 1] = s;
    } else {
      cos[i] = c;
      sin[i] = s;
    }
  }
}

template <typename State>
void rope_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  std::vector<State> cos(p.rotary_dim), sin(p.rotary_dim);
  int64_t document = 0;
  if (p.cu_seqlens) {
    int64_t above = p.num_documents + 1;  // first entry past `begin`
    for (int64_t low = 0; low < above;) {
      const int64_t middle = (low + above) / 2;
      if (bound_at(p, middle) <= begin) low = middle + 1;
      else above = middle;
    }
    document = above - 1;
  }
  for (int64_t t = begin; t < end; t++) {
    const int64_t batch = t / p.tokens, token = t % p.tokens;
    int64_t position = token;
    bool outside = false;
    if (p.cu_seqlens) {
      while (document < p.num_documents && bound_at(p, document + 1) <= t) document++;
      outside = document >= p.num_documents;
      if (!outside) position = t - bound_at(p, document);
    }
    if (p.position_ids && !p.mrope) position = position_at(p, 0, batch, token);
    if (p.per_token_table) position = token;
    if (!outside) fill_coefficients(p, batch, token, position, cos.data(), sin.data());
    const void* cosines = outside ? nullptr : cos.data();
    turn(p, p.q, batch * p.q.in_batch + token * p.q.in_token, batch * p.q.out_batch + token * p.q.out_token, cosines, sin.data());
    turn(p, p.k, batch * p.k.in_batch + token * p.k.in_token, batch * p.k.out_batch + token * p.k.out_token, cosines, sin.data());
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
      if (bound_at(p, d + 1) - bound_at(p, d) > p.table_rows) return {RopeFault::position, bound_at(p, d) + p.table_rows, p.table_rows};
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

// Positions, cosines and sines of tokens on the CPU. Shared by rope_cpu.cpp and qk_norm_rope_cpu.cpp.
#pragma once

#include <type_traits>

#include "common/convert.h"
#include "rope.h"

namespace packops {

inline int64_t position_at(const RopeParams& p, int axis, int64_t batch, int64_t token) {
  return integer_at(p.position_ids, p.position_dtype,
                    axis * p.position_axis + batch * p.position_batch + token * p.position_token);
}

template <typename State>
State table_at(const void* table, DType dtype, int64_t i) {
  State x = 0;
  dispatch_float<true>(dtype, [&](auto type) {
    using T = decltype(type);
    const T value = static_cast<const T*>(table)[i];
    if constexpr (std::is_same_v<T, double>) x = State(value);
    else x = State(to_float(value));
  });
  return x;
}

// Visits tokens in ascending order and knows the document of each.
class RopeWalk {
 public:
  struct Token {
    int64_t batch, token, position;
    bool outside;  // of every document
  };

  RopeWalk(const RopeParams& params, int64_t begin) : p_(params) {
    if (!p_.axis.cu_seqlens) return;
    int64_t low = 0, high = p_.axis.documents + 1;  // to the first entry past `begin`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (boundary(p_.axis, middle) <= begin) low = middle + 1;
      else high = middle;
    }
    document_ = high - 1;
  }

  Token at(int64_t t) {
    Token at{t / p_.tokens, t % p_.tokens, t % p_.tokens, false};
    if (p_.axis.cu_seqlens) {
      while (document_ < p_.axis.documents && boundary(p_.axis, document_ + 1) <= t) document_++;
      at.outside = document_ >= p_.axis.documents;
      if (!at.outside && !p_.per_token_table) at.position = t - boundary(p_.axis, document_);
    }
    if (p_.position_ids && !p_.mrope) at.position = position_at(p_, 0, at.batch, at.token);
    return at;
  }

 private:
  const RopeParams& p_;
  int64_t document_ = 0;
};

// The cosines and sines of one token, as rope_row reads them: one per pair. Interleaved pairs have one per feature, and the sine
// carries the sign: x' = x cos + swapped(x) sin.
template <typename State>
void fill_coefficients(const RopeParams& p, const RopeWalk::Token& at, State* cos, State* sin) {
  const int half = p.rotary_dim / 2;
  const State sign = p.transposed ? -1 : 1;
  const int64_t table_batch = p.per_token_table ? at.batch : 0;
  for (int i = 0; i < half; i++) {
    const int64_t row = p.mrope ? position_at(p, rope_mrope_axis(p, i), at.batch, at.token) : at.position;
    const State c = table_at<State>(p.cos, p.table_dtype, table_batch * p.cos_batch + row * p.cos_row + i * p.table_step);
    const State s = sign * table_at<State>(p.sin, p.table_dtype, table_batch * p.sin_batch + row * p.sin_row + i * p.table_step);
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

}  // namespace packops

// The gate of a gated MLP on vectors of floats; compiled once per instruction set by common/simd_targets.h: no include guard, no
// includes. Formulas in gated_linear.h.

struct Gate {
  VecF share, slope;  // f(g) = g share, f'(g) = share + g slope
};

template <Activation A>
static inline Gate gate_of(VecF g) {
  const VecF magnitude = g < 0.f ? -g : g;
  if constexpr (A == Activation::gelu) {
    // Φ(-|g|) = erfc(|g| / √2) / 2, by the Chebyshev fit of Numerical Recipes ("erfcc"), relative error below 1.2e-7 everywhere.
    const VecF z = magnitude * 0.70710678f, t = 1.f / (1.f + 0.5f * z);
    const float fit[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                         -0.18628806f, 0.09678418f, 0.37409196f,  1.00002368f};
    VecF p = splat(0.17087277f);
    for (int i = 0; i < 8; i++) p = p * t + fit[i];
    const VecF tail = 0.5f * t * vexp(p * t - 1.26551223f - z * z);
    return {select(g < 0.f, tail, 1.f - tail), 0.39894228f * vexp(-0.5f * g * g)};
  } else {
    VecF x = magnitude, derivative = splat(1.f);
    if constexpr (A == Activation::gelu_tanh) {
      VecF square = g * g;
      square = select(square > kGeluSquareLimit, splat(kGeluSquareLimit), square);
      x = kGeluSlope * magnitude * (1.f + kGeluCubic * square);
      derivative = kGeluSlope * (1.f + 3 * kGeluCubic * square);
    }
    const VecF a = vexp(-x), larger = 1.f / (1.f + a), smaller = a * larger;
    return {select(g < 0.f, smaller, larger), larger * smaller * derivative};
  }
}

template <Activation A, typename T>
static inline void gated_vector(const GatedStretch<T>& s, int64_t i) {
  const VecF gate = load(s.gate + i), up = load(s.up + i);
  const Gate at = gate_of<A>(gate);
  const VecF value = gate * at.share;
  if (s.product) store(s.product + i, value * up);
  if (!s.grad) return;
  const VecF grad = load(s.grad + i);
  if (s.grad_gate) store(s.grad_gate + i, grad * (up * (at.share + gate * at.slope)));
  if (s.grad_up) store(s.grad_up + i, grad * value);
}

template <typename T, Activation A>
static void gated_stretch(const GatedStretch<T>& s, int64_t count) {
  int64_t i = 0;
  for (; i + PACKOPS_LANES <= count; i += PACKOPS_LANES) gated_vector<A>(s, i);
  if (i == count) return;
  // The remaining elements go through a whole vector too, so that an element has the same bits wherever it lies.
  T in[3][PACKOPS_LANES] = {}, out[3][PACKOPS_LANES];
  const size_t bytes = size_t(count - i) * sizeof(T);
  memcpy(in[0], s.gate + i, bytes);
  memcpy(in[1], s.up + i, bytes);
  if (s.grad) memcpy(in[2], s.grad + i, bytes);
  gated_vector<A>(GatedStretch<T>{s.grad ? in[2] : nullptr, in[0], in[1], out[0], out[1], out[2]}, 0);
  if (s.product) memcpy(s.product + i, out[0], bytes);
  if (s.grad_gate) memcpy(s.grad_gate + i, out[1], bytes);
  if (s.grad_up) memcpy(s.grad_up + i, out[2], bytes);
}

template <typename T>
static void gated_typed(Activation activation, const GatedStretch<T>& s, int64_t count) {
  switch (activation) {
    case Activation::silu: return gated_stretch<T, Activation::silu>(s, count);
    case Activation::gelu_tanh: return gated_stretch<T, Activation::gelu_tanh>(s, count);
    case Activation::gelu: return gated_stretch<T, Activation::gelu>(s, count);
  }
}

static void gated_any(const GatedParams& p, int64_t row, int64_t column, int64_t count) {
  dispatch_float<false>(p.dtype,
                        [&](auto type) { gated_typed(p.activation, gated_stretch_at<decltype(type)>(p, row, column), count); });
}

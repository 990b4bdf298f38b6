// The row passes of ce_loss_cpu.cpp, compiled once per instruction set by common/simd_targets.h: no include guard, no includes.
//
// Pass 1 reads a row once, in blocks that fit into the L1 cache, and keeps a running maximum and sum. Label smoothing and entropy
// add sums of their own. Pass 2 reads the row again, mostly from the L2 cache, and writes the gradient.

// What the passes compute with: vectors of floats, but one double at a time.
template <typename T>
struct CeLane : Lane<T> {
  using V = VecF;
  static V exp(V x) { return vexp(x); }
  static V tanh(V x) { return vtanh(x); }
  static V max(V a, V b) { return vmax(a, b); }
  static double sum(V v) { return horizontal_sum(v); }
  static float top(V v) { return horizontal_max(v); }
  static V weights(const float* p) { return load(p); }
  static V fill(float x) { return splat(x); }
  static V zero_where_zero(V e, V x) { return select(e == 0.f, splat(0.f), x); }
};
template <>
struct CeLane<double> : Lane<double> {
  using V = double;
  static constexpr int kLanes = 1;
  static V read(const double* p) { return *p; }
  static void write(double* p, V v) { *p = v; }
  static V exp(V x) { return ::exp(x); }
  static V tanh(V x) { return ::tanh(x); }
  static V max(V a, V b) { return a > b ? a : b; }
  static double sum(V v) { return v; }
  static double top(V v) { return v; }
  static V weights(const double* p) { return *p; }
  static V fill(double x) { return x; }
  static V zero_where_zero(V e, V x) { return e == 0 ? 0 : x; }
};

template <typename T>
struct CeRow {
  using L = CeLane<T>;
  using S = typename L::State;
  using V = typename L::V;
  static constexpr int kLanes = L::kLanes;
  static constexpr int kBlock = 1024;

  const CeLossParams& p;
  S class_weight_sum;
  S cap = S(p.softcap), inverse_cap = cap > 0 ? S(p.logit_scale) / cap : S(0), factor = S(p.logit_scale);

  V transform(V x) const { return cap > 0 ? L::fill(cap) * L::tanh(x * L::fill(inverse_cap)) : x * L::fill(factor); }
  // d x' / d x, computed from x'.
  V chain(V transformed) const {
    if (!(cap > 0)) return L::fill(factor);
    V t = transformed * L::fill(1 / cap);
    return L::fill(factor) * (L::fill(1) - t * t);
  }
  static const T* row_of(const void* base, const RowLayout& l, int64_t t) {
    return static_cast<const T*>(base) + (t / l.inner) * l.outer + (t % l.inner) * l.step;
  }
  // Lanes past the end of a row are -inf, so that they add nothing to the sums.
  V read(const T* x, int64_t c) const {
    if (c + kLanes <= p.vocab) return transform(L::read(x + c));
    S padded[kLanes];
    for (int i = 0; i < kLanes; i++) padded[i] = c + i < p.vocab ? L::read1(x + c + i) : S(0);
    V v;
    memcpy(&v, padded, sizeof v);
    v = transform(v);
    memcpy(padded, &v, sizeof v);
    for (int i = 0; i < kLanes; i++)
      if (c + i >= p.vocab) padded[i] = -std::numeric_limits<S>::infinity();
    memcpy(&v, padded, sizeof v);
    return v;
  }
  S class_weight(int64_t c) const { return p.class_weight ? static_cast<const S*>(p.class_weight)[c] : S(1); }
  V read_weights(int64_t c) const {
    if (!p.class_weight) return L::fill(1);
    if (c + kLanes <= p.vocab) return L::weights(static_cast<const S*>(p.class_weight) + c);
    S padded[kLanes];
    for (int i = 0; i < kLanes; i++) padded[i] = c + i < p.vocab ? class_weight(c + i) : S(0);
    V v;
    memcpy(&v, padded, sizeof v);
    return v;
  }
  static S first(V v) {
    S lanes[kLanes];
    memcpy(lanes, &v, sizeof v);
    return lanes[0];
  }
  S transform1(S x) const { return first(transform(L::fill(x))); }

  // The column of a counted row's class. Outside [0, vocab) if the class belongs to another shard.
  int32_t column_of(int32_t target) const { return int32_t(target - p.first_class); }
  bool is_here(int32_t y) const { return y >= 0 && y < p.vocab; }
  S& partial(PartialState which, int64_t t) const { return static_cast<S*>(p.partial)[which * p.rows + t]; }

  struct Coefficients {  // d loss / d x'_c = alpha p_c - beta w_c - gamma [c = y]
    S alpha, beta, gamma;
  };
  Coefficients coefficients(int32_t y, S lse) const {
    const S eps = S(p.label_smoothing), target_weight = class_weight(y), beta = eps / S(class_count(p));
    return {(1 - eps) * target_weight + beta * class_weight_sum + 2 * S(p.z_loss) * lse, beta, (1 - eps) * target_weight};
  }

  // The sum of smoothing. A sum of huge logits may overflow: then so does the loss, as torch's does, and not to the other side.
  static S not_overflown(S x) {
    const S infinity = std::numeric_limits<S>::infinity();
    return x == -infinity ? infinity : x;
  }

  void forward(int64_t t) const {
    const S infinity = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
    S *scale = static_cast<S*>(p.scale), *row_max = static_cast<S*>(p.row_max), *row_sum = static_cast<S*>(p.row_sum);
    S *row_loss = static_cast<S*>(p.row_loss), *entropy = static_cast<S*>(p.entropy);
    const int32_t target_class = p.target[t], y = column_of(target_class);
    if (target_class < 0) {
      if (p.partial) {
        for (const auto which : {kPartialMax, kPartialSum, kPartialTarget, kPartialWeighted}) partial(which, t) = 0;
        return;
      }
      row_max[t] = 0;
      row_sum[t] = 1;
      row_loss[t] = target_class == kIgnored ? S(0) : nan;
      if (entropy) entropy[t] = 0;
      if (p.prediction) p.prediction[t] = -1;
      if (p.grad) zero_gradient(t);
      return;
    }
    const T* x = row_of(p.logits, p.logits_layout, t);
    const bool smoothing = p.label_smoothing != 0;
    const S target_logit = is_here(y) ? transform1(L::read1(x + y)) : S(0);
    const S reference = std::isfinite(target_logit) && !p.partial ? target_logit : S(0);  // of a shard: what all shards share
    S maximum = -infinity;
    double sum = 0, weighted = 0, moment = 0;
    for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
      const int64_t end = begin + kBlock < p.vocab ? begin + kBlock : p.vocab;
      V top = L::fill(-infinity);
      for (int64_t c = begin; c < end; c += kLanes) top = L::max(read(x, c), top);
      const S block_max = L::top(top);
      if (block_max > maximum) {
        if (sum != 0) {
          const double shrink = ::exp(double(maximum) - double(block_max));
          moment = shrink * (moment + (double(maximum) - double(block_max)) * sum);
          sum *= shrink;
        }
        maximum = block_max;
      }
      const V base = L::fill(maximum == -infinity ? S(0) : maximum);  // -inf - -inf would be NaN
      V sums = L::fill(0), lost = L::fill(0), moments = L::fill(0), weights = L::fill(0);
      // Next to the 1 of a confident row, small terms lose digits at every addition. So four of them are added first, and the
      // error of adding the four (Knuth's two-sum, exact for any magnitudes) is summed separately.
      for (int64_t c = begin; c < end; c += 4 * kLanes) {
        V group = L::fill(0);
        for (int64_t i = c; i < c + 4 * kLanes && i < end; i += kLanes) {
          const V v = read(x, i), e = L::exp(v - base);
          group += e;
          if (entropy) moments += e * L::zero_where_zero(e, v - base);
          if (smoothing) weights += end - i >= kLanes ? read_weights(i) * (v - L::fill(reference)) : L::fill(0);
        }
        const V next = sums + group, added = next - sums;
        lost += (sums - (next - added)) + (group - added);
        sums = next;
      }
      sum += L::sum(sums) + L::sum(lost);
      moment += L::sum(moments);
      weighted += L::sum(weights);
      if (smoothing)  // the block's last, partial vector
        for (int64_t c = begin + (end - begin) / kLanes * kLanes; c < end; c++)
          weighted += class_weight(c) * (transform1(L::read1(x + c)) - reference);
    }
    if (p.partial) {
      partial(kPartialMax, t) = maximum;
      partial(kPartialSum, t) = S(sum);
      partial(kPartialTarget, t) = target_logit;
      partial(kPartialWeighted, t) = S(weighted);
      return;
    }
    const S log_sum = S(::log(sum)), lse = maximum + log_sum, gap = log_sum - (target_logit - maximum);  // gap = lse - x'_y
    const Coefficients k = coefficients(y, lse);
    S loss = k.gamma * gap;
    if (smoothing) loss += k.beta * not_overflown(class_weight_sum * (log_sum - (reference - maximum)) - S(weighted));
    if (p.z_loss != 0) loss += S(p.z_loss) * lse * lse;
    row_max[t] = maximum;
    row_sum[t] = S(sum);
    row_loss[t] = loss;
    if (entropy) entropy[t] = log_sum - S(moment / sum);
    if (p.prediction) p.prediction[t] = argmax(x);
    if (p.grad) gradient(t, scale[t]);
  }

  // Combines the states of a row's shards. Always in the order of the shards, so that every process gets the same bits.
  void combine(int64_t t) const {
    const S infinity = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
    S &row_max = static_cast<S*>(p.row_max)[t], &row_sum = static_cast<S*>(p.row_sum)[t],
      &row_loss = static_cast<S*>(p.row_loss)[t];
    const int32_t target_class = p.target[t];
    if (target_class < 0) {
      row_max = 0;
      row_sum = 1;
      row_loss = target_class == kIgnored ? S(0) : nan;
      return;
    }
    const auto state = [&](int64_t shard, PartialState which) {
      return static_cast<const S*>(p.partials)[shard * partial_size(p) + which * p.rows + t];
    };
    S maximum = -infinity, target_logit = 0;
    for (int64_t s = 0; s < p.shards; s++) {
      const S top = state(s, kPartialMax);
      if (top > maximum) maximum = top;
      target_logit += state(s, kPartialTarget);  // 0 but in one shard
    }
    double sum = 0, weighted = 0;
    for (int64_t s = 0; s < p.shards; s++) {
      sum += double(state(s, kPartialSum)) * ::exp(double(state(s, kPartialMax)) - double(maximum));
      weighted += double(state(s, kPartialWeighted));
    }
    const S log_sum = S(::log(sum)), lse = maximum + log_sum;
    const Coefficients k = coefficients(column_of(target_class), lse);
    S loss = k.gamma * (log_sum - (target_logit - maximum));
    if (p.label_smoothing != 0) loss += k.beta * not_overflown(class_weight_sum * lse - S(weighted));
    if (p.z_loss != 0) loss += S(p.z_loss) * lse * lse;
    row_max = maximum;
    row_sum = S(sum);
    row_loss = loss;
  }

  // The first of the largest logits. Comparing with the row's maximum would not do: the compiler may fuse products differently in
  // each place, and then no x' need equal it.
  int32_t argmax(const T* x) const {
    S best = -std::numeric_limits<S>::infinity();
    int64_t at = 0;
    for (int64_t c = 0; c < p.vocab; c += kLanes) {
      S lanes[kLanes];
      for (int i = 0; i < kLanes; i++) lanes[i] = c + i < p.vocab ? L::read1(x + c + i) : S(0);
      V v;
      memcpy(&v, lanes, sizeof v);
      v = transform(v);
      memcpy(lanes, &v, sizeof v);
      for (int i = 0; i < kLanes && c + i < p.vocab; i++)
        if (lanes[i] > best) best = lanes[i], at = c + i;
    }
    return int32_t(at);
  }

  T* grad_row(int64_t t) const { return const_cast<T*>(row_of(p.grad, p.grad_layout, t)); }
  void zero_gradient(int64_t t) const { memset(static_cast<void*>(grad_row(t)), 0, size_t(p.vocab) * sizeof(T)); }

  // Writes multiplier * d loss / d x for a counted row.
  void gradient(int64_t t, S multiplier) const {
    const int32_t y = column_of(p.target[t]);
    const T* x = row_of(p.logits, p.logits_layout, t);
    T* out = grad_row(t);
    const S maximum = static_cast<const S*>(p.row_max)[t], sum = static_cast<const S*>(p.row_sum)[t];
    const Coefficients k = coefficients(y, maximum + S(::log(double(sum))));
    const V base = L::fill(maximum), softmax_factor = L::fill(multiplier * k.alpha / sum), uniform = L::fill(multiplier * k.beta);
    const bool smoothing = k.beta != 0;

    // The terms of the target's gradient may nearly cancel. In double their difference adds no error of its own.
    S target_gradient = 0;
    if (is_here(y)) {
      const V target = transform(L::fill(L::read1(x + y)));
      const double probability = ::exp(double(first(target)) - double(maximum)) / double(sum);
      const double inner = k.alpha * probability - double(k.beta) * class_weight(y) - k.gamma;
      target_gradient = S(inner * multiplier * first(chain(target)));
    }

    for (int64_t c = 0; c < p.vocab; c += kLanes) {
      const V v = read(x, c);
      V g = L::exp(v - base) * softmax_factor;
      if (smoothing) g -= uniform * read_weights(c);
      g *= chain(v);
      if (c + kLanes <= p.vocab) {
        L::write(out + c, g);
      } else {
        S lanes[kLanes];
        memcpy(lanes, &g, sizeof g);
        for (int i = 0; c + i < p.vocab; i++) L::write1(out + c + i, lanes[i]);
      }
    }
    if (is_here(y)) L::write1(out + y, target_gradient);
  }

  void backward(int64_t t) const {
    const RowLayout& l = p.grad_output_layout;
    const S g = static_cast<const S*>(p.grad_output)[(t / l.inner) * l.outer + (t % l.inner) * l.step];
    if (p.grad_holds_gradient && g == 1) return;
    if (p.target[t] < 0) return zero_gradient(t);
    if (!p.logits) {
      T* out = grad_row(t);
      for (int64_t c = 0; c < p.vocab; c++) L::write1(out + c, g * L::read1(out + c));
      return;
    }
    gradient(t, g * static_cast<const S*>(p.scale)[t]);
  }
};

template <typename T>
static void ce_rows(const CeLossParams& p, int64_t begin, int64_t end, CePass pass) {
  using S = typename CeRow<T>::S;
  double class_weight_sum = double(class_count(p));
  if (p.class_weight) {
    class_weight_sum = 0;
    for (int64_t c = 0; c < class_count(p); c++) class_weight_sum += static_cast<const S*>(p.class_weight)[c - p.first_class];
  }
  const CeRow<T> row{p, S(class_weight_sum)};
  for (int64_t t = begin; t < end; t++) {
    switch (pass) {
      case CePass::forward: row.forward(t); break;
      case CePass::combine: row.combine(t); break;
      case CePass::backward: row.backward(t); break;
    }
  }
}

static void ce_rows_any(const CeLossParams& p, int64_t begin, int64_t end, CePass pass) {
  dispatch_float<true>(p.logits_dtype, [&](auto type) { ce_rows<decltype(type)>(p, begin, end, pass); });
}

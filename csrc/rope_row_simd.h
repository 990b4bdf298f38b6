// Turns one row of rotary features; compiled once per instruction set by common/simd_targets.h: no include guard, no includes.

typedef double VecD __attribute__((vector_size(PACKOPS_LANES * 4)));
typedef int64_t VecL __attribute__((vector_size(PACKOPS_LANES * 4)));

// What turning needs of an element type.
template <typename T>
struct TurnLane {
  using State = float;
  using V = VecF;
  static constexpr int kLanes = PACKOPS_LANES;
  static V read(const T* p) { return load(p); }
  static V coefficients(const float* p) { return load(p); }
  static void write(T* p, V v) { store(p, v); }
  static float read1(T x) { return to_float(x); }
  static T write1(float x) { return from_float<T>(x); }
  static V swap_neighbours(V v) {
    VecI other;
    for (int i = 0; i < kLanes; i++) other[i] = i ^ 1;
    return __builtin_shuffle(v, other);
  }
};
template <>
struct TurnLane<double> {
  using State = double;
  using V = VecD;
  static constexpr int kLanes = PACKOPS_LANES / 2;
  static V read(const double* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static V coefficients(const double* p) { return read(p); }
  static void write(double* p, V v) { memcpy(p, &v, sizeof v); }
  static double read1(double x) { return x; }
  static double write1(double x) { return x; }
  static V swap_neighbours(V v) {
    VecL other;
    for (int i = 0; i < kLanes; i++) other[i] = i ^ 1;
    return __builtin_shuffle(v, other);
  }
};

// Turns one row of rotary features; x may be y.
template <typename T>
static void rope_row(const T* x, T* y, int rotary, bool interleaved, const typename TurnLane<T>::State* cos,
                     const typename TurnLane<T>::State* sin) {
  using L = TurnLane<T>;
  constexpr int n = L::kLanes;
  const int half = rotary / 2;
  int i = 0;
  if (interleaved) {
    for (; i + n <= rotary; i += n) {
      const auto v = L::read(x + i);
      L::write(y + i, v * L::coefficients(cos + i) + L::swap_neighbours(v) * L::coefficients(sin + i));
    }
    for (; i < rotary; i += 2) {
      const auto a = L::read1(x[i]), b = L::read1(x[i + 1]);
      y[i] = L::write1(a * cos[i] + b * sin[i]);
      y[i + 1] = L::write1(b * cos[i + 1] + a * sin[i + 1]);
    }
    return;
  }
  for (; i + n <= half; i += n) {
    const auto a = L::read(x + i), b = L::read(x + half + i), c = L::coefficients(cos + i), s = L::coefficients(sin + i);
    L::write(y + i, a * c - b * s);
    L::write(y + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const auto a = L::read1(x[i]), b = L::read1(x[half + i]);
    y[i] = L::write1(a * cos[i] - b * sin[i]);
    y[half + i] = L::write1(b * cos[i] + a * sin[i]);
  }
}

// Vectors of PACKOPS_LANES floats in GCC's portable vector extension, which becomes SSE2, AVX2 or AVX-512 by the #pragma around
// it. Included by simd_targets.h inside a namespace, several times: no include guard, no includes.

typedef float VecF __attribute__((vector_size(PACKOPS_LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(PACKOPS_LANES * 4)));
typedef uint32_t VecU __attribute__((vector_size(PACKOPS_LANES * 4)));
typedef uint16_t VecH __attribute__((vector_size(PACKOPS_LANES * 2)));

static inline VecF splat(float x) { return VecF{} + x; }
static inline VecF select(VecI mask, VecF yes, VecF no) { return mask ? yes : no; }
static inline VecF vmax(VecF a, VecF b) { return a > b ? a : b; }  // b where a is NaN

static inline double horizontal_sum(VecF v) {
  double total = 0;
  for (int i = 0; i < PACKOPS_LANES; i++) total += double(v[i]);
  return total;
}
static inline float horizontal_max(VecF v) {
  float lanes[PACKOPS_LANES];
  memcpy(lanes, &v, sizeof v);
  float best = lanes[0];
  for (int i = 1; i < PACKOPS_LANES; i++) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// ---- Loads and stores, unaligned; rounding and NaN as in common/convert.h.

static inline VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline VecF load(const bf16_t* p) {
  VecH h;
  memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}
static inline VecF load(const half_t* p) {
#if defined(PACKOPS_F16C) && PACKOPS_LANES == 16
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(PACKOPS_F16C) && PACKOPS_LANES == 8
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VecF v;
  for (int i = 0; i < PACKOPS_LANES; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
static inline void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
static inline void store(bf16_t* p, VecF v) {
  VecU u = (VecU)v;
  VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VecU quiet = (u >> 16) | 0x40;
  VecH h = __builtin_convertvector(((u & 0x7fffffff) > 0x7f800000) ? quiet : rounded, VecH);
  memcpy(p, &h, sizeof h);
}
static inline void store(half_t* p, VecF v) {
#if defined(PACKOPS_F16C) && PACKOPS_LANES == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(PACKOPS_F16C) && PACKOPS_LANES == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < PACKOPS_LANES; i++) p[i] = from_float<half_t>(v[i]);
#endif
}

// ---- Elements of type T in vectors of the type that they are computed in: floats, or for T = double doubles.

typedef double VecD __attribute__((vector_size(PACKOPS_LANES * 4)));
typedef int64_t VecL __attribute__((vector_size(PACKOPS_LANES * 4)));

template <typename T>
struct Lane {
  using State = float;
  using V = VecF;
  static constexpr int kLanes = PACKOPS_LANES;
  static V read(const T* p) { return load(p); }
  static void write(T* p, V v) { store(p, v); }
  static float read1(const T* p) { return to_float(*p); }
  static void write1(T* p, float x) { *p = from_float<T>(x); }
  static V swap_neighbours(V v) {
    VecI other;
    for (int i = 0; i < kLanes; i++) other[i] = i ^ 1;
    return __builtin_shuffle(v, other);
  }
};
template <>
struct Lane<double> {
  using State = double;
  using V = VecD;
  static constexpr int kLanes = PACKOPS_LANES / 2;
  static V read(const double* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void write(double* p, V v) { memcpy(p, &v, sizeof v); }
  static double read1(const double* p) { return *p; }
  static void write1(double* p, double x) { *p = x; }
  static V swap_neighbours(V v) {
    VecL other;
    for (int i = 0; i < kLanes; i++) other[i] = i ^ 1;
    return __builtin_shuffle(v, other);
  }
};

// ---- Functions

// e^x to about one ulp: x = n ln2 + r, |r| <= ln2/2, a degree-6 polynomial, 2^n through the exponent bits. 0 below -87.3 (where
// the result would be subnormal), +inf above 88.7, NaN stays NaN.
static inline VecF vexp(VecF x) {
  const VecF low = splat(-87.33654f), high = splat(88.72283f);
  VecF clamped = x < low ? low : (x > high ? high : x);
  VecF shifted = clamped * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low bits now hold round(x / ln2)
  VecI n = (VecI)shifted - 0x4b400000;
  VecF rounded = shifted - 12582912.f;
  VecF r = clamped - rounded * 0.693359375f - rounded * -2.12194440e-4f;
  VecF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  // Two factors, because 2^128 is no float.
  VecI half = n >> 1;
  VecF result = p * (VecF)((half + 127) << 23) * (VecF)((n - half + 127) << 23);
  result = select(x < low, splat(0.f), result);
  return select(x > high, splat(std::numeric_limits<float>::infinity()), result);
}

// tanh x: an odd polynomial near 0, where 1 - 2/(e^2x + 1) would lose digits.
static inline VecF vtanh(VecF x) {
  VecF magnitude = x < 0.f ? -x : x;
  VecF large = 1.f - 2.f / (vexp(2.f * magnitude) + 1.f);
  VecF z = x * x;
  VecF p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  VecF small = p * z * x + x;
  return select(magnitude < 0.625f, small, x < 0.f ? -large : large);
}

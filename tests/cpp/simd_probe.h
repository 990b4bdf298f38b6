// Whole arrays through the vectors of common/simd.h, for test_simd.cpp: compiled once per instruction set, no include guard.

template <typename T>
static void load_array(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i + PACKOPS_LANES <= n; i += PACKOPS_LANES) store(out + i, load(in + i));
}
template <typename T>
static void store_array(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i + PACKOPS_LANES <= n; i += PACKOPS_LANES) store(out + i, load(in + i));
}
static void load_halves(const half_t* in, float* out, int64_t n) { load_array(in, out, n); }
static void load_bf16s(const bf16_t* in, float* out, int64_t n) { load_array(in, out, n); }
static void store_halves(const float* in, half_t* out, int64_t n) { store_array(in, out, n); }
static void store_bf16s(const float* in, bf16_t* out, int64_t n) { store_array(in, out, n); }
static void exp_array(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i + PACKOPS_LANES <= n; i += PACKOPS_LANES) store(out + i, vexp(load(in + i)));
}
static void tanh_array(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i + PACKOPS_LANES <= n; i += PACKOPS_LANES) store(out + i, vtanh(load(in + i)));
}
static float sum_of(const float* in) { return horizontal_sum(load(in)); }
static float max_of(const float* in) { return horizontal_max(load(in)); }

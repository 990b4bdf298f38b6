// Vectors and 16-bit conversions of the CPU kernels, on every instruction set of this machine.
#include <algorithm>
#include <limits>

#define PACKOPS_SIMD_FILE "simd_probe.h"
#include "common/simd_targets.h"

#include "isa.h"

using namespace packops;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kAll = 1 << 16;  // every 16-bit number; a multiple of every vector

// What the bits of a half or a bf16 mean, from the definition of the format.
double value_of(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
  const double mantissa = bits & ((1 << mantissa_bits) - 1), sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * double(kInf) : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}
double value_of(half_t x) { return value_of(x.bits, 5, 10); }
double value_of(bf16_t x) { return value_of(x.bits, 8, 7); }

template <typename T>
std::vector<T> every_number() {
  std::vector<T> all(kAll);
  for (int64_t i = 0; i < kAll; i++) all[i].bits = uint16_t(i);
  return all;
}

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

// Every finite number, both its neighbours' midpoints, and one ulp beside those: what rounding can get wrong.
template <typename T>
std::vector<float> around_every_number() {
  std::vector<float> all;
  for (int sign : {1, -1}) {
    for (uint32_t bits = 0; bits < 0x7fff; bits++) {
      const double low = value_of(T{uint16_t(bits)}), high = value_of(T{uint16_t(bits + 1)});
      if (!std::isfinite(high)) break;
      const float middle = float(sign * (low + high) / 2);  // exact: fp32 has more digits than either format
      all.insert(all.end(), {float(sign * low), middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)});
    }
  }
  all.insert(all.end(), {kInf, -kInf, NAN, float_of(0x7f800001), float_of(0xff800001), 3.4e38f, -3.4e38f, 65519.f, 65520.f,
                         -65520.f, 1e-45f, 0.f, -0.f});
  while (all.size() % 16) all.push_back(1.f);
  return all;
}

// The number of format T nearest to x, by looking at both neighbours; ties to even.
template <typename T>
double nearest(float x, double largest, double step_past_largest) {
  if (!std::isfinite(x)) return x;
  if (std::abs(double(x)) >= largest + step_past_largest / 2) return std::copysign(double(kInf), double(x));
  uint32_t low = 0, high = 0x7fff;  // the largest number not above |x|
  while (low + 1 < high) {
    const uint32_t middle = (low + high) / 2;
    const double v = value_of(T{uint16_t(middle)});
    if (v <= std::abs(double(x))) low = middle;
    else high = middle;
  }
  const double below = value_of(T{uint16_t(low)}), above = value_of(T{uint16_t(low + 1)});
  const double up = std::isfinite(above) ? above - std::abs(double(x)) : step_past_largest - (std::abs(double(x)) - below);
  const double down = std::abs(double(x)) - below;
  const double magnitude = down < up || (down == up && low % 2 == 0) ? below : above;
  return std::copysign(magnitude, double(x));
}

template <typename T, typename Load, typename Store>
void check_conversions(Load load, Store store, double largest, double step) {
  const auto numbers = every_number<T>();
  std::vector<float> floats(kAll);
  load(numbers.data(), floats.data(), kAll);
  int wrong = 0;
  for (int64_t i = 0; i < kAll; i++)
    wrong += !same(floats[i], value_of(numbers[i])) + !same(to_float(numbers[i]), value_of(numbers[i]));
  CHECK_EQ(wrong, 0);

  const auto inputs = around_every_number<T>();
  std::vector<T> rounded(inputs.size());
  store(inputs.data(), rounded.data(), int64_t(inputs.size()));
  wrong = 0;
  for (size_t i = 0; i < inputs.size(); i++) {
    const double want = nearest<T>(inputs[i], largest, step);
    wrong += !same(value_of(rounded[i]), want) + !same(value_of(from_float<T>(inputs[i])), want);
  }
  CHECK_EQ(wrong, 0);
}

// Largest error in units in the last place of float.
template <typename F, typename G>
double worst_ulp(const std::vector<float>& x, F f, G exact) {
  std::vector<float> y(x.size());
  f(x.data(), y.data(), int64_t(x.size()));
  double worst = 0;
  for (size_t i = 0; i < x.size(); i++) {
    const double want = exact(double(x[i]));
    const double ulp = std::ldexp(1.0, std::max(std::ilogb(std::abs(want)), -126) - 23);
    worst = std::max(worst, std::abs(double(y[i]) - want) / ulp);
  }
  return worst;
}

std::vector<float> spread(float low, float high, int64_t n) {
  std::vector<float> x(n);
  for (int64_t i = 0; i < n; i++) x[i] = low + (high - low) * float(i) / float(n - 1);
  return x;
}

}  // namespace

CASE(half_precision_converts_exactly_and_rounds_to_even) {
  for_each_isa([](CpuIsa isa) {
    check_conversions<half_t>(PACKOPS_OF_ISA(isa, load_halves), PACKOPS_OF_ISA(isa, store_halves), 65504, 32);
  });
}

CASE(bfloat16_converts_exactly_and_rounds_to_even) {
  for_each_isa([](CpuIsa isa) {
    check_conversions<bf16_t>(PACKOPS_OF_ISA(isa, load_bf16s), PACKOPS_OF_ISA(isa, store_bf16s), std::ldexp(255.0, 120),
                              std::ldexp(1.0, 120));
  });
}

CASE(exponential_is_good_to_an_ulp_and_ends_well) {
  for_each_isa([](CpuIsa isa) {
    const auto f = PACKOPS_OF_ISA(isa, exp_array);
    CHECK(worst_ulp(spread(-87.3f, 88.7f, 1 << 20), f, [](double x) { return std::exp(x); }) < 1);
    CHECK(worst_ulp(spread(-0.01f, 0.01f, 1 << 16), f, [](double x) { return std::exp(x); }) < 1);
    std::vector<float> x = {0, -0.f, -kInf, kInf, NAN, -88, -1e30f, 89, 3e38f, 88.8f, -87.4f, 1, 1, 1, 1, 1}, y(16);
    f(x.data(), y.data(), 16);
    const double want[11] = {1, 1, 0, kInf, NAN, 0, 0, kInf, kInf, kInf, 0};
    for (int i = 0; i < 11; i++) CHECK(same(y[i], want[i]));
  });
}

CASE(hyperbolic_tangent_is_good_to_two_ulps_everywhere) {
  for_each_isa([](CpuIsa isa) {
    const auto f = PACKOPS_OF_ISA(isa, tanh_array);
    for (float end : {12.f, 0.7f, 1e-3f})
      CHECK(worst_ulp(spread(-end, end, 1 << 18), f, [](double x) { return std::tanh(x); }) < 1.5);
    std::vector<float> x = {kInf, -kInf, NAN, 0, 100, -100, 1e-30f, 3e38f, 1, 1, 1, 1, 1, 1, 1, 1}, y(16);
    f(x.data(), y.data(), 16);
    const double want[8] = {1, -1, NAN, 0, 1, -1, 1e-30f, 1};
    for (int i = 0; i < 8; i++) CHECK(same(y[i], want[i]));
  });
}

CASE(reductions_see_every_lane) {
  for_each_isa([](CpuIsa isa) {
    const int lanes = isa == CpuIsa::avx512 ? 16 : isa == CpuIsa::avx2 ? 8 : 4;
    for (int i = 0; i < lanes; i++) {
      std::vector<float> x(16, -3.f);
      x[i] = 5;
      CHECK_EQ(PACKOPS_OF_ISA(isa, max_of)(x.data()), 5.f);
      CHECK_EQ(PACKOPS_OF_ISA(isa, sum_of)(x.data()), 5.f - 3 * (lanes - 1));
    }
  });
}

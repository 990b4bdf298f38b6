// What the C++ tests need of a test framework: cases that register themselves, and checks that say what they saw.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace check {

inline int failures = 0;
inline const char* running = "";  // the case

struct Case {
  const char* name;
  std::function<void()> run;
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(const char* name, std::function<void()> run) { cases().push_back({name, std::move(run)}); }
};

template <typename T>
std::string show(const T& value) {
  std::ostringstream text;
  text.precision(9);
  text << value;
  return text.str();
}

// With STOP_AT_FIRST_FAILURE in the environment the program ends here, as pytest -x does.
inline void fail(const char* file, int line, const std::string& message) {
  failures++;
  std::printf("%s:%d: %s\n", file, line, message.c_str());
  if (!std::getenv("STOP_AT_FIRST_FAILURE")) return;
  std::printf("FAILED %s\n", running);
  std::fflush(stdout);
  std::_Exit(1);
}

inline bool close(double got, double want, double tolerance) {
  if (std::isnan(want) || std::isinf(want)) return std::isnan(want) ? std::isnan(got) : got == want;
  return std::abs(got - want) <= tolerance * (1 + std::abs(want));
}

// The same numbers on every machine: std::mt19937_64 is specified, the distributions of the standard library are not.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double uniform() { return double(engine_() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
  int64_t below(int64_t n) { return int64_t(engine_() % uint64_t(n)); }

 private:
  std::mt19937_64 engine_;
};

}  // namespace check

#define CASE(name)                                             \
  static void name();                                          \
  static const check::Register register_##name(#name, (name)); \
  static void name()

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) check::fail(__FILE__, __LINE__, "CHECK(" #condition ") failed"); \
  } while (0)

#define CHECK_EQ(got, want)                                                                                                 \
  do {                                                                                                                      \
    const auto got_ = (got);                                                                                                \
    const auto want_ = (want);                                                                                              \
    if (!(got_ == want_)) check::fail(__FILE__, __LINE__, #got " is " + check::show(got_) + ", not " + check::show(want_)); \
  } while (0)

#define CHECK_CLOSE(got, want, tolerance)                                                                        \
  do {                                                                                                           \
    const double got_ = (got), want_ = (want);                                                                   \
    if (!check::close(got_, want_, (tolerance)))                                                                 \
      check::fail(__FILE__, __LINE__, #got " is " + check::show(got_) + ", not close to " + check::show(want_)); \
  } while (0)

int main(int count, char** arguments) {  // names of cases, or none for all
  for (const auto& test : check::cases()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; i++) wanted |= test.name == std::string(arguments[i]);
    if (!wanted) continue;
    const int before = check::failures;
    check::running = test.name;
    try {
      test.run();
    } catch (const std::exception& error) {
      check::fail(test.name, 0, std::string("exception: ") + error.what());
    }
    std::printf("%s %s\n", check::failures == before ? "ok    " : "FAILED", test.name);
  }
  if (check::cases().empty()) check::fail(__FILE__, __LINE__, "no cases");
  return check::failures ? 1 : 0;
}

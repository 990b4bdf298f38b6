// Errors that cross from C++ to Python. The stable ABI turns every exception into a RuntimeError, so the message carries the
// Python type in front ("packops.ValueError: ..."), and python/packops/_errors.py raises that type.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace packops {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

template <typename... Args>
[[noreturn]] void raise(const char* python_type, const Args&... args) {
  std::ostringstream message;
  message << "packops." << python_type << ": ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); i++) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string dtype_of(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

inline const char* device_of(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda" : tensor.is_cpu() ? "cpu" : "another device";
}

}  // namespace packops

// PACKOPS_CHECK(condition, ValueError, "cross_entropy: labels must ..., got ", x): one line a check. The message says which
// argument, what it wants, what it got.
#define PACKOPS_CHECK(condition, python_type, ...)                                    \
  do {                                                                                \
    if (__builtin_expect(!(condition), 0)) packops::raise(#python_type, __VA_ARGS__); \
  } while (0)

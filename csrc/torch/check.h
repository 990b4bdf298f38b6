// Errors, and the checks that ops share. A message says which argument of which op it is about, what the op wants, and what it got.
//
// An error has a Python type. In Python it is raised as that type (torch/error.h); in a C++ program it is a std::runtime_error whose
// message begins with the type ("packops.ValueError: ...").
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "torch/error.h"
#include "torch/stable.h"

namespace packops {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

template <typename... Args>
[[noreturn, gnu::cold]] void raise(const char* python_type, const Args&... args) {
  std::ostringstream message;
  message << "packops.";
  (message << ... << args);
  throw_error(python_type, message.str());
}

template <typename Numbers>
std::string tuple_of(const Numbers& numbers) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < numbers.size(); i++) text << (i ? ", " : "") << numbers[i];
  text << (numbers.size() == 1 ? ",)" : ")");
  return text.str();
}
inline std::string shape_of(const Tensor& tensor) { return tuple_of(tensor.sizes()); }
inline std::string strides_of(const Tensor& tensor) { return tuple_of(tensor.strides()); }

inline std::string dtype_of(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

inline int32_t device_type_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline std::string device_of(const Tensor& tensor) {
  using torch::headeronly::DeviceType;
  const int32_t type = device_type_of(tensor);
  switch (DeviceType(type)) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::CUDA: return "cuda:" + std::to_string(tensor.get_device_index());
    case DeviceType::Meta: return "meta";
    case DeviceType::MPS: return "mps";
    case DeviceType::XPU: return "xpu:" + std::to_string(tensor.get_device_index());
    case DeviceType::XLA: return "xla";
    case DeviceType::HPU: return "hpu";
    case DeviceType::PrivateUse1: return "privateuseone";
    default: return "a device of torch's type " + std::to_string(type);
  }
}

}  // namespace packops

// PACKOPS_CHECK(condition, ValueError, "cross_entropy: labels must ..., got ", x): one line a check.
#define PACKOPS_CHECK(condition, python_type, ...)                                    \
  do {                                                                                \
    if (__builtin_expect(!(condition), 0)) packops::raise(#python_type, __VA_ARGS__); \
  } while (0)

namespace packops {

// ---- One tensor against another, usually the op's first

inline bool same_device(const Tensor& a, const Tensor& b) {
  const int32_t type = device_type_of(a);
  return type == device_type_of(b) &&
         (type == int32_t(torch::headeronly::DeviceType::CPU) || a.get_device_index() == b.get_device_index());
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  PACKOPS_CHECK(same_device(tensor, like), ValueError, op, ": ", name, " must be on the device of ", like_name, ", ",
                device_of(like), ", got ", device_of(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  PACKOPS_CHECK(tensor.scalar_type() == like.scalar_type(), TypeError, op, ": ", name, " must have the dtype of ", like_name,
                ", ", dtype_of(like), ", got ", dtype_of(tensor));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  PACKOPS_CHECK(same_shape(tensor, like), ValueError, op, ": ", name, " must have the shape of ", like_name, ", ", shape_of(like),
                ", got ", shape_of(tensor));
}

// Device, dtype and shape.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  check_dtype(op, name, tensor, like_name, like);
  check_device(op, name, tensor, like_name, like);
  check_shape(op, name, tensor, like_name, like);
}

// ---- Host numbers. The kernels compute with them in fp32: 1e39 would be infinite there, and 1e-46 zero.

inline bool fits_fp32(double value) {
  const double size = std::fabs(value);
  return value == 0 || (size >= double(std::numeric_limits<float>::min()) && size <= double(std::numeric_limits<float>::max()));
}

inline void check_fits_fp32(const char* op, const char* name, double value) {
  PACKOPS_CHECK(fits_fp32(value), ValueError, op, ": ", name, " must be a finite number that float32 can hold, got ", value);
}

inline void check_positive(const char* op, const char* name, double value) {
  PACKOPS_CHECK(value > 0, ValueError, op, ": ", name, " must be positive, got ", value);
  check_fits_fp32(op, name, value);
}

inline void check_not_negative(const char* op, const char* name, double value) {
  PACKOPS_CHECK(value >= 0, ValueError, op, ": ", name, " must not be negative, got ", value);
  check_fits_fp32(op, name, value);
}

}  // namespace packops

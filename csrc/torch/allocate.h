// Every allocation of an op. When memory runs out, the error is torch's own, type and text, as if torch had been called from Python:
// torch.OutOfMemoryError on CUDA, the RuntimeError of DefaultCPUAllocator on the CPU. Code that lowers its batch size looks for these.
//
// The stable ABI reports a failure as a code. From torch 2.13 on it keeps the message; before, it logs the message to stderr. There
// the log is muted for the call, and Python asks torch for as many bytes again, which raises torch's error (_errors.py).
#pragma once

#include <stdexcept>
#include <utility>

#include "torch/check.h"

// Weak: only torch >= 2.13 has the first; the second is no part of any ABI.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
extern __attribute__((weak)) int FLAGS_caffe2_log_level;  // in libc10

namespace packops {

// Where torch cannot be asked for its last message, keeps it from logging that message.
class MutedLog {
 public:
  MutedLog() {
    if (!mutes()) return;
    level_ = FLAGS_caffe2_log_level;
    FLAGS_caffe2_log_level = 3;  // fatal errors only
  }
  ~MutedLog() {
    if (mutes()) FLAGS_caffe2_log_level = level_;
  }
  MutedLog(const MutedLog&) = delete;
  MutedLog& operator=(const MutedLog&) = delete;

 private:
  static bool mutes() { return !torch_exception_get_what_without_backtrace && &FLAGS_caffe2_log_level; }
  int level_ = 0;
};

[[noreturn, gnu::cold]] inline void raise_failed_allocation(const Tensor& like, int64_t bytes) {
  if (!torch_exception_get_what_without_backtrace) throw_error("FailedAllocation", device_of(like) + " " + std::to_string(bytes));
  const std::string text = torch_exception_get_what_without_backtrace();
  const bool memory = text.find("out of memory") != text.npos && text.find("CUDA error") == text.npos && !like.is_cpu();
  throw_error(memory ? "OutOfMemoryError" : "RuntimeError", text);
}

inline int64_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

inline int64_t bytes_of(torch::headeronly::IntHeaderOnlyArrayRef sizes, int64_t element_size) {
  int64_t bytes = element_size;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, size, &bytes)) return std::numeric_limits<int64_t>::max();
  return bytes;
}

constexpr int kMostDims = 16;  // tensors of more dimensions take torch's own way

// An uninitialised tensor on the device of `like`. Straight to the allocator, without a trip through torch's dispatcher.
inline Tensor allocate_strided(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides,
                               ScalarType dtype) {
  AtenTensorHandle out = nullptr;
  AOTITorchError error = 0;
  {
    const MutedLog muted;
    error = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides, int32_t(dtype), device_type_of(like),
                                     like.get_device_index(), &out);
  }
  if (__builtin_expect(error != 0, 0)) raise_failed_allocation(like, bytes_of(sizes, size_of(dtype)));
  return Tensor(out);
}

inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[kMostDims], next = 1;
  PACKOPS_CHECK(sizes.size() <= kMostDims, ValueError, "a tensor may have at most ", kMostDims, " dimensions, got ",
                sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = next;
    // Only a failure can follow an overflow, and torch says which.
    if (__builtin_mul_overflow(next, std::max<int64_t>(sizes[i], 1), &next)) next = std::numeric_limits<int64_t>::max();
  }
  return allocate_strided(like, sizes, strides, dtype);
}

inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return allocate(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Contiguous, of the dtype of `like`.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return allocate(like, sizes, like.scalar_type());
}

inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes, like.scalar_type());
}

// Calls of torch that may copy.
template <typename Call>
Tensor copying(const Tensor& tensor, ScalarType dtype, Call call) {
  try {
    const MutedLog muted;
    return call();
  } catch (const std::runtime_error&) {
    raise_failed_allocation(tensor, bytes_of(tensor.sizes(), size_of(dtype)));
  }
}

inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return copying(tensor, tensor.scalar_type(), [&] { return torch::stable::contiguous(tensor); });
}

// A contiguous copy, whatever the tensor is.
inline Tensor contiguous_copy(const Tensor& tensor) {
  return copying(tensor, tensor.scalar_type(), [&] { return torch::stable::contiguous(torch::stable::clone(tensor)); });
}

inline Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  return copying(tensor, dtype, [&] { return torch::stable::to(tensor, dtype); });
}

inline Tensor allocate_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor out = allocate(like, sizes, dtype);
  return torch::stable::zero_(out);
}

// Whether the tensor covers its memory without gaps and without overlaps: then a tensor of the same strides can be made.
inline bool is_dense(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int dims = int(sizes.size());
  int order[kMostDims];
  if (dims > kMostDims) return false;
  for (int i = 0; i < dims; i++) {
    order[i] = i;
    for (int j = i; j > 0 && strides[size_t(order[j])] < strides[size_t(order[j - 1])]; j--) std::swap(order[j], order[j - 1]);
  }
  int64_t expected = 1;
  for (int i = 0; i < dims; i++) {
    if (sizes[size_t(order[i])] == 1) continue;
    if (strides[size_t(order[i])] != expected) return false;
    expected *= sizes[size_t(order[i])];
  }
  return expected > 0;
}

}  // namespace packops

// A string argument of an op. torch's own conversion to std::string (torch/csrc/stable/stableivalue_conversions.h) leaks a heap
// string per call, up to torch 2.13 at least.
#pragma once

#include <string>

#include "torch/stable.h"

namespace packops {
struct StringArgument : std::string {};
}  // namespace packops

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<packops::StringArgument> {
  static packops::StringArgument call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    packops::StringArgument text;
    text.assign(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)

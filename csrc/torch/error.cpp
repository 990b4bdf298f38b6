#include "torch/error.h"

#include <atomic>
#include <stdexcept>

namespace packops {
namespace {
std::atomic<ErrorHook> installed{nullptr};
}

void throw_error(const char* python_type, const std::string& message) {
  if (const ErrorHook hook = installed.load()) hook(python_type, message.c_str());
  const size_t prefix = message.rfind("packops.", 0) == 0 ? 8 : 0;
  throw std::runtime_error("packops." + std::string(python_type) + ": " + message.substr(prefix));
}

}  // namespace packops

void packops_set_error_hook(packops::ErrorHook hook) { packops::installed.store(hook); }

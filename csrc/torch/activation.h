// The names of the activations of gated MLPs.
#pragma once

#include "gated_linear.h"
#include "torch/check.h"
#include "torch/string.h"

namespace packops {

inline Activation activation_of(const StringArgument& name, const char* op) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  PACKOPS_CHECK(name == "gelu", ValueError, op, ": activation must be 'silu', 'gelu_tanh' or 'gelu', got '", name, "'");
  return Activation::gelu;
}

}  // namespace packops

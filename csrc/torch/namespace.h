// The op namespace, and registration macros that expand it before they paste it.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef PACKOPS_NAMESPACE
#define PACKOPS_NAMESPACE packops
#endif

#define PACKOPS_LIBRARY_(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define PACKOPS_LIBRARY(m) PACKOPS_LIBRARY_(PACKOPS_NAMESPACE, m)
#define PACKOPS_LIBRARY_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define PACKOPS_LIBRARY_IMPL(key, m) PACKOPS_LIBRARY_IMPL_(PACKOPS_NAMESPACE, key, m)

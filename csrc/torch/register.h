// Registration of ops, in one style for all of them.
//
//   PACKOPS_SCHEMAS(m) { m.def("my_op(Tensor x) -> Tensor"); }
//   PACKOPS_KERNELS(m) { m.impl("my_op", TORCH_BOX(&packops::my_op)); }
//
// One function serves the CPU and, in a build with CUDA, CUDA: it looks at the device of its tensors. Fake kernels and autograd
// are in Python (python/packops/). Public ops have plain names; those with a leading underscore are parts that Python puts
// together.
//
// Two libraries that define the same op in one namespace end the process, so experiments are built with another
// PACKOPS_NAMESPACE (python/packops/jit.py).
#pragma once

#include "torch/stable.h"

#ifndef PACKOPS_NAMESPACE
#define PACKOPS_NAMESPACE packops
#endif

// Two steps, so that PACKOPS_NAMESPACE is expanded before torch's macros paste it.
#define PACKOPS_SCHEMAS_(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define PACKOPS_SCHEMAS(m) PACKOPS_SCHEMAS_(PACKOPS_NAMESPACE, m)
#define PACKOPS_KERNELS_FOR_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define PACKOPS_KERNELS_FOR(key, m) PACKOPS_KERNELS_FOR_(PACKOPS_NAMESPACE, key, m)

#ifdef PACKOPS_WITH_CUDA
#define PACKOPS_KERNELS(m)                                                \
  static void packops_implement(torch::stable::detail::StableLibrary& m); \
  PACKOPS_KERNELS_FOR(CPU, cpu) { packops_implement(cpu); }               \
  PACKOPS_KERNELS_FOR(CUDA, cuda) { packops_implement(cuda); }            \
  static void packops_implement(torch::stable::detail::StableLibrary& m)
#else
#define PACKOPS_KERNELS(m) PACKOPS_KERNELS_FOR(CPU, m)
#endif

// RMS norm of rows: the plain interface of rms_norm.cu and rms_norm_cpu.cpp.
//
//   r = 1 / sqrt(mean(x²) + eps)     n = x r     y = n w                          w: weight, or 1 + weight
//   h = grad w                       dx = r (h - n mean(h n))     dweight = Σ over rows of grad n
//
// Computed in fp32 (fp64 for fp64) and rounded once. r is made again in the backward pass, which has x at hand.
//
// With `added`, x is a sum that others read, too, and that sum is an output:
//
//   forward    total = x + added, rounded, and y that of total          backward    dtotal = dx + added, the sum's own gradient
#pragma once

#include <cstdint>

#ifdef PACKOPS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common/dtype.h"

namespace packops {

// Inputs have strides between rows, in elements; the elements of a row are contiguous. Outputs are contiguous.
struct RmsNormParams {
  const void *x = nullptr, *grad = nullptr;
  int64_t x_row = 0, grad_row = 0;
  const void* weight = nullptr;
  const void* added = nullptr;  // or null
  int64_t added_row = 0;
  void* out = nullptr;    // y, or dx
  void* total = nullptr;  // forward, with `added`
  int64_t rows = 0, columns = 0;
  DType dtype = DType::f32;  // of all tensors
  bool zero_centered = false;
  double eps = 1e-6;

  // Backward. Shares of the weight's gradient, (partials, columns) fp32 (fp64), added in a fixed order.
  void* partial = nullptr;
  int64_t partials = 0;
  void* weight_grad = nullptr;

  bool backward() const { return weight_grad; }  // without rows x and grad may be null
};

// The CPU splits rows into a fixed number of shares, so that the sums do not depend on the number of threads. It does [begin,
// end).
int64_t rms_norm_cpu_shares(const RmsNormParams& params);
void rms_norm_cpu(const RmsNormParams& params, int64_t begin, int64_t end);
void rms_norm_cpu_finish(const RmsNormParams& params);  // adds the partials

#ifdef PACKOPS_WITH_CUDA
// f32, f16 and bf16 whose rows are whole 16-byte vectors, aligned, and at most rms_norm_most_columns (rms_norm_launch.h).
cudaError_t rms_norm_cuda_partials(RmsNormParams& params);  // sets partials; weight_grad must be set
cudaError_t rms_norm_cuda(const RmsNormParams& params, cudaStream_t stream);
#endif

}  // namespace packops

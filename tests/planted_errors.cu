// Runs RMS norm's kernels, from a copy of csrc/ in which tests/sanitizer.py has planted an error. A tool of compute-sanitizer that
// does not find its error here (a driver that it does not know, a flag that is misspelt) has said nothing about packops' kernels.
#include "rms_norm.cu"

// All tensors are contiguous fp32 on the device: x, grad and out (rows, columns), weight and weight_grad (columns,), partial as many
// rows as x. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int packops_planted(const float* x, const float* grad, const float* weight,
                                                                      float* out, float* partial, float* weight_grad, int64_t rows,
                                                                      int64_t columns, bool backward) {
  packops::RmsNormParams p;
  p.x = x, p.x_row = columns, p.weight = weight, p.out = out, p.rows = rows, p.columns = columns;
  if (backward) {
    p.grad = grad, p.grad_row = columns, p.partial = partial, p.weight_grad = weight_grad;
    if (const cudaError_t error = packops::rms_norm_cuda_partials(p); error != cudaSuccess) return int(error);
    if (p.partials > rows) return int(cudaErrorInvalidValue);
  }
  const cudaError_t error = packops::rms_norm_cuda(p, nullptr);
  return int(error != cudaSuccess ? error : cudaDeviceSynchronize());
}

// One error for each tool of compute-sanitizer, planted on purpose: tests/sanitize.py runs each kernel under its tool and asks
// whether the tool finds it. A tool that finds nothing here (a driver that it does not know, a flag that is misspelt) has said
// nothing about packops' kernels either.
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 96;

// memcheck: one element past the end.
__global__ void planted_write_out_of_bounds(float* data, int count) { data[count - kThreads + 1 + threadIdx.x] = 1; }

// racecheck: each thread reads what its neighbour in another warp writes, and nothing orders the two.
__global__ void planted_race(float* data, int count) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = shared[(threadIdx.x + 32) % kThreads];
}

// synccheck: a barrier of the block that some of its threads never reach.
__global__ void planted_divergent_barrier(float* data, int count) {
  if (threadIdx.x < kThreads - 16) {
    data[threadIdx.x] += 1;
    __syncthreads();
  }
}

// initcheck: reads memory that nobody wrote.
__global__ void planted_read_of_nothing(float* data, int count) {
  const float read = data[threadIdx.x];
  if (read > 0) data[threadIdx.x] = read + 1;
}

using Kernel = void (*)(float*, int);

int run(Kernel kernel, float* data, int count) {
  kernel<<<1, kThreads>>>(data, count);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return int(error);
}

}  // namespace

extern "C" {
int planted_memcheck(float* data, int count) { return run(planted_write_out_of_bounds, data, count); }
int planted_racecheck(float* data, int count) { return run(planted_race, data, count); }
int planted_synccheck(float* data, int count) { return run(planted_divergent_barrier, data, count); }
int planted_initcheck(float* data, int count) { return run(planted_read_of_nothing, data, count); }
}

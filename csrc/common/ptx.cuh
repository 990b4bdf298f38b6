// The instructions that C++ cannot spell. tests/emulator has its own, for machines without a GPU.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "emulated_ptx.h"
#else

namespace packops {

__device__ __forceinline__ float exp2_approx(float x) {  // relative error 2^-22; flushes subnormals; 0 at -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {  // relative error 2^-23; flushes subnormals; 0 at inf
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {  // absolute error 2^-22 near 1, elsewhere relative; -inf at 0
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A barrier for `threads` threads of the block; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A launch that may begin before the one ahead of it on the stream has ended (see launch_with) waits for that one's results here,
// in every thread and before anything else touches memory; and it lets the next such launch begin. Nothing before sm_90.
__device__ __forceinline__ void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global into shared memory, past the L1. The thread that asked for it may read them after wait_for_copies.
__device__ __forceinline__ void copy16_async(void* destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(destination)), "l"(source) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- sm_90 and later: bulk copies into shared memory that report to an mbarrier, and messages between the blocks of a cluster.
// Older architectures' kernels must not call them.

using MBarrier = uint64_t;  // lives in shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(MBarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(MBarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive, and expect that many more bytes in this phase.
__device__ __forceinline__ void barrier_expect(MBarrier* barrier, uint32_t bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
inline constexpr uint32_t kSuspend =
    10'000'000;  // ns that a waiting thread may sleep: polling would take issue slots from others
// Wait until the phase of that parity has completed.
__device__ __forceinline__ void barrier_wait(MBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra finished;\n"
      "bra retry;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity), "r"(kSuspend)
      : "memory");
}
// The same for a phase that writes of other blocks of the cluster complete.
__device__ __forceinline__ void barrier_wait_cluster(MBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra finished;\n"
      "bra retry;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity), "r"(kSuspend)
      : "memory");
}

// Global to shared; both 16-byte aligned, bytes a multiple of 16. Completion is reported to the barrier.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, MBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes 16 bytes into the same place of another block's shared memory and reports them to that block's barrier.
__device__ __forceinline__ void send16(void* destination, uint4 value, MBarrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %6;\n"
      "mapa.shared::cluster.u32 remote_barrier, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%1, %2, %3, %4}, [remote_barrier];\n"
      "}" ::"r"(shared_address(destination)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

#endif

}  // namespace packops

#endif

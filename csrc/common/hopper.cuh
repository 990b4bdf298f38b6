// Instructions that only sm_90a has, or that only kernels for it use: tensor copies with multicast, wide products by a warp group,
// barriers of a cluster. Named after PTX's instructions. Callers stand within #ifdef PACKOPS_SM90A.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/ptx.cuh"

#ifndef __CUDACC__
#define PACKOPS_SM90A
#include "emulated_hopper.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PACKOPS_SM90A

#include <cuda.h>  // CUtensorMap

namespace packops {
namespace hopper {

// ---- mbarrier

// On the same barrier of another block of the cluster, or of this one.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, int block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(block)
      : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finished;\nbra "
      "retry;\nfinished:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- Tensor copies (TMA). x: first column, y: first row of the box. What lies beyond the matrix is read as 0 and not written.

__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap& map, int x, int y, int z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// Into the same place of all blocks of the cluster in `blocks`, and reported to the same barrier of each.
__device__ __forceinline__ void tma_load_2d_multicast(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void tma_store_2d(const CUtensorMap& map, const void* from, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;" ::"l"(&map),
      "r"(shared_address(from)), "r"(x), "r"(y)
      : "memory");
}
// The same, but adds fp32 numbers to those that are there.
__device__ __forceinline__ void tma_reduce_add_2d(const CUtensorMap& map, const void* from, int x, int y) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
      "[%1];\ncp.async.bulk.commit_group;" ::"l"(&map),
      "r"(shared_address(from)), "r"(x), "r"(y)
      : "memory");
}
// Until the stores of this thread have read their shared memory.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ---- Warp groups

// The compiler must not read these registers before this place.
template <int kCount>
__device__ __forceinline__ void hold(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums (64 x 192) = or, with add, += a b^T over 16 elements of 64 and of 192 rows; of a transposed operand, over 16 rows. Thread t of the group has, of every eight columns 8 j, sums[4 j], [4 j + 1] in row 16 (t / 32) + t % 32 / 4, columns
// 8 j + 2 (t % 4) and the next; [4 j + 2], [4 j + 3] 8 rows below.
#define PACKOPS_FOUR(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define PACKOPS_SIXTEEN(i) PACKOPS_FOUR(i), PACKOPS_FOUR(i + 4), PACKOPS_FOUR(i + 8), PACKOPS_FOUR(i + 12)
#define PACKOPS_WGMMA_64_192(type, name)                                                                                    \
  template <bool kTransposedA, bool kTransposedB>                                                                           \
  __device__ __forceinline__ void wgmma_m64n192k16(float (&s)[96], WgmmaDescriptor a, WgmmaDescriptor b, bool add, type) {  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\nwgmma.mma_async.sync.aligned.m64n192k16.f32." name "." name \
                 " {" PACKOPS_NUMBERS_96 "}, %96, %97, add, 1, 1, %99, %100;\n}"                                            \
                 : PACKOPS_SIXTEEN(0), PACKOPS_SIXTEEN(16), PACKOPS_SIXTEEN(32), PACKOPS_SIXTEEN(48), PACKOPS_SIXTEEN(64),  \
                   PACKOPS_SIXTEEN(80)                                                                                      \
                 : "l"(a.bits()), "l"(b.bits()), "r"(int(add)), "n"(kTransposedA), "n"(kTransposedB));                      \
  }
PACKOPS_WGMMA_64_192(bf16_t, "bf16")
PACKOPS_WGMMA_64_192(half_t, "f16")

}  // namespace hopper
}  // namespace packops

#endif

// The instructions that C++ cannot spell. tests/emulator has its own, for machines without a GPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

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
// The same, or zeros.
__device__ __forceinline__ void copy16_async_or_zero(void* destination, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy4_async_or_zero(void* destination, const void* source, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(destination)), "l"(source), "r"(there ? 4 : 0)
               : "memory");
}
// What a thread asked for since it last closed a group is a group; and wait for all groups but the newest ones.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
__device__ __forceinline__ void wait_for_copies_before() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// ---- Products of small matrices by a warp. Lane l has row l / 4 of an 8 x 8 matrix of 16-bit elements, columns 2 (l % 4) and the next.

// Four such matrices from shared memory: lane l names where row l % 8 of matrix l / 8 begins, 16 bytes, aligned.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// sum (16 x 8, fp32: rows l / 4 and l / 4 + 8) += a (16 x 16: upper left, lower left, upper right, lower right) times b (16 x 8,
// transposed: k up to 8, and from 8 on).
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16_t) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half_t) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- sm_90a alone: products by a warp group, four warps that run them together (wgmma). Operands in shared memory are rows of 128
// bytes, 64 elements of 16 bits, whose 16-byte chunks are permuted by exclusive or with the row's number modulo 8; tiles begin at
// multiples of 1024 bytes. Sums are as in multiply_add, 16 rows to a warp.

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What threads wrote, asynchronous copies that they waited for included, can be seen by products that begin after a barrier.
__device__ __forceinline__ void show_to_group_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Around the products of a group: registers and memory are theirs from begin to wait.
__device__ __forceinline__ void begin_group_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_group_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kNewest>
__device__ __forceinline__ void wait_for_group_products_before() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
}
// The compiler must not move what reads or writes these registers across this place.
template <int kColumns>
__device__ __forceinline__ void hold(float (&sums)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sums[n][i])::"memory");
}

// A tile as an operand, and where in it a product begins, in bytes.
class GroupOperand {
 public:
  __device__ __forceinline__ explicit GroupOperand(const void* tile)
      : bits_((shared_address(tile) >> 4 & 0x3fff) | kEightRows | kSwizzled128) {}
  __device__ __forceinline__ GroupOperand at(int bytes) const {
    GroupOperand other = *this;
    other.bits_ += uint32_t(bytes) >> 4;
    return other;
  }
  __device__ __forceinline__ uint64_t bits() const { return bits_; }

 private:
  static constexpr uint64_t kEightRows = uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32;  // 1024 bytes to the next eight rows
  static constexpr uint64_t kSwizzled128 = uint64_t(1) << 62;
  uint64_t bits_;
};

#define PACKOPS_NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PACKOPS_NUMBERS_32 PACKOPS_NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PACKOPS_SUMS_4(n) "+f"(s[n][0]), "+f"(s[n][1]), "+f"(s[n][2]), "+f"(s[n][3])
#define PACKOPS_SUMS_16 PACKOPS_SUMS_4(0), PACKOPS_SUMS_4(1), PACKOPS_SUMS_4(2), PACKOPS_SUMS_4(3)
#define PACKOPS_SUMS_32 PACKOPS_SUMS_16, PACKOPS_SUMS_4(4), PACKOPS_SUMS_4(5), PACKOPS_SUMS_4(6), PACKOPS_SUMS_4(7)

// s (64 x columns) = or, with add, += 64 rows of a times that many rows of b, over 16 elements.
#define PACKOPS_MULTIPLY_ROWS(type, name, columns, numbers, sums, a_at, b_at, add_at)                                            \
  __device__ __forceinline__ void multiply_rows_by_group(float (&s)[columns / 8][4], GroupOperand a, GroupOperand b, bool add,   \
                                                         type) {                                                                 \
    asm volatile("{.reg .pred add;\nsetp.ne.b32 add, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name \
                 "." name " {" numbers "}, " a_at ", " b_at ", add, 1, 1, 0, 0;\n}"                                              \
                 : sums                                                                                                          \
                 : "l"(a.bits()), "l"(b.bits()), "r"(int(add))                                                                   \
                 : "memory");                                                                                                    \
  }
// s (64 x 64) += a (64 x 16, 16 rows to a warp as in multiply_add) times 16 rows of b, 64 elements each.
#define PACKOPS_GROUP_PRODUCTS(type, name)                                                                                     \
  PACKOPS_MULTIPLY_ROWS(type, name, 32, PACKOPS_NUMBERS_16, PACKOPS_SUMS_16, "%16", "%17", "%18")                              \
  PACKOPS_MULTIPLY_ROWS(type, name, 64, PACKOPS_NUMBERS_32, PACKOPS_SUMS_32, "%32", "%33", "%34")                              \
  __device__ __forceinline__ void add_weighted_rows_by_group(float (&s)[8][4], const uint32_t (&a)[4], GroupOperand b, type) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" PACKOPS_NUMBERS_32                           \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                                                   \
                 : PACKOPS_SUMS_32                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits())                                                   \
                 : "memory");                                                                                                  \
  }
PACKOPS_GROUP_PRODUCTS(bf16_t, "bf16")
PACKOPS_GROUP_PRODUCTS(half_t, "f16")

#else  // only so that kernels which are never launched here compile

struct GroupOperand {
  __device__ __forceinline__ explicit GroupOperand(const void*) {}
  __device__ __forceinline__ GroupOperand at(int) const { return *this; }
};

__device__ __forceinline__ void show_to_group_products() {}
__device__ __forceinline__ void begin_group_products() {}
__device__ __forceinline__ void close_group_products() {}
template <int kNewest>
__device__ __forceinline__ void wait_for_group_products_before() {}
template <int kColumns>
__device__ __forceinline__ void hold(float (&)[kColumns][4]) {}
template <int kColumns, typename T>
__device__ __forceinline__ void multiply_rows_by_group(float (&)[kColumns][4], GroupOperand, GroupOperand, bool, T) {}
template <typename T>
__device__ __forceinline__ void add_weighted_rows_by_group(float (&)[8][4], const uint32_t (&)[4], GroupOperand, T) {}

#endif

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

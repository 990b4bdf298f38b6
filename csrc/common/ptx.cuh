// PTX instructions that C++ cannot express, named after them. tests/emulator/emulated_ptx.h has them for machines without a GPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifndef __CUDACC__
#include "emulated_ptx.h"
#else

namespace packops {

__device__ __forceinline__ float ex2_approx(float x) {  // relative error 2^-22; flushes subnormals; 0 at -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {  // relative error 2^-23; flushes subnormals; 0 at inf
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2_approx(float x) {  // absolute error 2^-22 near 1, elsewhere relative; -inf at 0
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// bar.sync: barrier `id` for `threads` threads of the block. Barrier 0 is __syncthreads. bar.arrive: counts among them, and goes on.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// griddepcontrol.wait, then launch_dependents. A launch that may start before the previous one has ended (see launch_with) waits
// here for that one's results. Every thread calls it before it touches global memory. Then the next such launch may start. Code
// for architectures before sm_90 has no such instruction: its launches must not overlap.
__device__ __forceinline__ void griddepcontrol_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Its second half: the next launch may begin once all blocks of this one have come here or ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// cp.async: copies 16 bytes from global to shared memory, bypassing the L1. The thread that issued it may read them after
// cp_async_wait_all.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(destination)), "l"(source) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// The same, or zeros if not `there`.
__device__ __forceinline__ void cp_async_16_zfill(void* destination, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4_zfill(void* destination, const void* source, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(destination)), "l"(source), "r"(there ? 4 : 0)
               : "memory");
}
// cp.async.commit_group: the copies since the last commit form a group. cp.async.wait_group: waits for all but the newest groups.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// ---- Matrix products of a warp. Of an 8 x 8 matrix of 16-bit elements, lane l holds row l / 4, columns 2 (l % 4) and 2 (l % 4)
// + 1.

// ldmatrix: loads four such matrices from shared memory. Lane l passes the address of row l % 8 of matrix l / 8: 16 bytes,
// aligned.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// mma: sum (16 x 8, fp32; a lane holds rows l / 4 and l / 4 + 8) += a (16 x 16, four 8 x 8 matrices: upper left, lower left,
// upper right, lower right) times b (16 x 8, two transposed 8 x 8 matrices: k < 8 and k >= 8).
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16_t) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, half_t) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// fence.proxy.async: makes a thread's writes to shared memory, its completed cp.async included, visible to wgmma and to bulk
// copies after a barrier. sm_90 and later.
__device__ __forceinline__ void fence_proxy_async() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- wgmma, sm_90a only: matrix products of a warpgroup, four warps. Operands in shared memory are rows of 128 bytes (64
// elements of 16 bits) with the 128-byte swizzle: a row's 16-byte chunks are permuted by exclusive or with the row's number
// modulo 8. Tiles are aligned to 1024 bytes. Sums are laid out as in mma_m16n8k16, 16 rows per warp.

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif
// Code with wgmma runs on nothing else (device.h), so products of the other kind are dead code in it.
template <bool kByGroups>
inline constexpr bool kNeverRuns = kByGroups != kHasWgmma;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// wgmma.fence orders register accesses before the products; from there to wgmma.wait_group their registers and memory are off
// limits.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kNewest>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
}
// Compiler barrier: keeps accesses to these registers from moving across the products.
template <int kColumns>
__device__ __forceinline__ void wgmma_fence_operand(float (&sums)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sums[n][i])::"memory");
}

// setmaxnreg: registers of a thread from here on, of all warps of a group.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The matrix descriptor of a tile in shared memory; panel_bytes: from one panel of 64 columns to the next, where a product of more
// columns than that takes rows as its columns. at(): the same tile from that byte on.
class WgmmaDescriptor {
 public:
  __device__ __forceinline__ explicit WgmmaDescriptor(const void* tile, int panel_bytes = 16)
      : low_(__shfl_sync(0xffffffff, (shared_address(tile) >> 4 & 0x3fff) | uint32_t(panel_bytes >> 4) << 16, 0)) {}
  __device__ __forceinline__ WgmmaDescriptor at(int bytes) const {
    WgmmaDescriptor other = *this;
    other.low_ += uint32_t(bytes) >> 4;
    return other;
  }
  __device__ __forceinline__ uint64_t bits() const { return uint64_t(kEightRows | kSwizzled128) << 32 | low_; }

 private:
  static constexpr uint32_t kEightRows = 1024 >> 4;  // 1024 bytes to the next eight rows
  static constexpr uint32_t kSwizzled128 = 1u << 30;
  // All lanes have the same. The compiler does not know that of an address, and would move every one to a uniform register anew, for
  // longer than a product takes.
  uint32_t low_;
};

// "%0, %1, ..., %9" with a tens digit before each, and longer lists of them
#define PACKOPS_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define PACKOPS_NUMBERS_16 PACKOPS_TEN() ", %10, %11, %12, %13, %14, %15"
#define PACKOPS_NUMBERS_32 PACKOPS_TEN() ", " PACKOPS_TEN(1) ", " PACKOPS_TEN(2) ", %30, %31"
#define PACKOPS_NUMBERS_40 PACKOPS_TEN() ", " PACKOPS_TEN(1) ", " PACKOPS_TEN(2) ", " PACKOPS_TEN(3)
#define PACKOPS_NUMBERS_48 PACKOPS_NUMBERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PACKOPS_NUMBERS_50 PACKOPS_NUMBERS_40 ", " PACKOPS_TEN(4)
#define PACKOPS_NUMBERS_56 PACKOPS_NUMBERS_50 ", %50, %51, %52, %53, %54, %55"
#define PACKOPS_NUMBERS_60 PACKOPS_NUMBERS_50 ", " PACKOPS_TEN(5)
#define PACKOPS_NUMBERS_64 PACKOPS_NUMBERS_60 ", %60, %61, %62, %63"
#define PACKOPS_NUMBERS_90 PACKOPS_NUMBERS_60 ", " PACKOPS_TEN(6) ", " PACKOPS_TEN(7) ", " PACKOPS_TEN(8)
#define PACKOPS_NUMBERS_96 PACKOPS_NUMBERS_90 ", %90, %91, %92, %93, %94, %95"
#define PACKOPS_NUMBERS_128 \
  PACKOPS_NUMBERS_90        \
  ", " PACKOPS_TEN(9) ", " PACKOPS_TEN(10) ", " PACKOPS_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PACKOPS_SUMS_4(n) "+f"(s[n][0]), "+f"(s[n][1]), "+f"(s[n][2]), "+f"(s[n][3])
#define PACKOPS_SUMS_8(n) PACKOPS_SUMS_4(n), PACKOPS_SUMS_4(n + 1)
#define PACKOPS_SUMS_16 PACKOPS_SUMS_8(0), PACKOPS_SUMS_8(2)
#define PACKOPS_SUMS_32_FROM(n) PACKOPS_SUMS_8(n), PACKOPS_SUMS_8(n + 2), PACKOPS_SUMS_8(n + 4), PACKOPS_SUMS_8(n + 6)
#define PACKOPS_SUMS_32 PACKOPS_SUMS_32_FROM(0)
#define PACKOPS_SUMS_40 PACKOPS_SUMS_32, PACKOPS_SUMS_8(8)
#define PACKOPS_SUMS_48 PACKOPS_SUMS_40, PACKOPS_SUMS_8(10)
#define PACKOPS_SUMS_56 PACKOPS_SUMS_48, PACKOPS_SUMS_8(12)
#define PACKOPS_SUMS_64 PACKOPS_SUMS_32, PACKOPS_SUMS_32_FROM(8)
#define PACKOPS_SUMS_96 PACKOPS_SUMS_64, PACKOPS_SUMS_32_FROM(16)
#define PACKOPS_SUMS_128 PACKOPS_SUMS_96, PACKOPS_SUMS_32_FROM(24)

// s (64 x columns) = a b^T over 16 elements, or += with `add`. Both operands are in shared memory.
#define PACKOPS_MULTIPLY_ROWS(type, name, columns, numbers, sums, a_at, b_at, add_at)                                            \
  __device__ __forceinline__ void wgmma_ss(float (&s)[columns / 8][4], WgmmaDescriptor a, WgmmaDescriptor b, bool add, type) {   \
    asm volatile("{.reg .pred add;\nsetp.ne.b32 add, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name \
                 "." name " {" numbers "}, " a_at ", " b_at ", add, 1, 1, 0, 0;\n}"                                              \
                 : sums                                                                                                          \
                 : "l"(a.bits()), "l"(b.bits()), "r"(int(add))                                                                   \
                 : "memory");                                                                                                    \
  }
// a is 64 x 16, 16 rows to a warp as in mma_m16n8k16. wgmma_rs: s (64 x columns) = or, with `add`, += a times 16 rows of b.
// wgmma_rs_rows: = or += a b^T over 16 elements, as wgmma_ss.
#define PACKOPS_OF_REGISTERS(wgmma, transposed, type, name, columns, numbers, sums, a_at, b_at, add_at)                          \
  __device__ __forceinline__ void wgmma(float (&s)[columns / 8][4], const uint32_t (&a)[4], WgmmaDescriptor b, bool add, type) { \
    asm volatile("{.reg .pred add;\nsetp.ne.b32 add, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name \
                 "." name " {" numbers "}, {" a_at "}, " b_at ", add, 1, 1, " #transposed ";\n}"                                 \
                 : sums                                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(int(add))                                      \
                 : "memory");                                                                                                    \
  }
// s (64 x columns) = a^T b over 16 elements, or += with `add`: 16 rows of each.
#define PACKOPS_MULTIPLY_COLUMNS(type, name, columns, numbers, sums, a_at, b_at, add_at)                                         \
  __device__ __forceinline__ void wgmma_ss_trans(float (&s)[columns / 8][4], WgmmaDescriptor a, WgmmaDescriptor b, bool add,     \
                                                 type) {                                                                         \
    asm volatile("{.reg .pred add;\nsetp.ne.b32 add, " add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name \
                 "." name " {" numbers "}, " a_at ", " b_at ", add, 1, 1, 1, 1;\n}"                                              \
                 : sums                                                                                                          \
                 : "l"(a.bits()), "l"(b.bits()), "r"(int(add))                                                                   \
                 : "memory");                                                                                                    \
  }
#define PACKOPS_GROUP_PRODUCTS(type, name)                                                                                      \
  PACKOPS_MULTIPLY_ROWS(type, name, 32, PACKOPS_NUMBERS_16, PACKOPS_SUMS_16, "%16", "%17", "%18")                               \
  PACKOPS_MULTIPLY_ROWS(type, name, 64, PACKOPS_NUMBERS_32, PACKOPS_SUMS_32, "%32", "%33", "%34")                               \
  PACKOPS_MULTIPLY_ROWS(type, name, 80, PACKOPS_NUMBERS_40, PACKOPS_SUMS_40, "%40", "%41", "%42")                               \
  PACKOPS_MULTIPLY_ROWS(type, name, 112, PACKOPS_NUMBERS_56, PACKOPS_SUMS_56, "%56", "%57", "%58")                              \
  PACKOPS_MULTIPLY_ROWS(type, name, 128, PACKOPS_NUMBERS_64, PACKOPS_SUMS_64, "%64", "%65", "%66")                              \
  PACKOPS_MULTIPLY_COLUMNS(type, name, 32, PACKOPS_NUMBERS_16, PACKOPS_SUMS_16, "%16", "%17", "%18")                            \
  PACKOPS_MULTIPLY_COLUMNS(type, name, 64, PACKOPS_NUMBERS_32, PACKOPS_SUMS_32, "%32", "%33", "%34")                            \
  PACKOPS_OF_REGISTERS(wgmma_rs, 1, type, name, 64, PACKOPS_NUMBERS_32, PACKOPS_SUMS_32, "%32, %33, %34, %35", "%36", "%37")    \
  PACKOPS_OF_REGISTERS(wgmma_rs, 1, type, name, 96, PACKOPS_NUMBERS_48, PACKOPS_SUMS_48, "%48, %49, %50, %51", "%52", "%53")    \
  PACKOPS_OF_REGISTERS(wgmma_rs, 1, type, name, 128, PACKOPS_NUMBERS_64, PACKOPS_SUMS_64, "%64, %65, %66, %67", "%68", "%69")   \
  PACKOPS_OF_REGISTERS(wgmma_rs, 1, type, name, 192, PACKOPS_NUMBERS_96, PACKOPS_SUMS_96, "%96, %97, %98, %99", "%100", "%101") \
  PACKOPS_OF_REGISTERS(wgmma_rs, 1, type, name, 256, PACKOPS_NUMBERS_128, PACKOPS_SUMS_128, "%128, %129, %130, %131", "%132",   \
                       "%133")                                                                                                  \
  PACKOPS_OF_REGISTERS(wgmma_rs_rows, 0, type, name, 128, PACKOPS_NUMBERS_64, PACKOPS_SUMS_64, "%64, %65, %66, %67", "%68", "%69")
PACKOPS_GROUP_PRODUCTS(bf16_t, "bf16")
PACKOPS_GROUP_PRODUCTS(half_t, "f16")

#else  // only so that kernels which are never launched here compile

struct WgmmaDescriptor {
  __device__ __forceinline__ explicit WgmmaDescriptor(const void*, int = 16) {}
  __device__ __forceinline__ WgmmaDescriptor at(int) const { return *this; }
};

__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit_group() {}
template <int kNewest>
__device__ __forceinline__ void wgmma_wait_group() {}
template <int kColumns>
__device__ __forceinline__ void wgmma_fence_operand(float (&)[kColumns][4]) {}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {}
template <int kColumns, typename T>
__device__ __forceinline__ void wgmma_ss(float (&)[kColumns][4], WgmmaDescriptor, WgmmaDescriptor, bool, T) {}
template <int kColumns, typename T>
__device__ __forceinline__ void wgmma_ss_trans(float (&)[kColumns][4], WgmmaDescriptor, WgmmaDescriptor, bool, T) {}
template <int kColumns, typename T>
__device__ __forceinline__ void wgmma_rs(float (&)[kColumns][4], const uint32_t (&)[4], WgmmaDescriptor, bool, T) {}

#endif

// ---- sm_90 and later: mbarriers, bulk copies into shared memory that complete on one, and stores to other blocks of the
// cluster. Code for older architectures must not call them.

using MBarrier = uint64_t;  // lives in shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void mbarrier_init(MBarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised mbarriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(MBarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier)) : "memory");
}
// mbarrier.arrive.expect_tx: arrives, and the phase waits for that many more bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(MBarrier* barrier, uint32_t bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// How long a waiting thread may sleep, in ns: polling would take issue slots from other warps.
inline constexpr uint32_t kSuspend = 10'000'000;
// Waits until the phase of that parity has completed.
__device__ __forceinline__ void mbarrier_wait_parity(MBarrier* barrier, uint32_t parity) {
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
// The same for a phase that stores of other blocks of the cluster complete.
__device__ __forceinline__ void mbarrier_wait_parity_cluster(MBarrier* barrier, uint32_t parity) {
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

// cp.async.mbarrier.arrive.noinc: arrives once this thread's copies by cp.async so far have landed.
__device__ __forceinline__ void cp_async_mbarrier_arrive(MBarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// cp.async.bulk (TMA) from global to shared memory. Addresses and bytes are multiples of 16. Completes on the mbarrier.
__device__ __forceinline__ void cp_async_bulk(void* destination, const void* source, uint32_t bytes, MBarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// cp.async.bulk from shared to global memory, in groups: what a thread has issued since its last commit is one. Other threads that
// wrote the source need fence_proxy_async(), then a barrier. wait_group: for all but the newest groups; read: until their sources
// were read, so that these may change.
__device__ __forceinline__ void cp_async_bulk_store(void* destination, const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(shared_address(source)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kNewest>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNewest) : "memory");
}
__device__ __forceinline__ void cp_async_bulk_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// stmatrix: four 8 x 8 matrices of 16-bit elements, each lane's pair of each, to rows whose addresses the lanes name, 8 lanes a matrix.
__device__ __forceinline__ void stmatrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&words)[4]) {
  stmatrix_x4(shared_address(row), words[0], words[1], words[2], words[3]);
}

// cp.reduce.async.bulk: the same, but adds fp32 numbers to those that are there.
__device__ __forceinline__ void cp_reduce_async_bulk_add(float* destination, const float* source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}
// A counter that orders what blocks write: one adds to it when its bulk stores have completed, another waits for its value before it
// touches the same memory.
__device__ __forceinline__ void red_release_add(int* counter, int value) {
  asm volatile("fence.proxy.async;\nred.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\nfence.proxy.async;" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ void wait_acquire(const int* counter, int value) {
  while (load_acquire(counter) != value) {}
}

// mbarrier.test_wait: whether the phase of that parity has completed.
__device__ __forceinline__ bool mbarrier_test_wait_parity(MBarrier* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

__device__ __forceinline__ uint32_t cluster_ctarank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_nctarank() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// st.async: stores 16 bytes to the same place in another block's shared memory. Completes on that block's mbarrier.
__device__ __forceinline__ void st_async_16(void* destination, uint4 value, MBarrier* barrier, uint32_t rank) {
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

// csrc/common/ptx.cuh for emulator.h.
#pragma once

#include <cfloat>
#include <map>
#include <vector>

#include "common/dtype.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace packops {

inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }
inline float ex2_approx(float x) { return flush(std::exp2(x)); }
inline float rcp_approx(float x) { return flush(1 / x); }
inline float lg2_approx(float x) { return std::log2(x); }

// Code for older architectures has nothing here, so its launches must not overlap.
inline void griddepcontrol_wait() { emulator::fibers[emulator::current].waited_for_launch = emulator::code_architecture >= 90; }

inline void griddepcontrol_launch_dependents() {}

inline void bar_sync(int id, int threads) {
  if (id == 0) return __syncthreads();
  emulator::wait(emulator::Waiting::for_some_of_block, uint64_t(id) << 32 | uint64_t(threads));
}

inline void bar_arrive(int id, int threads) { emulator::arrive_at_some(uint64_t(id) << 32 | uint64_t(threads)); }
template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}

using MBarrier = uint64_t;

inline void mbarrier_init(MBarrier* barrier, uint32_t arrivals) {
  emulator::needs_sm90("mbarriers");
  emulator::barriers[barrier] = {.arrivals = int(arrivals), .missing = int(arrivals)};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(MBarrier* barrier) { emulator::arrive(barrier); }
inline void mbarrier_arrive_expect_tx(MBarrier* barrier, uint32_t bytes) { emulator::arrive(barrier, bytes); }
inline void mbarrier_wait_parity(MBarrier* barrier, uint32_t parity) { emulator::wait_for_phase(barrier, parity); }
inline void mbarrier_wait_parity_cluster(MBarrier* barrier, uint32_t parity) { emulator::wait_for_phase(barrier, parity); }

inline void cp_async_bulk(void* destination, const void* source, uint32_t bytes, MBarrier* barrier) {
  const auto places = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source) | bytes;
  emulator::require(bytes > 0 && places % 16 == 0, "a bulk copy of something that is not whole 16-byte units");
  emulator::depart({static_cast<char*>(destination), static_cast<const char*>(source), {}, bytes, barrier});
}
inline bool mbarrier_test_wait_parity(MBarrier* barrier, uint32_t parity) { return emulator::is_over(barrier, parity); }
// A thread's copies arrive when it waits for them, not before; until then there is NaN.
struct Copy {
  void* destination;
  const void* source;  // null: zeros
  size_t bytes;
  int group;
};
inline std::map<int, std::vector<Copy>> copies;
inline std::map<int, int> copy_groups;
inline void copy_async(void* destination, const void* source, size_t bytes) {
  const auto places = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source);
  emulator::require(places % bytes == 0, "an asynchronous copy of something that is not aligned");
  std::memset(destination, 0xff, bytes);
  copies[emulator::current].push_back({destination, source, bytes, copy_groups[emulator::current]});
}
inline void cp_async_16(void* destination, const void* source) { copy_async(destination, source, 16); }
inline void cp_async_16_zfill(void* destination, const void* source, bool there) {
  copy_async(destination, there ? source : nullptr, 16);
}
inline void cp_async_4_zfill(void* destination, const void* source, bool there) {
  copy_async(destination, there ? source : nullptr, 4);
}
inline void cp_async_commit_group() { copy_groups[emulator::current]++; }
inline void land_copies_before(int group) {
  std::erase_if(copies[emulator::current], [&](const Copy& copy) {
    if (copy.group >= group) return false;
    if (copy.source) std::memcpy(copy.destination, copy.source, copy.bytes);
    else std::memset(copy.destination, 0, copy.bytes);
    return true;
  });
}
inline void cp_async_mbarrier_arrive(MBarrier* barrier) {
  land_copies_before(copy_groups[emulator::current] + 1);
  emulator::arrive(barrier);
}
inline void cp_async_wait_all() { land_copies_before(copy_groups[emulator::current] + 1); }
template <int kNewest>
void cp_async_wait_group() {
  land_copies_before(copy_groups[emulator::current] - kNewest);
}

// Stores read their source when the thread waits for that, and arrive when it waits for that, or when the block has ended. add: fp32
// numbers are added to those that are there.
struct Store {
  char* destination;
  const char* source;
  size_t bytes;
  int group;
  bool add = false;
  std::vector<char> read = {};
  void land() const {
    if (!add) return void(std::memcpy(destination, read.data(), bytes));
    for (size_t i = 0; i < bytes; i += sizeof(float)) {
      float sum, part;
      std::memcpy(&sum, destination + i, sizeof sum), std::memcpy(&part, read.data() + i, sizeof part);
      sum += part;
      std::memcpy(destination + i, &sum, sizeof sum);
    }
  }
};
inline std::map<int, std::vector<Store>> stores;
inline std::map<int, int> store_groups;
inline void cp_async_bulk_store(void* destination, const void* source, uint32_t bytes) {
  const auto places = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source) | bytes;
  emulator::require(bytes > 0 && places % 16 == 0, "a bulk copy of something that is not whole 16-byte units");
  stores[emulator::current].push_back(
      {static_cast<char*>(destination), static_cast<const char*>(source), bytes, store_groups[emulator::current]});
}
inline void cp_reduce_async_bulk_add(float* destination, const float* source, uint32_t bytes) {
  cp_async_bulk_store(destination, source, bytes);
  stores[emulator::current].back().add = true;
}
inline void cp_async_bulk_commit_group() { store_groups[emulator::current]++; }
template <int kNewest>
void cp_async_bulk_wait_group_read() {
  for (Store& store : stores[emulator::current])
    if (store.read.empty() && store.group < store_groups[emulator::current] - kNewest)
      store.read.assign(store.source, store.source + store.bytes);
}
inline void land_stores_of(std::vector<Store>& of) {
  for (const Store& store : of) {
    emulator::require(!store.read.empty(), "a bulk copy that nobody waits for");
    store.land();
  }
  of.clear();
}
inline void cp_async_bulk_wait_group() {
  cp_async_bulk_wait_group_read<0>();
  land_stores_of(stores[emulator::current]);
}
inline const bool stores_land_in_the_end = [] {
  emulator::when_blocks_end = [] {
    for (auto& [thread, of] : stores) land_stores_of(of);
  };
  return true;
}();
// Blocks run one after the other here, so whoever is waited for has come.
inline void red_release_add(int* counter, int value) {
  emulator::require(stores[emulator::current].empty(), "a release before bulk copies have arrived");
  *counter += value;
}
inline int load_acquire(const int* counter) { return *counter; }
inline void wait_acquire(const int* counter, int value) {
  emulator::require(*counter == value, "a wait for a block that comes later");
}

// ---- Products of small matrices by a warp: lanes show each other where their operands are, and go on when all have read them.

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row, bool transposed) {
  emulator::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a misaligned row of a matrix");
  const emulator::Shown rows = emulator::collective(reinterpret_cast<uintptr_t>(row));
  const int lane = emulator::current % 32;
  for (int i = 0; i < 4; i++) {
    const auto at = [&](int r, int c) { return uint32_t(reinterpret_cast<const uint16_t*>(rows.value[8 * i + r])[c]); };
    const int r = lane / 4, c = 2 * (lane % 4);
    to[i] = transposed ? at(c, r) | at(c + 1, r) << 16 : at(r, c) | at(r, c + 1) << 16;
  }
  emulator::collective(0);
}
inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) { ldmatrix_x4(to, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) { ldmatrix_x4(to, row, true); }

inline void stmatrix_x4(void* row, const uint32_t (&words)[4], bool transposed = false) {
  emulator::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a misaligned row of a matrix");
  const emulator::Shown rows = emulator::collective(reinterpret_cast<uintptr_t>(row));
  const int lane = emulator::current % 32;
  for (int i = 0; i < 4; i++)
    for (int half = 0; half < 2; half++) {
      const int r = lane / 4, c = 2 * (lane % 4) + half;
      reinterpret_cast<uint16_t*>(rows.value[8 * i + (transposed ? c : r)])[transposed ? r : c] = uint16_t(words[i] >> 16 * half);
    }
  emulator::collective(0);
}
// From the beginning of the block's shared memory.
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - static_cast<const char*>(emulator::dynamic_shared()));
}
inline void stmatrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  stmatrix_x4(static_cast<char*>(emulator::dynamic_shared()) + row, {a, b, c, d});
}
inline void stmatrix_x4_trans(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  stmatrix_x4(static_cast<char*>(emulator::dynamic_shared()) + row, {a, b, c, d}, true);
}

inline float element(uint16_t bits, bf16_t) { return __uint_as_float(uint32_t(bits) << 16); }
inline float element(uint16_t bits, half_t) { return __half2float(__ushort_as_half(bits)); }
template <typename T>
void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulator::Shown all = emulator::collective(reinterpret_cast<uintptr_t>(mine));
  const int lane = emulator::current % 32;
  // register i of the lane that has row r of an 8 x 8 matrix, column c
  const auto at = [&](int i, int r, int c) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(all.value[4 * r + c / 2])[i];
    return element(uint16_t(c % 2 ? word >> 16 : word), type);
  };
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2, low = i / 2;
    for (int k = 0; k < 16; k++) sum[i] += at(low + 2 * (k / 8), row, k % 8) * at(4 + k / 8, column, k % 8);
  }
  emulator::collective(0);
}

// ---- Products by a warp group. Done when they are issued: that somebody forgot to wait is not seen.

inline constexpr bool kHasWgmma = true;
template <bool kByGroups>
inline constexpr bool kNeverRuns = false;
inline void needs_wgmma() {
  emulator::require(emulator::code_has_wgmma && emulator::architecture == 90, "this code has no wgmma");
}
inline void fence_proxy_async() {}
inline void wgmma_fence() { needs_wgmma(); }
inline void wgmma_commit_group() {}
template <int kNewest>
void wgmma_wait_group() {}
template <int kColumns>
void wgmma_fence_operand(float (&)[kColumns][4]) {}

class WgmmaDescriptor {
 public:
  explicit WgmmaDescriptor(const void* tile, int panel_bytes = 16)
      : tile_(reinterpret_cast<uintptr_t>(tile)), panel_bytes_(panel_bytes) {
    emulator::require(tile_ % 1024 == 0, "a tile of a warp group's products that does not begin at 1024 bytes");
  }
  WgmmaDescriptor at(int bytes) const {
    WgmmaDescriptor other = *this;
    other.tile_ += uintptr_t(bytes);
    return other;
  }
  uint16_t element(int row, int column) const {
    uintptr_t at = tile_ + uintptr_t(column / 64 * panel_bytes_ + row * 128 + column % 64 * 2);
    at ^= (at >> 7 & 7) << 4;
    return *reinterpret_cast<const uint16_t*>(at);
  }

 private:
  uintptr_t tile_;
  int panel_bytes_;
};
template <int kColumns, typename T, typename F, typename G>
void wgmma_of_shared(float (&s)[kColumns][4], bool add, T type, F&& a, G&& b) {  // a(row, k), b(k, column)
  emulator::collective(0);
  const int lane = emulator::current % 32, warp = emulator::current % emulator::block_threads / 32 % 4;
  for (int n = 0; n < kColumns; n++)
    for (int i = 0; i < 4; i++) {
      const int row = 16 * warp + 8 * (i / 2) + lane / 4, column = 8 * n + 2 * (lane % 4) + i % 2;
      float sum = add ? s[n][i] : 0;
      for (int k = 0; k < 16; k++) sum += element(a(row, k), type) * element(b(k, column), type);
      s[n][i] = sum;
    }
  emulator::collective(0);
}
template <int kColumns, typename T>
void wgmma_ss(float (&s)[kColumns][4], WgmmaDescriptor a, WgmmaDescriptor b, bool add, T type) {
  wgmma_of_shared(
      s, add, type, [&](int row, int k) { return a.element(row, k); }, [&](int k, int column) { return b.element(column, k); });
}
template <int kColumns, typename T>
void wgmma_ss_trans(float (&s)[kColumns][4], WgmmaDescriptor a, WgmmaDescriptor b, bool add, T type) {
  wgmma_of_shared(
      s, add, type, [&](int row, int k) { return a.element(k, row); }, [&](int k, int column) { return b.element(k, column); });
}
template <int kColumns, typename T, typename F>
void wgmma_of_registers(float (&s)[kColumns][4], const uint32_t (&a)[4], bool add, T type, F&& b) {  // b(k, column)
  const emulator::Shown all = emulator::collective(reinterpret_cast<uintptr_t>(a));
  const int lane = emulator::current % 32;
  if (!add)
    for (auto& four : s) four[0] = four[1] = four[2] = four[3] = 0;
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(all.value[lane / 4 * 4 + k % 8 / 2])[i / 2 + 2 * (k / 8)];
      const float weight = element(uint16_t(k % 2 ? word >> 16 : word), type);
      for (int n = 0; n < kColumns; n++) s[n][i] += weight * element(b(k, 8 * n + 2 * (lane % 4) + i % 2), type);
    }
  emulator::collective(0);
}
template <int kColumns, typename T>
void wgmma_rs(float (&s)[kColumns][4], const uint32_t (&a)[4], WgmmaDescriptor b, bool add, T type) {
  wgmma_of_registers(s, a, add, type, [&](int k, int column) { return b.element(k, column); });
}
template <int kColumns, typename T>
void wgmma_rs_rows(float (&s)[kColumns][4], const uint32_t (&a)[4], WgmmaDescriptor b, bool add, T type) {
  wgmma_of_registers(s, a, add, type, [&](int k, int column) { return b.element(column, k); });
}

inline uint32_t cluster_ctarank() { return uint32_t(emulator::this_block()); }
inline uint32_t cluster_nctarank() { return uint32_t(emulator::blocks_together); }
inline void cluster_sync() { emulator::wait(emulator::Waiting::for_cluster); }
inline void st_async_16(void* destination, uint4 value, MBarrier* barrier, uint32_t rank) {
  std::vector<char> data(sizeof value);
  std::memcpy(data.data(), &value, sizeof value);
  emulator::depart({emulator::in_block(static_cast<char*>(destination), int(rank)), nullptr, data, sizeof value,
                    emulator::in_block(barrier, int(rank))});
}

}  // namespace packops

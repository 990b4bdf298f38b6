// csrc/common/ptx.cuh for emulator.h.
#pragma once

#include <cfloat>
#include <map>
#include <vector>

#include "cuda_runtime.h"

namespace packops {

inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(x)); }
inline float reciprocal_approx(float x) { return flush(1 / x); }
inline float log2_approx(float x) { return std::log2(x); }

inline void wait_for_launch_before() { emulator::fibers[emulator::current].waited_for_launch = true; }

inline void named_barrier(int id, int threads) {
  if (id == 0) return __syncthreads();
  emulator::wait(emulator::Waiting::for_some_of_block, uint64_t(threads));
}

using MBarrier = uint64_t;

inline void barrier_init(MBarrier* barrier, uint32_t arrivals) {
  emulator::barriers[barrier] = {.arrivals = int(arrivals), .missing = int(arrivals)};
}
inline void fence_barrier_init() {}
inline void barrier_arrive(MBarrier* barrier) { emulator::arrive(barrier); }
inline void barrier_expect(MBarrier* barrier, uint32_t bytes) { emulator::arrive(barrier, bytes); }
inline void barrier_wait(MBarrier* barrier, uint32_t parity) { emulator::wait_for_phase(barrier, parity); }
inline void barrier_wait_cluster(MBarrier* barrier, uint32_t parity) { emulator::wait_for_phase(barrier, parity); }

inline void bulk_load(void* destination, const void* source, uint32_t bytes, MBarrier* barrier) {
  const auto places = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source) | bytes;
  emulator::require(bytes > 0 && places % 16 == 0, "a bulk copy of something that is not whole 16-byte units");
  emulator::depart({static_cast<char*>(destination), static_cast<const char*>(source), {}, bytes, barrier});
}
// A thread's copies arrive when it waits for them, not before.
inline std::map<int, std::vector<std::pair<void*, const void*>>> copies;
inline void copy16_async(void* destination, const void* source) {
  const auto places = reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source);
  emulator::require(places % 16 == 0, "an asynchronous copy of something that is not 16 aligned bytes");
  copies[emulator::current].push_back({destination, source});
}
inline void wait_for_copies() {
  for (const auto& [destination, source] : copies[emulator::current]) std::memcpy(destination, source, 16);
  copies[emulator::current].clear();
}
inline uint32_t cluster_rank() { return uint32_t(emulator::this_block()); }
inline uint32_t cluster_size() { return uint32_t(emulator::blocks_together); }
inline void cluster_sync() { emulator::wait(emulator::Waiting::for_cluster); }
inline void send16(void* destination, uint4 value, MBarrier* barrier, uint32_t rank) {
  std::vector<char> data(sizeof value);
  std::memcpy(data.data(), &value, sizeof value);
  emulator::depart({emulator::in_block(static_cast<char*>(destination), int(rank)), nullptr, data, sizeof value,
                    emulator::in_block(barrier, int(rank))});
}

}  // namespace packops

// csrc/common/hopper.cuh and tensor_map.cuh for emulator.h: what the kernels that run here use of them.
#pragma once

#include "emulated_ptx.h"

namespace packops {

struct CUtensorMap {
  char* data;
  int element_bytes;
  int64_t sizes[3], strides[2];
  int box_rows, chunks = 8;  // of 16 bytes, in a row of a box
};
inline bool encode_tensor_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[3],
                              const int64_t (&strides)[2], int box_rows) {
  const int bytes = size_of(dtype);
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || (stride > 0 && stride * bytes % 16 == 0); };
  emulator::require(
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(sizes[1], strides[0]) && fits(sizes[2], strides[1]) && box_rows <= 256,
      "a tensor map of something that is not aligned, or expanded, or of too many rows");
  *map = {static_cast<char*>(const_cast<void*>(data)), bytes, {sizes[0], sizes[1], sizes[2]}, {strides[0], strides[1]}, box_rows};
  return true;
}
inline bool encode_matrix_map(CUtensorMap* map, DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride,
                              int box_rows, int row_bytes = 128) {
  const bool encoded = encode_tensor_map(map, dtype, data, {columns, 1, rows}, {0, stride}, box_rows);
  map->chunks = row_bytes / 16;
  return encoded;
}

namespace hopper {

// f(chunk of 16 bytes in shared memory, where its elements are in memory, how many of its bytes are of the array)
template <typename F>
void for_each_chunk(const void* box, const CUtensorMap& map, int x, int y, int z, F&& f) {
  const auto place = reinterpret_cast<uintptr_t>(box);
  emulator::require(place % 1024 == 0, "a box that does not begin at 1024 bytes");
  for (int row = 0; row < map.box_rows; row++)
    for (int chunk = 0; chunk < map.chunks; chunk++) {
      const int64_t column = x + chunk * (16 / map.element_bytes), left = (map.sizes[0] - column) * map.element_bytes;
      const bool there = left > 0 && y < map.sizes[1] && z + row < map.sizes[2] && z + row >= 0;
      const uintptr_t at = place + uintptr_t((row * map.chunks + chunk) << 4);
      f(reinterpret_cast<char*>(at ^ (at >> 7 & uintptr_t(map.chunks - 1)) << 4),
        map.data + map.element_bytes * (column + y * map.strides[0] + (z + row) * map.strides[1]),
        there ? std::min<int64_t>(left, 16) : 0);
    }
}
inline void load_box(void* to, const CUtensorMap& map, int x, int y, int z, uint64_t* barrier) {
  for_each_chunk(to, map, x, y, z, [&](char* chunk, const char* from, int64_t bytes) {
    std::vector<char> data(16);
    if (bytes > 0) std::memcpy(data.data(), from, size_t(bytes));
    emulator::depart({chunk, nullptr, data, 16, barrier});
  });
}
inline void store_box(const CUtensorMap& map, const void* from, int x, int y, bool add) {
  for_each_chunk(from, map, x, 0, y, [&](const char* chunk, char* to, int64_t bytes) {
    if (bytes > 0) stores[emulator::current].push_back({to, chunk, 16, store_groups[emulator::current], add});  // whole vectors
  });
  cp_async_bulk_commit_group();
}

inline void tma_load_2d(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier) {
  load_box(to, map, x, 0, y, barrier);
}
inline void tma_load_3d(void* to, const CUtensorMap& map, int x, int y, int z, uint64_t* barrier) {
  load_box(to, map, x, y, z, barrier);
}
inline void tma_load_2d_multicast(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier, uint16_t blocks) {
  for (int block = 0; block < emulator::blocks_together; block++)
    if (blocks >> block & 1) load_box(emulator::in_block(to, block), map, x, 0, y, emulator::in_block(barrier, block));
}
inline void tma_store_2d(const CUtensorMap& map, const void* from, int x, int y) { store_box(map, from, x, y, false); }
inline void tma_reduce_add_2d(const CUtensorMap& map, const void* from, int x, int y) { store_box(map, from, x, y, true); }
inline void tma_store_wait_read() { cp_async_bulk_wait_group_read<0>(); }

inline void mbarrier_arrive_cluster(uint64_t* barrier, int block) { emulator::arrive(emulator::in_block(barrier, block)); }
inline void mbarrier_wait(uint64_t* barrier, int parity) { emulator::wait_for_phase(barrier, uint32_t(parity)); }
inline void barrier_cluster() { emulator::wait(emulator::Waiting::for_cluster); }

template <int kCount>
void hold(float (&)[kCount]) {}
template <bool kTransposedA, bool kTransposedB, typename T>
void wgmma_m64n192k16(float (&s)[96], WgmmaDescriptor a, WgmmaDescriptor b, bool add, T type) {
  wgmma_of_shared(
      reinterpret_cast<float (&)[24][4]>(s), add, type,
      [&](int row, int k) { return kTransposedA ? a.element(k, row) : a.element(row, k); },
      [&](int k, int column) { return kTransposedB ? b.element(k, column) : b.element(column, k); });
  // The four warps multiply as one: one that has its sums knows that the others have read their operands.
  bar_sync(16 + emulator::current % emulator::block_threads / 128, 128);
}

}  // namespace hopper
}  // namespace packops

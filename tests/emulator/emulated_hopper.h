// csrc/common/hopper.cuh and tensor_map.cuh for emulator.h: what the kernels that run here use of them.
#pragma once

#include "emulated_ptx.h"

namespace packops {

struct CUtensorMap {
  const char* data;
  int64_t sizes[3], strides[2];
  int box_rows;
};
inline bool encode_tensor_map(CUtensorMap* map, DType, const void* data, const int64_t (&sizes)[3], const int64_t (&strides)[2],
                              int box_rows) {
  const auto fits = [](int64_t size, int64_t stride) { return size <= 1 || (stride > 0 && stride % 8 == 0); };
  emulator::require(
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(sizes[1], strides[0]) && fits(sizes[2], strides[1]) && box_rows <= 256,
      "a tensor map of something that is not aligned, or expanded, or of too many rows");
  *map = {static_cast<const char*>(data), {sizes[0], sizes[1], sizes[2]}, {strides[0], strides[1]}, box_rows};
  return true;
}

namespace hopper {

inline void tma_load_3d(void* to, const CUtensorMap& map, int x, int y, int z, uint64_t* barrier) {
  const auto place = reinterpret_cast<uintptr_t>(to);
  emulator::require(place % 1024 == 0, "a box that does not begin at 1024 bytes");
  for (int row = 0; row < map.box_rows; row++)
    for (int chunk = 0; chunk < 8; chunk++) {
      std::vector<char> data(16);
      if (x + 8 * chunk < map.sizes[0] && y < map.sizes[1] && z + row < map.sizes[2] && z + row >= 0)
        std::memcpy(data.data(), map.data + 2 * (x + 8 * chunk + y * map.strides[0] + (z + row) * map.strides[1]), 16);
      emulator::depart(
          {reinterpret_cast<char*>(place + uintptr_t(row * 128 + ((chunk ^ row % 8) << 4))), nullptr, data, 16, barrier});
    }
}

}  // namespace hopper
}  // namespace packops

// How tiles of product.cuh get from registers to memory: through shared memory, then by tensor copies.
// sums[4 j], [4 j + 1] of a thread are columns 8 j + 2 (lane % 4) and the next of row 16 warp + lane / 4; [4 j + 2], [4 j + 3] are
// 8 rows below. Pieces are rows of 128 bytes, swizzled as their maps say.
#pragma once

#include <type_traits>

#include "common/product.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

// Of a warp group, for what is on its way to memory.
struct alignas(1024) ProductStaging {
  unsigned char bytes[8192];
};

// Chunk c of 16 bytes of a row of a piece.
__device__ __forceinline__ unsigned char* chunk_of(unsigned char* piece, int row, int c) {
  return piece + row * 128 + ((c ^ row % 8) << 4);
}
__device__ __forceinline__ float* float_of(unsigned char* piece, int row, int column) {
  return reinterpret_cast<float*>(chunk_of(piece, row, column / 4)) + column % 4;
}

// Rows as they are, in 16 bits: 16 rows x 64 columns of each warp at a time, in 2 KB of its own.
template <typename T>
class StoreRows {
 public:
  bool prepare(DType dtype, void* out, int64_t rows, int64_t columns, int64_t stride) {
    return encode_matrix_map(&map_, dtype, out, rows, columns, stride, 16);
  }

#ifdef PACKOPS_SM90A
  template <int kFirst>
  __device__ __forceinline__ void store(const float (&x)[kSums], int row, int column, ProductStaging& staging) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    unsigned char* piece = staging.bytes + warp * (sizeof staging / 4);
    // Lanes 0 - 15 name rows 0 - 15 of one group of 8 columns, lanes 16 - 31 those of the next.
    const uint32_t to = shared_address(chunk_of(piece, lane % 16, lane / 16));
    if (lane == 0) hopper::tma_store_wait_read();  // the piece before has left
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      const int i = kFirst + pair * 8;
      stmatrix_x4(to ^ (pair * 32), pack2(x[i], x[i + 1], T{}), pack2(x[i + 2], x[i + 3], T{}), pack2(x[i + 4], x[i + 5], T{}),
                  pack2(x[i + 6], x[i + 7], T{}));
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) hopper::tma_store_2d(map_, piece, column + 2 * kFirst, row + warp * 16);
  }
#endif

 private:
  CUtensorMap map_;
};

// Three matrices at once, in 16 bits: a piece is 16 rows x 32 columns of each, 64 bytes a row, on its way from or to memory. A warp has
// its own.
struct alignas(1024) ThreePieces {
  unsigned char bytes[3][16 * 64];

#ifdef PACKOPS_SM90A
  // Where 16 columns of a piece lie, as ldmatrix and stmatrix want it: lanes 0 - 15 name rows 0 - 15 of one group of 8 columns, lanes 16
  // - 31 those of the next. A thread's words are then, of each 8 columns, its pair in its row and its pair 8 rows below.
  __device__ __forceinline__ unsigned char* at(int matrix, int half) {
    const int lane = threadIdx.x % 32, row = lane % 16;
    return bytes[matrix] + row * 64 + (((2 * half + lane / 16) ^ row / 2 % 4) << 4);
  }
#endif
};

template <typename T>
class StoreThree {
 public:
  static constexpr int kColumns = 32;

  // Matrices that are null are not stored.
  bool prepare(DType dtype, void* const (&out)[3], int64_t rows, int64_t columns) {
    for (int i = 0; i < 3; i++) {
      wanted_[i] = out[i] != nullptr;
      if (wanted_[i] && !encode_matrix_map(&maps_[i], dtype, out[i], rows, columns, columns, 16, 64)) return false;
    }
    return true;
  }

#ifdef PACKOPS_SM90A
  // What the warp has put there.
  __device__ __forceinline__ void store(ThreePieces& pieces, int row, int column) const {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int i = 0; i < 3; i++)
      if (wanted_[i]) hopper::tma_store_2d(maps_[i], pieces.bytes[i], column, row);
  }
#endif

 private:
  CUtensorMap maps_[3];
  bool wanted_[3];
};

// The transpose, times a factor: 64 rows of some columns of the warp group become that many rows of 64. In 16 bits 64 columns at a
// time, in fp32 32, as two pieces, stored or added to what is there.
template <typename T, typename Out>
class StoreTransposed : public FinishesSums {
 public:
  using Shared = ProductStaging;

  bool prepare(DType dtype, void* out, int64_t rows, int64_t columns, const float* factor, bool add) {
    factor_ = factor;
    add_ = add;
    return encode_matrix_map(&map_, kWide ? DType::f32 : dtype, out, columns, rows, rows, kColumns);
  }

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ void operator()(float (&x)[kSums], int, int row, int column, Shared& shared) const {
    unsigned char* staging = shared.bytes;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, barrier = threadIdx.x / 128;
    const float factor = factor_ ? *factor_ : 1;
#pragma unroll
    for (int i = 0; i < kSums; i++) x[i] *= factor;
#pragma unroll
    for (int first = 0; first < kSums; first += kColumns / 2) {
      if (thread == 0) hopper::tma_store_wait_read();  // the piece before has left
      bar_sync(barrier, 128);
      if constexpr (kWide) {
        unsigned char* piece = staging + warp / 2 * kPieceBytes;  // two warps have its 32 rows
#pragma unroll
        for (int i = 0; i < 16; i++)
          *float_of(piece, i / 4 * 8 + lane % 4 * 2 + i % 2, warp % 2 * 16 + lane / 4 + i / 2 % 2 * 8) = x[first + i];
      } else {
        // Lanes 0 - 7 name columns 0 - 7 of 8 rows, 8 - 15 of the next 8 rows, 16 - 31 the next 8 columns of both.
        const uint32_t to = shared_address(chunk_of(staging, lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
          const int i = first + pair * 8;
          stmatrix_x4_trans(to + pair * 16 * 128, pack2(x[i], x[i + 1], T{}), pack2(x[i + 2], x[i + 3], T{}),
                            pack2(x[i + 4], x[i + 5], T{}), pack2(x[i + 6], x[i + 7], T{}));
        }
      }
      fence_proxy_async();
      bar_sync(barrier, 128);
      if (thread != 0) continue;
#pragma unroll
      for (int piece = 0; piece < (kWide ? 2 : 1); piece++) {
        const unsigned char* from = staging + piece * kPieceBytes;
        if (kWide && add_) hopper::tma_reduce_add_2d(map_, from, row + piece * 32, column + 2 * first);
        else hopper::tma_store_2d(map_, from, row + piece * 32, column + 2 * first);
      }
    }
  }
#endif

 private:
  static constexpr bool kWide = std::is_same_v<Out, float>;
  static constexpr int kColumns = kWide ? 32 : 64;  // of a piece, its rows in memory
  static constexpr int kPieceBytes = kColumns * 128;
  CUtensorMap map_;
  const float* factor_;
  bool add_;
};

}  // namespace
}  // namespace packops

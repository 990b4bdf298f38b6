// The building blocks of attention.cu: tiles of rows in shared memory, and their matrix products.
//
// A tile is kRows rows of D 16-bit elements, stored as panels of kRows x 128 bytes with the 128-byte swizzle: the eight
// 16-byte chunks of a row are permuted by exclusive or with the row's number modulo 8. Eight rows of one chunk column then lie in
// different banks, and wgmma takes the tile as it is.
#pragma once

#include <bit>

#include "attention_launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

// The columns of a tile that rows in memory have: all D, or, `kPadded`, the first `count`, a multiple of 8. The rest of a tile is
// zeros, which change no product, and is not stored.
template <int D, bool kPadded = false>
struct Columns {
  static constexpr int count = D;
  Columns() = default;
  __device__ __forceinline__ explicit Columns(int) {}
  static __device__ __forceinline__ constexpr bool have(int) { return true; }  // chunk
};
template <int D>
struct Columns<D, true> {
  int count;
  __device__ __forceinline__ explicit Columns(int count) : count(count) {}
  __device__ __forceinline__ bool have(int chunk) const { return 8 * chunk < count; }
};

template <int D>
inline constexpr int kRowBytes = attention_row_bytes(D);
template <int D>
inline constexpr int kPanels = kRowBytes<D> / 128;

template <int kRows>
__device__ __forceinline__ char* place(char* tile, int row, int chunk) {
  return tile + chunk / 8 * (128 * kRows) + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

// A thread's share of copying kRows rows of a matrix to a tile, zeros from row `there` on. Constructed once for all tiles.
template <typename T, int D, int kRows, int kThreads, bool kPadded = false>
class RowLoader {
 public:
  __device__ __forceinline__ RowLoader(const T* matrix, int64_t stride, int thread, Columns<D, kPadded> columns = {})
      : mine_(matrix + thread / kChunks * stride + (columns.have(thread % kChunks) ? thread % kChunks * 8 : 0)),
        stride_(stride),
        row_(thread / kChunks),
        chunk_(thread % kChunks),
        columns_(columns) {}

  __device__ __forceinline__ void load(char* tile, int row, int there) const {
    if (chunk_ >= 8 * kPanels<D>) return;
    const T* from = mine_ + row * stride_;
    char* to = place<kRows>(tile, row_, chunk_);
    const int64_t step = kTogether * stride_;
    if (there >= kRows) {
#pragma unroll
      for (int i = 0; i < kRows / kTogether; i++, from += step)
        if constexpr (kPadded) cp_async_16_zfill(at(tile, to, i), from, columns_.have(chunk_));
        else cp_async_16(at(tile, to, i), from);
    } else {
#pragma unroll
      for (int i = 0; i < kRows / kTogether; i++, from += step) {
        const bool is_there = i * kTogether + row_ < there && columns_.have(chunk_);
        cp_async_16_zfill(at(tile, to, i), is_there ? from : mine_, is_there);
      }
    }
  }

 private:
  // Of a row, a chunk to a thread. The last threads have none where a row is three panels.
  static constexpr int kChunks = std::bit_ceil(unsigned(D / 8)), kTogether = kThreads / kChunks;
  const T* mine_;
  int64_t stride_;
  int row_, chunk_;
  [[no_unique_address]] Columns<D, kPadded> columns_;

  __device__ __forceinline__ char* at(char* tile, char* first, int i) const {
    if constexpr (kTogether % 8 == 0) return first + i * (kTogether * 128);
    else return place<kRows>(tile, i * kTogether + row_, chunk_);
  }
};

// The sums that a lane holds: element i of [m][n] is row 16 m + 8 (i / 2) + lane / 4 of the warp's rows, column 8 n + 2 (lane %
// 4) + i % 2.
template <int kBlocks, int kColumns>
using Sums = float[kBlocks][kColumns / 8][4];

template <typename F, int kBlocks, int kColumns>
__device__ __forceinline__ void for_each(float (&sums)[kBlocks][kColumns][4], F&& f) {  // f(element, m, n, i)
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int n = 0; n < kColumns; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) f(sums[m][n][i], m, n, i);
}

// Stores sums, times a factor per row, through the same rows of a tile to memory, so that the stores are whole vectors.
template <typename T, int D, int kRows, int kBlocks, bool kPadded = false>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int there, char* tile, int first_row, int lane,
                                           const Sums<kBlocks, D>& sums, const float (&factor)[kBlocks][2],
                                           Columns<D, kPadded> columns = {}) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kBlocks; m++)
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<uint32_t*>(place<kRows>(tile, first_row + 16 * m + 8 * half + lane / 4, n) + 4 * (lane % 4)) =
            pack2(sums[m][n][2 * half] * factor[m][half], sums[m][n][2 * half + 1] * factor[m][half], T{});
  __syncwarp();
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < 16 * kBlocks * kChunks / 32; i++) {
    const int row = first_row + (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    if (row < there && columns.have(chunk))
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) = *reinterpret_cast<const uint4*>(place<kRows>(tile, row, chunk));
  }
}

// Matrix products by single warps (mma.sync), or by a warpgroup (wgmma) if kGroup. Protocol: begin(), products..., commit(),
// wait<n>(sums...). wait<n> waits for all but the newest n commits, after which the named sums may be read.
template <typename T, int D, bool kGroup>
struct Products {
  static __device__ __forceinline__ void begin() {
    if constexpr (kGroup) wgmma_fence();
  }
  static __device__ __forceinline__ void commit() {
    if constexpr (kGroup) wgmma_commit_group();
  }
  template <int kNewest = 0, typename... S>
  static __device__ __forceinline__ void wait(S&... sums) {
    if constexpr (kGroup) {
      wgmma_wait_group<kNewest>();
      (wgmma_fence_operand(sums[0]), ...);
    }
  }

  // sums = (this warp's rows of a) (rows of b from b_row on)^T
  template <int kRowsA, int kRowsB, int kBlocks, int kColumns>
  static __device__ __forceinline__ void multiply_rows(float (&sums)[kBlocks][kColumns][4], char* a, int first_row, char* b,
                                                       int b_row, int lane) {
    if constexpr (kGroup) {
      static_assert(kBlocks == 1 && kRowsA == 64 && kRowsB == 8 * kColumns);
      const WgmmaDescriptor rows_a(a), rows_b(b);
#pragma unroll
      for (int k = 0; k < D / 16; k++)
        wgmma_ss(sums[0], rows_a.at(k / 4 * (128 * kRowsA) + k % 4 * 32), rows_b.at(k / 4 * (128 * kRowsB) + k % 4 * 32), k > 0,
                 T{});
    } else {
      for_each(sums, [](float& x, int, int, int) { x = 0; });
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t left[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; m++)
          ldmatrix_x4(left[m], place<kRowsA>(a, first_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < kColumns; n += 2) {
          uint32_t right[4];
          ldmatrix_x4(right, place<kRowsB>(b, b_row + 8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kBlocks; m++) {
            mma_m16n8k16(sums[m][n], left[m], right[0], right[1], T{});
            mma_m16n8k16(sums[m][n + 1], left[m], right[2], right[3], T{});
          }
        }
      }
    }
  }

  // The sums of a product, converted to the left operand of the next
  template <int kBlocks, int kColumns>
  struct Left {
    uint32_t words[kColumns / 2][kBlocks][4];
    __device__ __forceinline__ explicit Left(const float (&weights)[kBlocks][kColumns][4]) {
#pragma unroll
      for (int k = 0; k < kColumns / 2; k++)
#pragma unroll
        for (int m = 0; m < kBlocks; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            words[k][m][i] = pack2(weights[m][2 * k + i / 2][2 * (i % 2)], weights[m][2 * k + i / 2][2 * (i % 2) + 1], T{});
    }
  };

  // sums (this warp's rows, D columns) += weights (rows of b from b_row on)
  template <int kRowsB, int kBlocks, int kColumns>
  static __device__ __forceinline__ void add_weighted_rows(Sums<kBlocks, D>& sums, const Left<kBlocks, kColumns>& weights,
                                                           char* b, int b_row, int lane) {
    if constexpr (kGroup) {
      constexpr int kWide = D % 64 == 0 ? 64 : D;  // columns of a product
      const WgmmaDescriptor rows(b, kWide > 64 ? 128 * kRowsB : 16);
#pragma unroll
      for (int k = 0; k < kColumns / 2; k++)
#pragma unroll
        for (int column = 0; column < D; column += kWide)
          wgmma_rs(reinterpret_cast<float (&)[kWide / 8][4]>(sums[0][column / 8]), weights.words[k][0],
                   rows.at(column / 64 * (128 * kRowsB) + 16 * k * 128), true, T{});
    } else {
#pragma unroll
      for (int k = 0; k < kColumns / 2; k++)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t right[4];
          ldmatrix_x4_trans(right, place<kRowsB>(b, b_row + 16 * k + lane % 16, n + lane / 16));
#pragma unroll
          for (int m = 0; m < kBlocks; m++) {
            mma_m16n8k16(sums[m][n], weights.words[k][m], right[0], right[1], T{});
            mma_m16n8k16(sums[m][n + 1], weights.words[k][m], right[2], right[3], T{});
          }
        }
    }
  }
};

}  // namespace
}  // namespace packops

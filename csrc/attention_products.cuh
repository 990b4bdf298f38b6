// What the kernels of attention.cu are made of: tiles of rows in shared memory, and products of them.
//
// A tile is kRows rows of D 16-bit elements, as D / 64 panels of kRows x 128 bytes. In a row of a panel the eight chunks of 16 bytes
// are permuted by exclusive or with the row's number modulo 8, so that eight rows of one column of chunks lie in different banks; it
// is also what products by a warp group take.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

template <int kRows>
__device__ __forceinline__ char* place(char* tile, int row, int chunk) {
  return tile + chunk / 8 * (128 * kRows) + row * 128 + ((chunk % 8 ^ row % 8) << 4);
}

// A thread's share of copying kRows rows of a matrix to a tile, zeros from row `there` on. Made once, for all tiles.
template <typename T, int D, int kRows, int kThreads>
class RowLoader {
 public:
  __device__ __forceinline__ RowLoader(const T* matrix, int64_t stride, int thread)
      : mine_(matrix + thread / kChunks * stride + thread % kChunks * 8),
        stride_(stride),
        row_(thread / kChunks),
        chunk_(thread % kChunks) {}

  __device__ __forceinline__ void load(char* tile, int row, int there) const {
    const T* from = mine_ + row * stride_;
    char* to = place<kRows>(tile, row_, chunk_);
    const int64_t step = kTogether * stride_;
    if (there >= kRows) {
#pragma unroll
      for (int i = 0; i < kRows / kTogether; i++, from += step) copy16_async(at(tile, to, i), from);
    } else {
#pragma unroll
      for (int i = 0; i < kRows / kTogether; i++, from += step) {
        const bool is_there = i * kTogether + row_ < there;
        copy16_async_or_zero(at(tile, to, i), is_there ? from : mine_, is_there);
      }
    }
  }

 private:
  static constexpr int kChunks = D / 8, kTogether = kThreads / kChunks;
  const T* mine_;
  int64_t stride_;
  int row_, chunk_;

  __device__ __forceinline__ char* at(char* tile, char* first, int i) const {
    if constexpr (kTogether % 8 == 0) return first + i * (kTogether * 128);
    else return place<kRows>(tile, i * kTogether + row_, chunk_);
  }
};

// Sums of products, as a warp has them: element i of [m][n] is in row 16 m + 8 (i / 2) + lane / 4 of the warp's rows, column
// 8 n + 2 (lane % 4) + i % 2.
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

// Sums times a factor for each of a thread's rows, to these rows of a tile and from there to memory.
template <typename T, int D, int kRows, int kBlocks>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int there, char* tile, int first_row, int lane,
                                           const Sums<kBlocks, D>& sums, const float (&factor)[kBlocks][2]) {
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
    if (row < there)
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) = *reinterpret_cast<const uint4*>(place<kRows>(tile, row, chunk));
  }
}

// Products by single warps (mma.sync), or by the four warps of a group (wgmma) if kGroup. Whoever makes products says begin, makes
// some, says close, and then waits for all but the newest so many that were closed, naming the sums that are ready.
template <typename T, int D, bool kGroup>
struct Products {
  static __device__ __forceinline__ void begin() {
    if constexpr (kGroup) begin_group_products();
  }
  static __device__ __forceinline__ void close() {
    if constexpr (kGroup) close_group_products();
  }
  template <int kNewest = 0, typename... S>
  static __device__ __forceinline__ void wait(S&... sums) {
    if constexpr (kGroup) {
      wait_for_group_products_before<kNewest>();
      (hold(sums[0]), ...);
    }
  }

  // sums = this warp's rows of a times rows of b from b_row on
  template <int kRowsA, int kRowsB, int kBlocks, int kColumns>
  static __device__ __forceinline__ void multiply_rows(float (&sums)[kBlocks][kColumns][4], char* a, int first_row, char* b,
                                                       int b_row, int lane) {
    if constexpr (kGroup) {
      static_assert(kBlocks == 1 && kRowsA == 64 && kRowsB == 8 * kColumns);
      const GroupOperand rows_a(a), rows_b(b);
#pragma unroll
      for (int k = 0; k < D / 16; k++)
        multiply_rows_by_group(sums[0], rows_a.at(k / 4 * (128 * kRowsA) + k % 4 * 32),
                               rows_b.at(k / 4 * (128 * kRowsB) + k % 4 * 32), k > 0, T{});
    } else {
      for_each(sums, [](float& x, int, int, int) { x = 0; });
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t left[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; m++)
          load_matrices(left[m], place<kRowsA>(a, first_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < kColumns; n += 2) {
          uint32_t right[4];
          load_matrices(right, place<kRowsB>(b, b_row + 8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kBlocks; m++) {
            multiply_add(sums[m][n], left[m], right[0], right[1], T{});
            multiply_add(sums[m][n + 1], left[m], right[2], right[3], T{});
          }
        }
      }
    }
  }

  // weights, sums of a product before, as the left factor of the next
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

  // sums (of this warp's rows, D columns) += weights times rows of b from b_row on
  template <int kRowsB, int kBlocks, int kColumns>
  static __device__ __forceinline__ void add_weighted_rows(Sums<kBlocks, D>& sums, const Left<kBlocks, kColumns>& weights,
                                                           char* b, int b_row, int lane) {
    if constexpr (kGroup) {
      const GroupOperand rows(b);
#pragma unroll
      for (int k = 0; k < kColumns / 2; k++)
#pragma unroll
        for (int panel = 0; panel < D / 64; panel++)
          add_weighted_rows_by_group(reinterpret_cast<float (&)[8][4]>(sums[0][8 * panel]), weights.words[k][0],
                                     rows.at(panel * (128 * kRowsB) + 16 * k * 128), T{});
    } else {
#pragma unroll
      for (int k = 0; k < kColumns / 2; k++)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t right[4];
          load_matrices_transposed(right, place<kRowsB>(b, b_row + 16 * k + lane % 16, n + lane / 16));
#pragma unroll
          for (int m = 0; m < kBlocks; m++) {
            multiply_add(sums[m][n], weights.words[k][m], right[0], right[1], T{});
            multiply_add(sums[m][n + 1], weights.words[k][m], right[2], right[3], T{});
          }
        }
    }
  }
};

}  // namespace
}  // namespace packops

// What the kernels of attention share beside products and scores.
#pragma once

#include <bit>

#include "attention.h"
#include "attention_products.cuh"
#include "attention_scores.cuh"
#include "common/vec.cuh"

namespace packops {
namespace {

// ---- Rows

template <typename T>
__device__ __forceinline__ const T* head_of(const Heads& heads, int64_t token, int head) {
  return static_cast<const T*>(heads.data) + token * heads.token + head * heads.head;
}

// Loads rows of one head from a token on.
template <typename T, int D, int kRows, int kThreads, bool kPadded = false>
struct Rows : RowLoader<T, D, kRows, kThreads, kPadded> {
  __device__ __forceinline__ Rows(const Heads& heads, int token, int head, int thread, Columns<D, kPadded> columns = {})
      : RowLoader<T, D, kRows, kThreads, kPadded>(head_of<T>(heads, token, head), heads.token, thread, columns) {}
};

// Stores the row of sums that a lane shares with three others, the one of its two, times a factor. They exchange what they hold until
// each has whole 16 bytes.
template <typename T, int D, bool kPadded = false>
__device__ __forceinline__ void store_row(T* to, bool there, int half, int lane, const Sums<1, D>& sums, float factor,
                                          Columns<D, kPadded> columns = {}) {
#pragma unroll
  for (int n = 0; n < D / 8; n += 4) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = pack2(sums[0][n + i][2 * half] * factor, sums[0][n + i][2 * half + 1] * factor, T{});
    const bool odd = lane % 2, high = lane / 2 % 2;
    uint32_t a = __shfl_xor_sync(kWarp, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(kWarp, odd ? x[2] : x[3], 1);
    if (odd) x[0] = a, x[2] = b;
    else x[1] = a, x[3] = b;
    a = __shfl_xor_sync(kWarp, high ? x[0] : x[2], 2), b = __shfl_xor_sync(kWarp, high ? x[1] : x[3], 2);
    if (high) x[0] = a, x[1] = b;
    else x[2] = a, x[3] = b;
    if (there && columns.have(n + lane % 4)) *reinterpret_cast<uint4*>(to + (n + lane % 4) * 8) = uint4{x[0], x[1], x[2], x[3]};
  }
}

// ---- Backward

// s: query-key products, committed first; becomes the weights p. g: products of grad_out and values; becomes g of attention.h.
template <typename Product, int kBlocks, int kColumns, typename Lse, typename Delta>
__device__ __forceinline__ void weigh(float (&s)[kBlocks][kColumns][4], float (&g)[kBlocks][kColumns][4], const Scores& scores,
                                      Lse&& lse, Delta&& delta) {
  if (scores.capped) {
    Product::wait(s, g);
    for_each(s, [&](float& x, int m, int n, int i) {
      x = scores.cap(x);
      const float slope = 1.f - x * x;
      x = ex2_approx(fmaf(x, scores.scale, -lse(m, n, i)));
      g[m][n][i] = x * slope * (g[m][n][i] - delta(m, n, i));
    });
  } else {
    Product::template wait<1>(s);
    for_each(s, [&](float& x, int m, int n, int i) { x = ex2_approx(fmaf(x, scores.scale, -lse(m, n, i))); });
    Product::wait(g);
    for_each(g, [&](float& x, int m, int n, int i) { x = s[m][n][i] * (x - delta(m, n, i)); });
  }
}

// delta of rows of the tokens from `token` on, a thread for 8 columns, to `deltas` and to memory.
template <typename T, int D, int kThreads, bool kPadded = false>
__device__ __forceinline__ void compute_deltas(const AttentionParams& p, int token, int there, int head, float* deltas,
                                               int thread, Columns<D, kPadded> columns = {}) {
  constexpr int kChunks = std::bit_ceil(unsigned(D / 8));
  for (int i = thread; i < kAttentionRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    float sum = 0;
    if (row < there && chunk < D / 8 && columns.have(chunk)) {
      float a[8], b[8];
      unpack<T>(load_cached(static_cast<const T*>(p.out) + ((token + row) * int64_t(p.heads) + head) * columns.count + chunk * 8),
                a);
      unpack<T>(load_cached(head_of<T>(p.grad_out, token + row, head) + chunk * 8), b);
#pragma unroll
      for (int j = 0; j < 8; j++) sum = fmaf(a[j], b[j], sum);
    }
#pragma unroll
    for (int by = kChunks / 2; by > 0; by /= 2) sum += __shfl_xor_sync(kWarp, sum, by);
    if (chunk == 0) {
      deltas[row] = sum;
      if (row < there) p.delta[head * p.tokens + token + row] = sum;
    }
  }
}

}  // namespace
}  // namespace packops

// The lm_head's product with the softmax in its epilogue: what the epilogues do, and how rows are finished. lm_head.h has the
// formulas, common/product.cuh the product.
#include "lm_head.h"

#include <cuda_runtime.h>

#include <cmath>

#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/product.cuh"
#include "common/product_store.cuh"
#include "lm_head_launch.h"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // code for architectures before 9.0 has the kernel's name alone, and none of what it uses
#endif

namespace packops {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLeastLog = -1e4f;  // stands for log 0, so that 0 log 0 is 0
// Beyond this the rounding of a row's largest logit no longer fits into an exponent. There all logits are rounded, as torch
// rounds them: neighbouring ones are at least 128 apart, so the largest share the probability.
constexpr float kExtreme = 0x1p31f;

// Workspace, in floats.
struct LmHeadWorkspace {
  int64_t rows, tiles;
  constexpr int64_t plane() const { return rows * tiles; }
  constexpr int64_t top() const { return 0; }              // of a row's logits in a tile, its label's apart; capped, or unscaled
  constexpr int64_t sum() const { return plane(); }        // of exponentials relative to the top
  constexpr int64_t mean() const { return 2 * plane(); }   // of these times their exponents
  constexpr int64_t label() const { return 3 * plane(); }  // a row's label's logit before scale and cap
  constexpr int64_t size() const { return label() + rows; }
};
constexpr LmHeadWorkspace workspace_of(const LmHeadParams& p) { return {p.rows, (p.vocab + kTileColumns - 1) / kTileColumns}; }

// ---- Finishing rows: the statistics of their tiles, put together

constexpr int kFinishRows = 32, kFinishSlices = 8;  // rows of a block; parts of a row's tiles

__device__ double capped(const LmHeadParams& p, double z) {
  const double x = z * p.logit_scale;
  return p.softcap > 0 ? p.softcap * tanh(x / p.softcap) : x;
}
// A tile's top.
__device__ double scaled(const LmHeadParams& p, double top) { return p.softcap > 0 ? top : top * p.logit_scale; }

__global__ void finish_kernel(const __grid_constant__ LmHeadParams p) {
  const LmHeadWorkspace w = workspace_of(p);
  const int lane = threadIdx.x % kFinishRows, slice = threadIdx.x / kFinishRows;
  const int64_t row = int64_t(blockIdx.x) * kFinishRows + lane;
  __shared__ float tops[kFinishSlices][kFinishRows];
  __shared__ double sums[kFinishSlices][kFinishRows], means[kFinishSlices][kFinishRows];

  float top = -INFINITY;
  if (row < p.rows)
    for (int64_t tile = slice; tile < w.tiles; tile += kFinishSlices)
      top = fmaxf(top, p.workspace[w.top() + tile * p.rows + row]);
  tops[slice][lane] = top;
  __syncthreads();
  for (int i = 0; i < kFinishSlices; i++) top = fmaxf(top, tops[i][lane]);

  double sum = 0, mean = 0;  // relative to the tiles' top
  if (row < p.rows)
    for (int64_t tile = slice; tile < w.tiles; tile += kFinishSlices) {
      const int64_t at = tile * p.rows + row;
      const float part = p.workspace[w.sum() + at];
      if (part == 0) continue;  // a tile of nothing but -inf
      const double below = scaled(p, double(p.workspace[w.top() + at]) - top), factor = expf(float(below));
      sum += factor * part;
      mean += factor != 0 ? factor * (p.workspace[w.mean() + at] + below * part) : 0;
    }
  sums[slice][lane] = sum;
  means[slice][lane] = mean;
  __syncthreads();
  if (slice != 0 || row >= p.rows) return;
  for (int i = 1; i < kFinishSlices; i++) sum += sums[i][lane], mean += means[i][lane];

  const int32_t y = p.target[row];
  const bool counts = y >= 0;
  const double label = counts ? capped(p, p.workspace[w.label() + row]) : 0, highest = fmax(scaled(p, top), label);
  const double down = scaled(p, top) - highest, factor = sum != 0 ? exp(down) : 0;  // to what is relative to the row's highest
  mean = sum != 0 ? factor * (mean + down * sum) : 0;
  const double rest = factor * sum, of_label = exp(label - highest), total = rest + of_label;
  const double log_total = label == highest ? log1p(rest) : log(total);  // a confident row keeps its digits
  const double weighted = mean + (of_label > 0 ? of_label * (label - highest) : 0);
  const float row_max = float(highest);
  p.log_prob[row] = counts ? float(label - highest - log_total) : 0;
  if (p.entropy) p.entropy[row] = counts ? float(log_total - weighted / total) : 0;
  p.row_max[row] = counts ? row_max : 0;
  p.log_sum[row] = counts ? float((fabs(highest) > kExtreme ? 0 : highest - double(row_max)) + log_total) : 0;
}

// ---- Epilogues: 64 rows x 192 columns over a warp group

// What stands for a column that is none, or for the label's where it is left out: a number that no capped logit is.
template <bool kCapped>
__device__ __forceinline__ float nothing() {
  return kCapped ? __uint_as_float(0x7fffdeadu) : -INFINITY;
}
// In one instruction: a branch would keep products from running on.
__device__ __forceinline__ float unless_nothing(float z, float value, float instead) {
#ifdef __CUDACC__
  float chosen;
  asm("{\n.reg .pred none;\nsetp.eq.u32 none, %1, 0x7fffdead;\nselp.f32 %0, %3, %2, none;\n}"
      : "=f"(chosen)
      : "r"(__float_as_uint(z)), "f"(value), "f"(instead));
  return chosen;
#else
  return __float_as_uint(z) == 0x7fffdeadu ? instead : value;
#endif
}

// tanh to 2 ulps without a branch, which would keep products from running on.
__device__ __forceinline__ float tanh_unbranched(float x) {
  const float square = x * x, size = fabsf(x);
  float series = fmaf(0x1.fe8758p-7f, square, -0x1.ab8702p-5f);  // of (tanh x - x) / x^3, by least squares up to 0.6
  series = fmaf(series, square, 0x1.10a45cp-3f);
  series = fmaf(series, square, -0x1.55535p-2f);
  const float large = copysignf(1 - 2 * rcp_approx(ex2_approx(size * (2 * kLog2E)) + 1), x);
  return size < 0.6f ? fmaf(series * square, x, x) : large;
}

struct Cap {
  float to_argument, cap;  // of tanh
  __device__ explicit Cap(const LmHeadParams& p) : to_argument(p.cap_argument), cap(p.softcap) {}
  __device__ __forceinline__ float value(float z) const { return cap * tanh_unbranched(z * to_argument); }
  __device__ __forceinline__ float slope(float z) const {  // 1 - tanh^2, which would cancel near the cap
    const float e = ex2_approx(fabsf(z * to_argument) * (-2 * kLog2E)), r = rcp_approx(1 + e);
    return 4 * e * r * r;
  }
};

// Which of a thread's elements is the label of each of its two rows; the search happens only if a warp has one.
struct Labels {
  int32_t target[2];
  int at[2];  // columns from this thread's first on
  bool any;

  __device__ Labels(const LmHeadParams& p, int row, int column) {
    bool mine = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      target[half] = row + 8 * half < p.rows ? p.target[row + 8 * half] : -1;
      at[half] = target[half] - column;
      const bool here = target[half] >= 0 && unsigned(at[half]) < unsigned(kTileColumns) && at[half] % 8 < 2;
      if (!here) at[half] = -1;
      mine = mine || here;
    }
    any = __any_sync(~0u, mine);
  }
  // The labels' elements, and what takes their place. Only where `any`.
  template <int kFirst = 0, int kCount = kSums>
  __device__ __forceinline__ void exchange(float (&d)[kSums], float (&of_label)[2], bool put) const {
#pragma unroll
    for (int i = kFirst; i < kFirst + kCount; i++) {
      const int half = i / 2 % 2;
      if (at[half] == i / 4 * 8 + i % 2) {
        if (put) d[i] = of_label[half];
        else of_label[half] = d[i];
      }
    }
  }
  // The labels' elements go to the workspace, from where rows are finished.
  __device__ __forceinline__ void set_apart(float (&d)[kSums], const LmHeadParams& p, int row) const {
    if (!any) return;
    float of_label[2] = {0, 0};
    exchange(d, of_label, false);
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (at[half] >= 0) p.workspace[workspace_of(p).label() + row + 8 * half] = of_label[half];
  }
};

template <typename T>
__device__ __forceinline__ void add_bias(float (&d)[kSums], const LmHeadParams& p, int column) {
  if (!p.bias) return;
#pragma unroll
  for (int i = 0; i < kSums; i += 4)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int at = column + i / 4 * 8 + j;
      const float b = at < p.vocab ? to_float(static_cast<const T*>(p.bias)[at]) : 0;
      d[i + j] += b;
      d[i + 2 + j] += b;
    }
}

template <int kFirst = 0, int kCount = kSums>
__device__ __forceinline__ void set_columns_past_the_end(float (&d)[kSums], float to, const LmHeadParams& p, int column) {
  if (column / kTileColumns * kTileColumns + kTileColumns <= p.vocab) return;
#pragma unroll
  for (int i = kFirst; i < kFirst + kCount; i++)
    if (column + i / 4 * 8 + i % 2 >= p.vocab) d[i] = to;
}

// Leaves out the labels, and what lies past the vocabulary.
template <bool kCapped, int kFirst = 0, int kCount = kSums>
__device__ __forceinline__ void leave_out(float (&d)[kSums], const Labels& labels, const LmHeadParams& p, int column) {
  float instead[2] = {nothing<kCapped>(), nothing<kCapped>()};
  if (labels.any) labels.exchange<kFirst, kCount>(d, instead, true);
  set_columns_past_the_end<kFirst, kCount>(d, nothing<kCapped>(), p, column);
}

// The four threads that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The logits themselves, before scale and cap. Past the vocabulary they are 0, since the tensor copies fill with 0.
template <typename T>
struct Logits {
  static constexpr bool kStores = true;
  __device__ __forceinline__ Logits(float (&d)[kSums], const LmHeadParams& p, int, int tile) {
    add_bias<T>(d, p, tile * kTileColumns + 2 * (threadIdx.x % 4));
  }
  template <int kFirst, int kCount>
  __device__ __forceinline__ void transform(float (&)[kSums]) const {}
};

template <typename T, bool kCapped>
struct Statistics {
  static constexpr bool kStores = false;
  __device__ __forceinline__ Statistics(float (&d)[kSums], const LmHeadParams& p, int row, int tile) {
    const LmHeadWorkspace w = workspace_of(p);
    const int column = tile * kTileColumns + 2 * (threadIdx.x % 4);
    add_bias<T>(d, p, column);
    const Labels labels(p, row, column);
    labels.set_apart(d, p, row);
    leave_out<kCapped>(d, labels, p, column);
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, mean[2] = {0, 0};
    float to_exponent = p.logit_scale * kLog2E;
    if constexpr (kCapped) {
      const Cap cap(p);
      to_exponent = kLog2E;
#pragma unroll
      for (int i = 0; i < kSums; i++) d[i] = unless_nothing(d[i], cap.value(d[i]), -INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kSums; i++) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], d[i]);
    float reference[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[half] = quad_max(top[half]);
      reference[half] = top[half] == -INFINITY ? 0 : top[half];
    }
#pragma unroll
    for (int i = 0; i < kSums; i++) {
      const int half = i / 2 % 2;
      // The difference before the scale: exactly 0 for the largest, however large it is.
      const float exponent = (d[i] - reference[half]) * to_exponent, e = ex2_approx(exponent);
      sum[half] += e;
      mean[half] = fmaf(e, fmaxf(exponent, kLeastLog), mean[half]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum[half] = quad_sum(sum[half]);
      mean[half] = quad_sum(mean[half]) * kLn2;
      if (threadIdx.x % 4 == 0 && row + 8 * half < p.rows) {
        float* to = p.workspace + tile * p.rows + row + 8 * half;
        to[w.top()] = top[half];
        to[w.sum()] = sum[half];
        to[w.mean()] = mean[half];
      }
    }
  }
};

template <typename T, bool kCapped>
class Gradient {
 public:
  static constexpr bool kStores = true;
  __device__ __forceinline__ Gradient(float (&d)[kSums], const LmHeadParams& p, int row, int tile)
      : p_(p), column_(tile * kTileColumns + 2 * (threadIdx.x % 4)), cap_(p), labels_(p, row, column_) {
    add_bias<T>(d, p, column_);
    float on_label[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t at = row + 8 * half;
      const bool there = at < p.rows;
      top_[half] = there ? p.row_max[at] : 0;
      log_sum_[half] = there ? p.log_sum[at] : 0;
      on_p_[half] = there && p.on_p ? p.on_p[at] : 0;
      on_p_log_[half] = there && p.on_p_log ? p.on_p_log[at] : 0;
      on_label[half] = there && p.on_label ? p.on_label[at] : 0;
      scale_[half] = p.logit_scale;
      if (!kCapped && fabsf(top_[half]) > kExtreme) {
#pragma unroll
        for (int i = 0; i < kSums; i++)
          if (i / 2 % 2 == half) d[i] *= p.logit_scale;
        scale_[half] = 1;
      }
    }
    if (labels_.any) {
      labels_.exchange(d, of_label_, false);
#pragma unroll
      for (int half = 0; half < 2; half++) {  // 1 - p to the digits that a confident row has left
        const float z = of_label_[half], log_p = log_p_of(z, half);
        of_label_[half] = (on_label[half] * -expm1f(log_p) +
                           expf(log_p) * (on_p_[half] + on_label[half] + on_p_log_[half] * fmaxf(log_p, kLeastLog))) *
                          slope_of(z);
      }
    }
  }

  template <int kFirst, int kCount>
  __device__ __forceinline__ void transform(float (&d)[kSums]) {
#pragma unroll
    for (int i = kFirst; i < kFirst + kCount; i++) {
      const int half = i / 2 % 2;
      const float log_p = log_p_of(d[i], half), p = ex2_approx(log_p * kLog2E);
      const float value = p * fmaf(on_p_log_[half], fmaxf(log_p, kLeastLog), on_p_[half]) * slope_of(d[i]);
      d[i] = labels_.target[half] >= 0 ? value : 0;
    }
    if (labels_.any) labels_.template exchange<kFirst, kCount>(d, of_label_, true);
    set_columns_past_the_end<kFirst, kCount>(d, 0, p_, column_);  // tensor copies write 16 bytes at least
  }

 private:
  const LmHeadParams& p_;
  int column_;
  Cap cap_;
  Labels labels_;
  float top_[2], log_sum_[2], on_p_[2], on_p_log_[2], of_label_[2] = {0, 0};
  float scale_[2];  // yet to be multiplied by

  __device__ __forceinline__ float log_p_of(float z, int half) const {
    return (kCapped ? cap_.value(z) - top_[half] : fmaf(z, scale_[half], -top_[half])) - log_sum_[half];
  }
  __device__ __forceinline__ float slope_of(float z) const { return kCapped ? p_.logit_scale * cap_.slope(z) : p_.logit_scale; }
};

// Hands 64 rows to an Epilogue(sums, p, row, column tile), which gets a thread's sums in rows `row` and `row` + 8. If
// Epilogue::kStores, transform<first, count> turns that many of them into what is stored, 64 columns at a time so that registers become
// free.
template <typename T, typename Epilogue>
class Finish : public FinishesSums {
 public:
  using Shared = ProductStaging;

  bool prepare(const LmHeadParams& p) {
    p_ = p;
    return !Epilogue::kStores || store_.prepare(p.dtype, p.out, p.rows, p.vocab, p.out_stride);
  }

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ void operator()(float (&sums)[kSums], int, int row, int column, Shared& staging) const {
    Epilogue epilogue(sums, p_, row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, column / kTileColumns);
    if constexpr (Epilogue::kStores) {
      const auto store = [&](auto first) {
        epilogue.template transform<first, 32>(sums);
        store_.template store<first>(sums, row, column, staging);
      };
      store(std::integral_constant<int, 0>{});
      store(std::integral_constant<int, 32>{});
      store(std::integral_constant<int, 64>{});
    }
  }
#endif

 private:
  LmHeadParams p_;
  StoreRows<T> store_;
};

// ---- Host

template <typename T, typename Epilogue>
cudaError_t logits(const LmHeadParams& p, cudaStream_t stream) {
  Product<T, ProductOperand<Major::k, kTileRows, false>, ProductOperand<Major::k, kTileColumns, true>, Finish<T, Epilogue>>
      product;
  product.steps = steps_of(p.width);
  if (!product.a.prepare(p.dtype, p.hidden, p.rows, p.width, p.width) ||
      !product.b.prepare(p.dtype, p.weight, p.vocab, p.width, p.width) || !product.finish.prepare(p))
    return cudaErrorInvalidValue;
  return launch_product(product, choose_product_grid(p.rows, p.vocab, p.width), stream);
}

template <template <typename, bool> class Epilogue>
cudaError_t logits(const LmHeadParams& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.softcap > 0 ? logits<T, Epilogue<T, true>>(p, stream) : logits<T, Epilogue<T, false>>(p, stream);
  });
}

template <typename T, typename Out>
cudaError_t weight_gradient(const LmHeadWeightGradientParams& p, cudaStream_t stream) {
  Product<T, ProductOperand<Major::mn, kTileRows, true>, ProductOperand<Major::mn, kTileColumns, false>, StoreTransposed<T, Out>>
      product;
  product.steps = steps_of(p.tokens);
  if (!product.a.prepare(p.dtype, p.hidden, p.width, p.tokens, p.width) ||
      !product.b.prepare(p.dtype, p.grad_logits, p.vocab, p.tokens, p.grad_logits_stride) ||
      !product.finish.prepare(p.dtype, p.out, p.width, p.vocab, p.factor, p.add))
    return cudaErrorInvalidValue;
  return launch_product(product, choose_weight_gradient_grid(p.vocab, p.width), stream);
}

}  // namespace

int64_t lm_head_workspace(const LmHeadParams& p) { return workspace_of(p).size(); }

bool lm_head_fits(const LmHeadParams& p) {
  return p.vocab > 0 && product_fits(p.dtype, {p.rows, p.vocab}, p.width, {p.hidden, p.weight});
}

cudaError_t lm_head_cuda(LmHeadPass pass, const LmHeadParams& given, cudaStream_t stream) {
  if (given.rows == 0) return cudaSuccess;
  LmHeadParams p = given;
  if (p.softcap > 0) p.cap_argument = p.logit_scale / p.softcap;
  if (pass == LmHeadPass::logits) {
    return with_type(p.dtype, [&](auto type) { return logits<decltype(type), Logits<decltype(type)>>(p, stream); });
  }
  if (pass == LmHeadPass::gradient) return logits<Gradient>(p, stream);
  const cudaError_t error = logits<Statistics>(p, stream);
  if (error != cudaSuccess) return error;
  launch(finish_kernel, dim3(unsigned((p.rows + kFinishRows - 1) / kFinishRows)), dim3(kFinishRows * kFinishSlices), 0, stream,
         p);
  return cudaGetLastError();
}

bool lm_head_weight_gradient_fits(const LmHeadWeightGradientParams& p) {
  return p.tokens > 0 && p.vocab > 0 && p.grad_logits_stride % 8 == 0 &&
         product_fits(p.dtype, {p.tokens, p.vocab}, p.width, {p.grad_logits, p.hidden, p.out});
}

cudaError_t lm_head_weight_gradient_cuda(const LmHeadWeightGradientParams& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    return p.wide ? weight_gradient<T, float>(p, stream) : weight_gradient<T, T>(p, stream);
  });
}

}  // namespace packops

// The products of a gated MLP with the gate in their epilogues; formulas in gated_mlp.h, the product in common/product.cuh.
//
//   forward    a tile has 96 columns of gate and the same 96 of up side by side, so that a thread has both of every element
//   backward   a tile has 192 columns of d. Each warp has two places for pieces of gate and up (16 rows x 32 columns), which the tensor
//              copy engine fills ahead, the first ones while the product is made. Results leave from the same places.
//
// All of this hides behind the product of the other warp group as long as a sum has some 2000 terms.
#include "gated_mlp.h"

#include "common/product.cuh"
#include "common/product_store.cuh"
#include "gated_linear_maths.cuh"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // code for architectures before 9.0 has the kernels' names alone, and none of what they use
#endif

namespace packops {
namespace {

constexpr int kHalf = kTileColumns / 2;  // columns of a tile's gate, and of its up

// The right operand of the forward: as many rows of one matrix, then of the other. Each block of a cluster fetches one for both.
class GateAndUp {
 public:
  static constexpr bool kShared = true, kTransposed = false;
  static constexpr int k16Terms = 16 * 2;

  bool prepare(DType dtype, const void* gate, const void* up, int64_t columns, int64_t terms) {
    return encode_matrix_map(&maps_[0], dtype, gate, columns, terms, terms, kHalf) &&
           encode_matrix_map(&maps_[1], dtype, up, columns, terms, terms, kHalf);
  }

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ void fetch(uint16_t* stage, int first, int term, int block, uint64_t* full) const {
    hopper::tma_load_2d_multicast(stage + block * kHalf * kStageTerms, maps_[block], term, first / 2, full,
                                  (1 << kProductCluster) - 1);
  }
  __device__ __forceinline__ static WgmmaDescriptor descriptor(const uint16_t* stage) { return WgmmaDescriptor(stage); }
#endif

 private:
  static_assert(kProductCluster == 2);
  CUtensorMap maps_[2];
};

__device__ __forceinline__ int warp_of_group() { return threadIdx.x / 32 % 4; }

template <typename T, Activation A>
class FinishForward : public FinishesSums {
 public:
  using Shared = ThreePieces[4];

  bool prepare(const GatedMlpParams& p) { return store_.prepare(p.dtype, {p.gate, p.up, p.product}, p.tokens, p.columns); }

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ void operator()(float (&sums)[kSums], int, int row, int column, Shared& shared) const {
    ThreePieces& pieces = shared[warp_of_group()];
#pragma unroll
    for (int first = 0; first < kHalf; first += StoreThree<T>::kColumns) {
      if (threadIdx.x % 32 == 0) hopper::tma_store_wait_read();  // the pieces before have left
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t gates[4], ups[4], products[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float *gate = &sums[first / 2 + 8 * half + 2 * i], *up = gate + kSums / 2;
          gates[i] = pack2(gate[0], gate[1], T{});
          ups[i] = pack2(up[0], up[1], T{});
          const float2 g = unpack2(gates[i], T{}), u = unpack2(ups[i], T{});
          products[i] = pack2(results_of<T, A>(0, g.x, u.x).product, results_of<T, A>(0, g.y, u.y).product, T{});
        }
        stmatrix_x4(pieces.at(0, half), gates);
        stmatrix_x4(pieces.at(1, half), ups);
        stmatrix_x4(pieces.at(2, half), products);
      }
      store_.store(pieces, row + 16 * warp_of_group(), column / 2 + first);
    }
  }
#endif

 private:
  StoreThree<T> store_;
};

template <typename T, Activation A>
class FinishBackward {
 public:
  static constexpr int kPlaces = 2;
  struct Shared {
    ThreePieces pieces[4][kPlaces];
    uint64_t full[4][kPlaces];
  };

  bool prepare(const GatedMlpParams& p) {
    return encode_matrix_map(&gate_, p.dtype, p.gate, p.tokens, p.columns, p.columns, 16, 64) &&
           encode_matrix_map(&up_, p.dtype, p.up, p.tokens, p.columns, p.columns, 16, 64) &&
           store_.prepare(p.dtype, {p.grad_gate, p.grad_up, p.product}, p.tokens, p.columns);
  }

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ void init(Shared& shared) const {
    for (auto& warp : shared.full)
      for (uint64_t& full : warp) mbarrier_init(&full, 1);
  }

  __device__ __forceinline__ void begin(int row, int column, Shared& shared) const {
    for (int piece = 0; piece < kPlaces; piece++) fetch(piece, row, column, shared);
  }

  __device__ __forceinline__ void operator()(float (&sums)[kSums], int part, int row, int column, Shared& shared) const {
    const int warp = warp_of_group();
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int piece = part * kPieces + i, place = piece % kPlaces;
      ThreePieces& pieces = shared.pieces[warp][place];
      hopper::mbarrier_wait(&shared.full[warp][place], piece / kPlaces % 2);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t gates[4], ups[4], products[4];
        ldmatrix_x4(gates, pieces.at(0, half));
        ldmatrix_x4(ups, pieces.at(1, half));
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 g = unpack2(gates[j], T{}), u = unpack2(ups[j], T{});
          const float* d = &sums[16 * i + 8 * half + 2 * j];
          const Results x = results_of<T, A>(d[0], g.x, u.x), y = results_of<T, A>(d[1], g.y, u.y);
          gates[j] = pack2(x.grad_gate, y.grad_gate, T{});
          ups[j] = pack2(x.grad_up, y.grad_up, T{});
          products[j] = pack2(x.product, y.product, T{});
        }
        stmatrix_x4(pieces.at(0, half), gates);
        stmatrix_x4(pieces.at(1, half), ups);
        stmatrix_x4(pieces.at(2, half), products);
      }
      store_.store(pieces, row + 16 * warp, column + i * StoreThree<T>::kColumns);
      if (piece + kPlaces < kParts * kPieces) fetch(piece + kPlaces, row - 64 * part, column, shared);
    }
  }
#endif

 private:
  static constexpr int kPieces = kTileColumns / StoreThree<T>::kColumns;  // of 64 rows
  static_assert(kParts * kPieces % (2 * kPlaces) == 0, "phases of a place begin anew with every tile");
  CUtensorMap gate_, up_;
  StoreThree<T> store_;

#ifdef PACKOPS_SM90A
  // Number `piece` of the tile that begins there.
  __device__ __forceinline__ void fetch(int piece, int row, int column, Shared& shared) const {
    if (threadIdx.x % 32 != 0) return;
    const int warp = warp_of_group(), place = piece % kPlaces;
    hopper::tma_store_wait_read();  // what was in this place has left
    uint64_t* full = &shared.full[warp][place];
    mbarrier_arrive_expect_tx(full, 2 * sizeof(ThreePieces::bytes[0]));
    row += piece / kPieces * 64 + 16 * warp;
    column += piece % kPieces * StoreThree<T>::kColumns;
    hopper::tma_load_2d(shared.pieces[warp][place].bytes[0], gate_, column, row, full);
    hopper::tma_load_2d(shared.pieces[warp][place].bytes[1], up_, column, row, full);
  }
#endif
};

// ---- Host

using Left = ProductOperand<Major::k, kTileRows, false>;

template <typename T, Activation A>
cudaError_t forward(const GatedMlpParams& p, cudaStream_t stream) {
  Product<T, Left, GateAndUp, FinishForward<T, A>> product;
  product.steps = steps_of(p.terms);
  if (!product.a.prepare(p.dtype, p.x, p.tokens, p.terms, p.terms) ||
      !product.b.prepare(p.dtype, p.gate_weight, p.up_weight, p.columns, p.terms) || !product.finish.prepare(p))
    return cudaErrorInvalidValue;
  return launch_product(product, choose_product_grid(p.tokens, 2 * p.columns, p.terms), stream);
}

template <typename T, Activation A>
cudaError_t backward(const GatedMlpParams& p, cudaStream_t stream) {
  Product<T, Left, ProductOperand<Major::mn, kTileColumns, true>, FinishBackward<T, A>> product;
  product.steps = steps_of(p.terms);
  if (!product.a.prepare(p.dtype, p.grad, p.tokens, p.terms, p.terms) ||
      !product.b.prepare(p.dtype, p.down_weight, p.columns, p.terms, p.columns) || !product.finish.prepare(p))
    return cudaErrorInvalidValue;
  return launch_product(product, choose_product_grid(p.tokens, p.columns, p.terms), stream);
}

}  // namespace

bool gated_mlp_fits(const GatedMlpParams& p) {
  return p.columns > 0 && p.columns % 8 == 0 && p.activation != Activation::gelu &&
         product_fits(p.dtype, {p.tokens, p.columns}, p.terms,
                      {p.x, p.gate_weight, p.up_weight, p.grad, p.down_weight, p.gate, p.up});
}

cudaError_t gated_mlp_cuda(const GatedMlpParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.activation == Activation::silu)
      return p.grad ? backward<T, Activation::silu>(p, stream) : forward<T, Activation::silu>(p, stream);
    return p.grad ? backward<T, Activation::gelu_tanh>(p, stream) : forward<T, Activation::gelu_tanh>(p, stream);
  });
}

}  // namespace packops

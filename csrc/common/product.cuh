// A product of matrices on Hopper, tile by tile, each tile finished while it is in registers. For lm_head.cu and gated_mlp.cu.
//
//   producer (1 thread)   keeps a ring of stages full, kStageTerms of the sums' terms each, tile after tile
//   consumers (2 x 128)   take turns ("ping-pong"): each computes every second tile alone, 192 fp32 registers a thread, and finishes
//                         it while the other multiplies, so the tensor cores go on
//
// The turns are needed for correctness too: a consumer that ran ahead to its own stages of the ring would see only the parity of a
// phase, and take the filling before for its own.
//
// The two blocks of a cluster have neighbouring tiles and share one operand, of which each fetches half for both.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/product.h"
#include "common/tensor_map.cuh"

namespace packops {
namespace {

constexpr int kSums = kTileColumns / 2;  // of a thread, for 64 rows
constexpr int kParts = kTileRows / 64;

// Tiles begin at multiples of 1024 bytes, where the 128-byte swizzle begins anew.
struct ProductStage {
  uint16_t a[kTileRows * kStageTerms], b[kTileColumns * kStageTerms];
};
template <typename Finish>
struct ProductShared {
  static constexpr int kStages = product_stages(sizeof(typename Finish::Shared));
  ProductStage stages[kStages];
  typename Finish::Shared of_finish[kProductConsumers];
  uint64_t full[kStages], empty[kStages], turn[kProductConsumers];
};

// A Finish that needs nothing before a tile's sums are there. Finish::Shared: of each consuming warp group, a multiple of 1024 bytes.
struct FinishesSums {
  template <typename Shared>
  __device__ __forceinline__ void init(Shared&) const {}
  template <typename Shared>
  __device__ __forceinline__ void begin(int, int, Shared&) const {}
};

// Which index of a matrix is contiguous in memory: that of the sums' terms (k), or the other one (mn).
enum class Major { k, mn };

// What a stage holds of an operand: kStageTerms terms of kExtent rows of a, or columns of b. k-major it lies as rows of 64 terms,
// mn-major as panels of 64 terms by 64 rows or columns.
template <Major kMajor, int kExtent, bool kIsShared>
class ProductOperand {
 public:
  static constexpr bool kShared = kIsShared, kTransposed = kMajor == Major::mn;
  static constexpr int k16Terms = kTransposed ? 16 * 128 : 16 * 2;  // bytes from terms to the next 16
  static constexpr int k64Rows = 64 * kStageTerms * 2;              // bytes from rows or columns to the next 64

  // stride: from row to row of the matrix as it lies, in elements. False: the driver refuses.
  bool prepare(DType dtype, const void* data, int64_t extent, int64_t terms, int64_t stride) {
    return kTransposed ? encode_matrix_map(&map_, dtype, data, terms, extent, stride, kBoxRows)
                       : encode_matrix_map(&map_, dtype, data, extent, terms, stride, kBoxRows);
  }

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ void fetch(uint16_t* stage, int first, int term, int block, uint64_t* full) const {
    const int half = kShared ? block * kBoxRows : 0;
#pragma unroll
    for (int panel = 0; panel < (kTransposed ? kExtent / 64 : 1); panel++) {
      uint16_t* to = stage + panel * (k64Rows / 2) + half * 64;
      const int x = kTransposed ? first + 64 * panel : term, y = (kTransposed ? term : first) + half;
      if constexpr (kShared) hopper::tma_load_2d_multicast(to, map_, x, y, full, (1 << kProductCluster) - 1);
      else hopper::tma_load_2d(to, map_, x, y, full);
    }
  }
  __device__ __forceinline__ static WgmmaDescriptor descriptor(const uint16_t* stage) { return WgmmaDescriptor(stage, k64Rows); }
#endif

 private:
  static constexpr int kBoxRows = (kTransposed ? kStageTerms : kExtent) / (kShared ? kProductCluster : 1);
  CUtensorMap map_;
};

// a b^T. finish(sums, part, row, column, shared) gets a part of a tile, 64 rows as wgmma leaves them, from that row and column on;
// finish.begin(row, column, shared) is told of a tile before its sums are made. Where a is shared, a cluster's tiles lie side by side;
// where b is, one above the other.
template <typename T, typename A, typename B, typename F>
struct Product {
  using Finish = F;
  static constexpr bool kSharesA = A::kShared;
  static_assert(A::kShared != B::kShared);
  A a;
  B b;
  Finish finish;
  int steps;  // stages of a tile

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ static int row_of(ProductTile tile, int block) {
    return (kSharesA ? tile.row : tile.row * kProductCluster + block) * kTileRows;
  }
  __device__ __forceinline__ static int column_of(ProductTile tile, int block) {
    return (kSharesA ? tile.column * kProductCluster + block : tile.column) * kTileColumns;
  }

  __device__ __forceinline__ void fetch(ProductStage& stage, ProductTile tile, int block, int step, uint64_t* full) const {
    const int term = step * kStageTerms;
    a.fetch(stage.a, row_of(tile, block), term, block, full);
    b.fetch(stage.b, column_of(tile, block), term, block, full);
  }

  __device__ __forceinline__ void multiply(float (&sums)[kParts][kSums], const ProductStage& stage, bool add) const {
    const WgmmaDescriptor of_a = A::descriptor(stage.a), of_b = B::descriptor(stage.b);
#pragma unroll
    for (int k = 0; k < kStageTerms / 16; k++)
#pragma unroll
      for (int part = 0; part < kParts; part++)
        hopper::wgmma_m64n192k16<A::kTransposed, B::kTransposed>(sums[part], of_a.at(k * A::k16Terms + part * A::k64Rows),
                                                                 of_b.at(k * B::k16Terms), add || k > 0, T{});
  }
#endif
};

#ifdef PACKOPS_SM90A

// The tiles of a cluster, in the order of the walk.
class ProductWalk {
 public:
  __device__ explicit ProductWalk(const ProductGrid& grid) : grid_(grid), tile_(blockIdx.x / kProductCluster) {}
  __device__ bool next(ProductTile& tile) {
    if (tile_ >= grid_.tiles()) return false;
    tile = product_tile(grid_, tile_);
    tile_ += gridDim.x / kProductCluster;
    return true;
  }

 private:
  ProductGrid grid_;
  int64_t tile_;
};

#endif

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, 1) product_kernel(const __grid_constant__ Product product, ProductGrid grid) {
#ifdef PACKOPS_SM90A
  using namespace hopper;
  using Shared = ProductShared<typename Product::Finish>;
  constexpr int kStages = Shared::kStages;
  Shared& s = *dynamic_shared<Shared>();
  const int group = threadIdx.x / 128, steps = product.steps, block = blockIdx.x % kProductCluster;
  ProductWalk walk(grid);
  ProductTile tile;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kProductCluster);  // both blocks write into it
    }
    for (int i = 0; i < kProductConsumers; i++) {
      mbarrier_init(&s.turn[i], 1);
      product.finish.init(s.of_finish[i]);
    }
    fence_mbarrier_init();
  }
  barrier_cluster();

  if (group == 0) {  // producer
    setmaxnreg_dec<24>();
    if (threadIdx.x == 0) {
      int stage = 0, phase = 0;
      while (walk.next(tile))
        for (int step = 0; step < steps; step++) {
          mbarrier_wait(&s.empty[stage], phase ^ 1);
          mbarrier_arrive_expect_tx(&s.full[stage], sizeof(ProductStage));
          product.fetch(s.stages[stage], tile, block, step, &s.full[stage]);
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
    }
    __syncwarp();
  } else {  // consumers
    setmaxnreg_inc<240>();
    const int thread = threadIdx.x % 128;
    const bool frees = thread < kProductCluster;  // block `thread`'s stages
    float sums[kParts][kSums];
    for (unsigned turn = 0; walk.next(tile); turn++) {
      if (turn % kProductConsumers != unsigned(group - 1)) continue;
      const int row = product.row_of(tile, block), column = product.column_of(tile, block);
      product.finish.begin(row, column, s.of_finish[group - 1]);
      int stage = turn * steps % kStages, phase = turn * steps / kStages % 2, last = 0;
      if (turn > 0) mbarrier_wait(&s.turn[group - 1], (turn - 1) / 2 % 2);
      for (int step = 0; step < steps; step++) {
        mbarrier_wait(&s.full[stage], phase);
        wgmma_fence();
        product.multiply(sums, s.stages[stage], step > 0);
        wgmma_commit_group();
        wgmma_wait_group<1>();  // the stage before this one has been read
        if (step > 0 && frees) mbarrier_arrive_cluster(&s.empty[last], thread);
        last = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      if (thread == 0) mbarrier_arrive_cluster(&s.turn[2 - group], block);  // all stages of this tile have been seen full
      wgmma_wait_group<0>();
      if (frees) mbarrier_arrive_cluster(&s.empty[last], thread);
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        hold(sums[part]);
        product.finish(sums[part], part, row + part * 64, column, s.of_finish[group - 1]);
      }
    }
    tma_store_wait_read();  // shared memory must outlive the stores that read it
    __syncwarp();
  }
  barrier_cluster();  // shared memory must outlive the other block's copies into it and arrivals at it
#endif
}

// Whether copies of whole vectors can take these sizes and places, and the code that is loaded for the current device has the product.
// width: of rows in memory, in elements.
inline bool product_fits(DType dtype, std::initializer_list<int64_t> counts, int64_t width,
                         std::initializer_list<const void*> places) {
  constexpr int64_t kMost = int64_t(1) << 30;
  Device device;
  return (dtype == DType::bf16 || dtype == DType::f16) && width > 0 && width % 8 == 0 && width < kMost &&
         std::all_of(
             counts.begin(), counts.end(), [](int64_t count) { return count < kMost; }) &&
         std::all_of(
             places.begin(), places.end(), [](const void* place) { return reinterpret_cast<uintptr_t>(place) % 16 == 0; }) &&
         current_device(device) == cudaSuccess && device.has_wgmma;
}

constexpr int steps_of(int64_t terms) { return int((terms + kStageTerms - 1) / kStageTerms); }

template <typename F>
cudaError_t with_type(DType dtype, F&& f) {
  return dtype == DType::bf16 ? f(bf16_t{}) : f(half_t{});
}

template <typename Product>
cudaError_t launch_product(const Product& product, const ProductGrid& grid, cudaStream_t stream) {
  constexpr auto kernel = product_kernel<Product>;
  constexpr size_t kShared = sizeof(ProductShared<typename Product::Finish>);
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  static std::atomic<int> known[kMaxDevices];  // clusters that the device runs at once: some multiprocessors may have no partner
  int clusters = known[device % kMaxDevices].load(std::memory_order_relaxed);
  if (clusters == 0) {
    if ((error = allow_shared<kernel>(device, kShared)) != cudaSuccess) return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kProductCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = kProductCluster;
    config.blockDim = kProductThreads;
    config.dynamicSmemBytes = kShared;
    config.attrs = &cluster;
    config.numAttrs = 1;
    if ((error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) != cudaSuccess) return error;
    if (clusters < 1) return cudaErrorInvalidConfiguration;
    known[device % kMaxDevices].store(clusters, std::memory_order_relaxed);
  }
  const int64_t wanted = grid.tiles() < clusters ? grid.tiles() : clusters;
  return launch_with({.cluster = kProductCluster}, kernel, dim3(unsigned(wanted * kProductCluster)), dim3(kProductThreads),
                     kShared, stream, product, grid);
}

}  // namespace
}  // namespace packops

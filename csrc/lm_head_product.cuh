// The products of the lm_head on Hopper, tile by tile, each tile finished while it is in registers. Part of lm_head.cu.
//
//   producer (1 thread)   keeps a ring of kLmHeadStages stages full, kLmHeadDepth of the sums' terms each, tile after tile
//   consumers (2 x 128)   take turns ("ping-pong"): each computes every second tile alone, 192 fp32 registers a thread, and finishes
//                         it while the other multiplies, so the tensor cores go on
//
// The turns are needed for correctness too: a consumer that ran ahead to its own stages of the ring would see only the parity of a
// phase, and take the filling before for its own.
//
// The two blocks of a cluster have neighbouring tiles and share one operand, of which each fetches half for both.
#pragma once

#include <atomic>

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "lm_head_launch.h"

namespace packops {
namespace {

constexpr int kSums = kLmHeadColumns / 2;  // of a thread, for 64 rows
constexpr int kParts = kLmHeadRows / 64;

// Tiles begin at multiples of 1024 bytes, where the 128-byte swizzle begins anew.
struct LmHeadStage {
  uint16_t a[kLmHeadRows * kLmHeadDepth], b[kLmHeadColumns * kLmHeadDepth];
};
struct LmHeadShared {
  LmHeadStage stages[kLmHeadStages];
  unsigned char staging[kLmHeadConsumers][kLmHeadStoreBytes];
  uint64_t full[kLmHeadStages], empty[kLmHeadStages], turn[kLmHeadConsumers];
};
static_assert(sizeof(LmHeadShared) == kLmHeadShared);

// Which index of a matrix is contiguous in memory: that of the sums' terms (k), or the other one (mn).
enum class Major { k, mn };

// What a stage holds of an operand: kLmHeadDepth terms of kExtent rows of a, or columns of b. k-major it lies as rows of 64 terms,
// mn-major as panels of 64 terms by 64 rows or columns.
template <Major kMajor, int kExtent, bool kShared>
class LmHeadOperand {
 public:
  static constexpr bool kTransposed = kMajor == Major::mn;
  static constexpr int k16Terms = kTransposed ? 16 * 128 : 16 * 2;  // bytes from terms to the next 16
  static constexpr int k64Rows = 64 * kLmHeadDepth * 2;             // bytes from rows or columns to the next 64

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
      if constexpr (kShared) hopper::tma_load_2d_multicast(to, map_, x, y, full, (1 << kLmHeadCluster) - 1);
      else hopper::tma_load_2d(to, map_, x, y, full);
    }
  }
  __device__ __forceinline__ static WgmmaDescriptor descriptor(const uint16_t* stage) { return WgmmaDescriptor(stage, k64Rows); }
#endif

 private:
  static constexpr int kBoxRows = (kTransposed ? kLmHeadDepth : kExtent) / (kShared ? kLmHeadCluster : 1);
  CUtensorMap map_;
};

// a b^T. finish(sums, row, column, staging) gets 64 rows of a tile, as wgmma leaves them, from that row and column on. staging:
// kLmHeadStoreBytes of shared memory of the warp group's own. kSharesA: a cluster's tiles lie side by side and share a; otherwise one
// above the other, and they share b.
template <typename T, Major kMajor, bool kSharesA, typename Finish>
struct LmHeadProduct {
  using A = LmHeadOperand<kMajor, kLmHeadRows, kSharesA>;
  using B = LmHeadOperand<kMajor, kLmHeadColumns, !kSharesA>;
  A a;
  B b;
  Finish finish;
  int steps;  // stages of a tile

#ifdef PACKOPS_SM90A
  __device__ __forceinline__ static int row_of(LmHeadTile tile, int block) {
    return (kSharesA ? tile.row : tile.row * kLmHeadCluster + block) * kLmHeadRows;
  }
  __device__ __forceinline__ static int column_of(LmHeadTile tile, int block) {
    return (kSharesA ? tile.column * kLmHeadCluster + block : tile.column) * kLmHeadColumns;
  }

  __device__ __forceinline__ void fetch(LmHeadStage& stage, LmHeadTile tile, int block, int step, uint64_t* full) const {
    const int term = step * kLmHeadDepth;
    a.fetch(stage.a, row_of(tile, block), term, block, full);
    b.fetch(stage.b, column_of(tile, block), term, block, full);
  }

  __device__ __forceinline__ void multiply(float (&sums)[kParts][kSums], const LmHeadStage& stage, bool add) const {
    const WgmmaDescriptor of_a = A::descriptor(stage.a), of_b = B::descriptor(stage.b);
#pragma unroll
    for (int k = 0; k < kLmHeadDepth / 16; k++)
#pragma unroll
      for (int part = 0; part < kParts; part++)
        hopper::wgmma_m64n192k16<A::kTransposed>(sums[part], of_a.at(k * A::k16Terms + part * A::k64Rows),
                                                 of_b.at(k * B::k16Terms), add || k > 0, T{});
  }
#endif
};

#ifdef PACKOPS_SM90A

// The tiles of a cluster, in the order of the walk.
class LmHeadWalk {
 public:
  __device__ explicit LmHeadWalk(const LmHeadGrid& grid) : grid_(grid), tile_(blockIdx.x / kLmHeadCluster) {}
  __device__ bool next(LmHeadTile& tile) {
    if (tile_ >= grid_.tiles()) return false;
    tile = lm_head_tile(grid_, tile_);
    tile_ += gridDim.x / kLmHeadCluster;
    return true;
  }

 private:
  LmHeadGrid grid_;
  int64_t tile_;
};

#endif

template <typename Product>
__global__ void __launch_bounds__(kLmHeadThreads, 1) lm_head_kernel(const __grid_constant__ Product product, LmHeadGrid grid) {
#ifdef PACKOPS_SM90A
  using namespace hopper;
  LmHeadShared& s = *dynamic_shared<LmHeadShared>();
  const int group = threadIdx.x / 128, steps = product.steps, block = blockIdx.x % kLmHeadCluster;
  LmHeadWalk walk(grid);
  LmHeadTile tile;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kLmHeadStages; i++) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kLmHeadCluster);  // both blocks write into it
    }
    for (int i = 0; i < kLmHeadConsumers; i++) mbarrier_init(&s.turn[i], 1);
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
          mbarrier_arrive_expect_tx(&s.full[stage], sizeof(LmHeadStage));
          product.fetch(s.stages[stage], tile, block, step, &s.full[stage]);
          if (++stage == kLmHeadStages) stage = 0, phase ^= 1;
        }
    }
    __syncwarp();
  } else {  // consumers
    setmaxnreg_inc<240>();
    const int thread = threadIdx.x % 128;
    const bool frees = thread < kLmHeadCluster;  // block `thread`'s stages
    float sums[kParts][kSums];
    for (unsigned turn = 0; walk.next(tile); turn++) {
      if (turn % kLmHeadConsumers != unsigned(group - 1)) continue;
      int stage = turn * steps % kLmHeadStages, phase = turn * steps / kLmHeadStages % 2, last = 0;
      if (turn > 0) mbarrier_wait(&s.turn[group - 1], (turn - 1) / 2 % 2);
      for (int step = 0; step < steps; step++) {
        mbarrier_wait(&s.full[stage], phase);
        wgmma_fence();
        product.multiply(sums, s.stages[stage], step > 0);
        wgmma_commit_group();
        wgmma_wait_group<1>();  // the stage before this one has been read
        if (step > 0 && frees) mbarrier_arrive_cluster(&s.empty[last], thread);
        last = stage;
        if (++stage == kLmHeadStages) stage = 0, phase ^= 1;
      }
      if (thread == 0) mbarrier_arrive_cluster(&s.turn[2 - group], block);  // all stages of this tile have been seen full
      wgmma_wait_group<0>();
      if (frees) mbarrier_arrive_cluster(&s.empty[last], thread);
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        hold(sums[part]);
        product.finish(sums[part], product.row_of(tile, block) + part * 64, product.column_of(tile, block), s.staging[group - 1]);
      }
    }
    tma_store_wait_read();  // shared memory must outlive the stores that read it
    __syncwarp();
  }
  barrier_cluster();  // shared memory must outlive the other block's copies into it and arrivals at it
#endif
}

template <typename Product>
cudaError_t launch_product(const Product& product, const LmHeadGrid& grid, cudaStream_t stream) {
  constexpr auto kernel = lm_head_kernel<Product>;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  static std::atomic<int> known[kMaxDevices];  // clusters that the device runs at once: some multiprocessors may have no partner
  int clusters = known[device % kMaxDevices].load(std::memory_order_relaxed);
  if (clusters == 0) {
    if ((error = allow_shared<kernel>(device, kLmHeadShared)) != cudaSuccess) return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kLmHeadCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = kLmHeadCluster;
    config.blockDim = kLmHeadThreads;
    config.dynamicSmemBytes = kLmHeadShared;
    config.attrs = &cluster;
    config.numAttrs = 1;
    if ((error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) != cudaSuccess) return error;
    if (clusters < 1) return cudaErrorInvalidConfiguration;
    known[device % kMaxDevices].store(clusters, std::memory_order_relaxed);
  }
  const int64_t wanted = grid.tiles() < clusters ? grid.tiles() : clusters;
  return launch_with({.cluster = kLmHeadCluster}, kernel, dim3(unsigned(wanted * kLmHeadCluster)), dim3(kLmHeadThreads),
                     kLmHeadShared, stream, product, grid);
}

}  // namespace
}  // namespace packops

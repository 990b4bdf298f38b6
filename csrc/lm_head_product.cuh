// hidden weight^T on Hopper, tile by tile, each tile handed to an epilogue while it is in registers. Part of lm_head.cu.
//
//   producer (1 thread)   keeps a ring of kLmHeadStages stages full, 64 columns of the width each, tile after tile
//   consumers (2 x 128)   take turns ("ping-pong"): each computes every second tile alone, 192 fp32 registers a thread, and has its
//                         epilogue while the other multiplies, so the tensor cores go on
//
// The turns are needed for correctness too: a consumer that ran ahead to its own stages of the ring would see only the parity of a
// phase, and take the filling before for its own.
#pragma once

#include <atomic>
#include <type_traits>

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/vec.cuh"
#include "lm_head_launch.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace packops {
namespace {

constexpr int kSums = kLmHeadColumns / 2;  // of a thread, for 64 rows
constexpr int kParts = kLmHeadRows / 64;

#ifdef __CUDACC__

struct LmHeadShared {  // tiles at multiples of 1024 bytes, where the 128-byte swizzle begins anew
  uint16_t hidden[kLmHeadStages][kLmHeadRows * kLmHeadDepth];
  uint16_t weight[kLmHeadStages][kLmHeadColumns * kLmHeadDepth];
  uint16_t out[4 * kLmHeadConsumers][kLmHeadStoreBytes / 2];
  uint64_t full[kLmHeadStages], empty[kLmHeadStages], turn[kLmHeadConsumers];
};
static_assert(sizeof(LmHeadShared) == kLmHeadShared);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile of rows of 128 bytes with the 128-byte swizzle, as an operand: 1024 bytes to the next eight rows.
__device__ __forceinline__ uint64_t wgmma_descriptor(const uint16_t* tile) {
  return uint64_t(shared_address(tile) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

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

// 16 rows x 64 columns of one warp, from registers to memory through 2 KB of its own shared memory.
template <typename T, int kFirst>
__device__ __forceinline__ void store_piece(const float (&x)[kSums], const CUtensorMap& map, uint16_t* staging, int row,
                                            int column) {
  const int lane = threadIdx.x % 32;
  // Lanes 0 - 15 name rows 0 - 15 of one group of 8 columns, lanes 16 - 31 those of the next; chunks are swizzled as the map says.
  const uint32_t to = shared_address(staging) + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
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
  if (lane == 0) hopper::tma_store_2d(map, staging, column + 2 * kFirst, row);
}

#endif

// Epilogue(sums, p, row, column tile) gets a thread's sums in rows `row` and `row` + 8. If Epilogue::kStores, transform<first, count>
// turns that many of them into what is stored, 64 columns at a time so that registers become free.
template <typename T, typename Epilogue>
__global__ void __launch_bounds__(kLmHeadThreads, 1)
    lm_head_kernel(const __grid_constant__ CUtensorMap hidden_map, const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ CUtensorMap out_map, const __grid_constant__ LmHeadParams p, LmHeadGrid grid) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace hopper;
  LmHeadShared& s = *dynamic_shared<LmHeadShared>();
  const int group = threadIdx.x / 128, steps = int((p.width + kLmHeadDepth - 1) / kLmHeadDepth),
            block = blockIdx.x % kLmHeadCluster;
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
      constexpr int kShare = kLmHeadColumns / kLmHeadCluster;  // rows of the weight that this block fetches for both
      while (walk.next(tile)) {
        const int row = (tile.row * kLmHeadCluster + block) * kLmHeadRows, column = tile.column * kLmHeadColumns + block * kShare;
        for (int step = 0; step < steps; step++) {
          mbarrier_wait(&s.empty[stage], phase ^ 1);
          mbarrier_arrive_expect_tx(&s.full[stage], kLmHeadStageBytes);
          tma_load_2d(s.hidden[stage], hidden_map, step * kLmHeadDepth, row, &s.full[stage]);
          tma_load_2d_multicast(s.weight[stage] + block * kShare * kLmHeadDepth, weight_map, step * kLmHeadDepth, column,
                                &s.full[stage], (1 << kLmHeadCluster) - 1);
          if (++stage == kLmHeadStages) stage = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
  } else {  // consumers
    setmaxnreg_inc<240>();
    const int thread = threadIdx.x % 128, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const bool frees = thread < kLmHeadCluster;  // block `thread`'s stages
    float sums[kParts][kSums];
    for (unsigned turn = 0; walk.next(tile); turn++) {
      if (turn % kLmHeadConsumers != unsigned(group - 1)) continue;
      int stage = turn * steps % kLmHeadStages, phase = turn * steps / kLmHeadStages % 2, last = 0;
      if (turn > 0) mbarrier_wait(&s.turn[group - 1], (turn - 1) / 2 % 2);
      for (int step = 0; step < steps; step++) {
        mbarrier_wait(&s.full[stage], phase);
        const uint64_t a = wgmma_descriptor(s.hidden[stage]), b = wgmma_descriptor(s.weight[stage]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kLmHeadDepth / 16; k++)  // 16 elements are 32 bytes; 64 rows are 8 KB
#pragma unroll
          for (int part = 0; part < kParts; part++)
            wgmma_m64n192k16(sums[part], a + 2 * k + part * (64 * 128 / 16), b + 2 * k, step + k > 0, T{});
        wgmma_commit_group();
        wgmma_wait_group<1>();  // the stage before this one has been read
        if (step > 0 && frees) mbarrier_arrive_cluster(&s.empty[last], thread);
        last = stage;
        if (++stage == kLmHeadStages) stage = 0, phase ^= 1;
      }
      if (thread == 0) mbarrier_arrive_cluster(&s.turn[2 - group], block);  // all stages of this tile have been seen full
      wgmma_wait_group<0>();
      if (frees) mbarrier_arrive_cluster(&s.empty[last], thread);

      const int first_row = (tile.row * kLmHeadCluster + block) * kLmHeadRows + warp % 4 * 16;
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        hold(sums[part]);
        const int row = first_row + part * 64, column = tile.column * kLmHeadColumns;
        Epilogue epilogue(sums[part], p, row + lane / 4, tile.column);
        if constexpr (Epilogue::kStores) {
          const auto store = [&](auto first) {
            epilogue.template transform<first, 32>(sums[part]);
            store_piece<T, first>(sums[part], out_map, s.out[warp], row, column);
          };
          store(std::integral_constant<int, 0>{});
          store(std::integral_constant<int, 32>{});
          store(std::integral_constant<int, 64>{});
        }
      }
    }
    if constexpr (Epilogue::kStores) {
      if (lane == 0) tma_store_wait_read();  // shared memory must outlive the stores that read it
      __syncwarp();
    }
  }
  barrier_cluster();  // shared memory must outlive the other block's copies into it and arrivals at it
#endif
}

// A row-major matrix of 16-bit elements, in boxes of 64 columns. The driver's function is looked up, so nothing links libcuda.
inline bool encode_map(CUtensorMap* map, DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUtensorMapDataType type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode && encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, typename Epilogue>
cudaError_t launch_product(const LmHeadParams& p, int device, cudaStream_t stream) {
  CUtensorMap hidden_map, weight_map, out_map{};
  if (!encode_map(&hidden_map, p.dtype, p.hidden, p.rows, p.width, p.width, kLmHeadRows) ||
      !encode_map(&weight_map, p.dtype, p.weight, p.vocab, p.width, p.width, kLmHeadColumns / kLmHeadCluster) ||
      (Epilogue::kStores && !encode_map(&out_map, p.dtype, p.out, p.rows, p.vocab, p.out_stride, 16)))
    return cudaErrorInvalidValue;
  constexpr auto kernel = lm_head_kernel<T, Epilogue>;
  static std::atomic<int> known[kMaxDevices];  // clusters that the device runs at once: some multiprocessors may have no partner
  int clusters = known[device % kMaxDevices].load(std::memory_order_relaxed);
  if (clusters == 0) {
    cudaError_t error = allow_shared<kernel>(device, kLmHeadShared);
    if (error != cudaSuccess) return error;
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
  const LmHeadGrid grid = choose_lm_head_grid(p.rows, p.vocab, p.width);
  const int64_t wanted = grid.tiles() < clusters ? grid.tiles() : clusters;
  return launch_with({.cluster = kLmHeadCluster}, kernel, dim3(unsigned(wanted * kLmHeadCluster)), dim3(kLmHeadThreads),
                     kLmHeadShared, stream, hidden_map, weight_map, out_map, p, grid);
}

#else

// The emulator has neither tensor copies nor wgmma. It forms a tile's sums one by one, puts them where wgmma would, and hands them
// to the same epilogues.
template <typename T, typename Epilogue>
void lm_head_kernel(const LmHeadParams& p, const LmHeadGrid& grid) {
  const LmHeadTile tile = lm_head_tile(grid, blockIdx.x / kLmHeadCluster);
  const int block = blockIdx.x % kLmHeadCluster, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T *hidden = static_cast<const T*>(p.hidden), *weight = static_cast<const T*>(p.weight);
  const auto column_of = [&](int i) { return tile.column * kLmHeadColumns + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  float sums[kSums];
  for (int part = 0; part < kParts; part++) {
    const int row = (tile.row * kLmHeadCluster + block) * kLmHeadRows + part * 64 + warp * 16 + lane / 4;
    for (int i = 0; i < kSums; i++) {
      const int64_t r = row + i / 2 % 2 * 8, column = column_of(i);
      float sum = 0;
      if (r < p.rows && column < p.vocab)
        for (int64_t k = 0; k < p.width; k++) sum += to_float(hidden[r * p.width + k]) * to_float(weight[column * p.width + k]);
      sums[i] = sum;
    }
    Epilogue epilogue(sums, p, row, tile.column);
    if constexpr (Epilogue::kStores) {
      epilogue.template transform<0, 32>(sums);
      epilogue.template transform<32, 32>(sums);
      epilogue.template transform<64, 32>(sums);
      for (int i = 0; i < kSums; i++) {
        const int64_t r = row + i / 2 % 2 * 8, column = column_of(i);
        if (r < p.rows && column < (p.vocab + 7) / 8 * 8)  // tensor copies write whole vectors
          static_cast<T*>(p.out)[r * p.out_stride + column] = from_float<T>(sums[i]);
      }
    }
  }
}

template <typename T, typename Epilogue>
cudaError_t launch_product(const LmHeadParams& p, int, cudaStream_t stream) {
  const LmHeadGrid grid = choose_lm_head_grid(p.rows, p.vocab, p.width);
  launch(lm_head_kernel<T, Epilogue>, dim3(unsigned(grid.tiles() * kLmHeadCluster)), dim3(128), 0, stream, p, grid);
  return cudaGetLastError();
}

#endif

}  // namespace
}  // namespace packops

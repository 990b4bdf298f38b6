// Cross entropy on CUDA, long rows (sm_90): persistent clusters whose blocks share a row and hold it in rings of shared memory.
#pragma once

#include "ce_loss_prepare.cuh"

namespace packops {
namespace {

// A pipeline of roles:
//   copier    one thread; fills the ring with bulk copies of chunks
//   reducers  read each chunk once and send the row's partial result to every block of the cluster
//   writers   combine the blocks' results, write the loss, and replace the chunks by their gradient
//   storer    one thread; stores these by bulk copies and frees the chunks
// Only the writers wait for other blocks. Meanwhile the next rows are copied and reduced. Forward only: there is no storer, and
// the reducers free the chunks.
template <bool kGrad, int kFeatures>
struct Roles {
  static constexpr int kReducers = kGrad ? kRoleThreads : kForwardThreads;
  static constexpr int kWriters = kGrad ? kRoleThreads : 32;  // forward only: one warp, which writes the loss
  static constexpr int kThreads = kReducers + kWriters + (kGrad ? 64 : 32);
  static constexpr int kBlocks =
      !kGrad && (kFeatures & (kUniform | kStatistics)) ? 2 : resident_blocks(kGrad);  // with more, registers spill
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// A stage of a ring of mbarriers, and the parity of the phase that its users wait for.
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The rows of a cluster, in order. Entries are loaded one row ahead to hide the latency.
struct RowWalk {
  const RowEntry* order;
  int64_t rows, stride, i;
  RowEntry next;

  __device__ __forceinline__ RowWalk(const CeLossParams& p, int cluster)
      : order(Workspace(p).order), rows(p.rows), stride(gridDim.x / cluster), i(blockIdx.x / cluster), next{0, kIgnored} {
    if (i < rows) next = order[i];
  }
  __device__ __forceinline__ bool done() const { return i >= rows; }
  __device__ __forceinline__ RowEntry take() {
    const RowEntry entry = next;
    i += stride;
    if (i < rows) next = order[i];
    return entry;
  }
};
#endif

template <typename T, int kFeatures, bool kGrad>
__global__ void __launch_bounds__(Roles<kGrad, kFeatures>::kThreads, Roles<kGrad, kFeatures>::kBlocks)
    resident_kernel(const __grid_constant__ CeLossParams p, const int stages) {
#if __CUDA_ARCH__ >= 900
  using Maths = RowMaths<T, kFeatures>;
  using Partial = typename Maths::Partial;
  using Role = Roles<kGrad, kFeatures>;
  constexpr int kReducerWarps = Role::kReducers / 32;
  constexpr int kChunkVectors = chunk_bytes(kGrad) / 16;
  static_assert(sizeof(Partial) % 16 == 0 && kReducerWarps <= kMaxWarps && kExchanges % 2 == 0);

  auto* shared = dynamic_shared<unsigned char>();
  const int cluster = int(cluster_nctarank()), rank = int(cluster_ctarank());
  auto* ring = reinterpret_cast<uint4*>(shared);
  auto* results = reinterpret_cast<Partial*>(shared + stages * chunk_bytes(kGrad));  // [kExchanges][cluster]
  Partial* of_warps = results + kExchanges * cluster;                                // [2][kReducerWarps]
  auto* full = reinterpret_cast<MBarrier*>(of_warps + 2 * kMaxWarps);
  MBarrier *empty = full + stages, *written = empty + stages, *exchanged = written + stages, *collected = exchanged + kExchanges;
  auto* targets = reinterpret_cast<float*>(collected + kExchanges);  // [2]

  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, kGrad ? 1 : kReducerWarps);
      mbarrier_init(written + s, Role::kWriters / 32);
    }
    for (int s = 0; s < kExchanges; s++) {
      mbarrier_init(exchanged + s, 1);
      mbarrier_init(collected + s, 1);
    }
    fence_mbarrier_init();
  }
  cluster_sync();

  griddepcontrol_wait();
  RowWalk walk(p, cluster);
  RingPlace place, exchange;
  const int lane = threadIdx.x % 32;

  if (threadIdx.x < Role::kReducers) {                           // ---- reducers
    constexpr int kPerThread = kChunkVectors / Role::kReducers;  // vectors of a whole chunk
    constexpr int kStep = Role::kReducers * kVec<T>;
    static_assert(kChunkVectors % Role::kReducers == 0 && Role::kReducers >= RowPart<T>::kMostHead + kVec<T>);
    const int warp = threadIdx.x / 32;
    int sent = 0;
    const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      if (entry.target < 0) continue;
      const RowPart<T> mine(p, entry.row, cluster, rank);
      const int64_t edge = rank == 0 ? mine.edge(p.vocab, threadIdx.x) : -1;
      const float edge_raw = edge >= 0 ? to_float(mine.row[edge]) : 0.f;
      const int target_element = entry.target - int32_t(mine.column());
      const int target_vector = target_element >= 0 ? target_element / kVec<T> : -1;
      // Double-buffered: the barrier of the next row means that this row's results were read.
      const int set = exchange.stage & 1;
      const auto look_for_target = [&](const uint4* vector, int v) {
        if (v == target_vector) targets[set] = maths.transform_at(reinterpret_cast<const T*>(vector), target_element % kVec<T>);
      };
      Partial part;
      for (int done = 0; done < mine.count; done += kChunkVectors) {
        mbarrier_wait_parity(full + place.stage, place.phase);
        const uint4* chunk = ring + place.stage * kChunkVectors;
        if (mine.count - done >= kChunkVectors) {
          uint4 raw[kPerThread];
#pragma unroll
          for (int k = 0; k < kPerThread; k++) raw[k] = chunk[threadIdx.x + k * Role::kReducers];
#pragma unroll
          for (int k = 0; k < kPerThread; k++)
            look_for_target(chunk + threadIdx.x + k * Role::kReducers, done + threadIdx.x + k * Role::kReducers);
          maths.add(part, raw, mine.column() + int64_t(done + threadIdx.x) * kVec<T>, kStep);
        } else {
          for (int v = threadIdx.x; v < mine.count - done; v += Role::kReducers) {
            const uint4 raw[1] = {chunk[v]};
            look_for_target(chunk + v, done + v);
            maths.add(part, raw, mine.column() + int64_t(done + v) * kVec<T>, kStep);
          }
        }
        if constexpr (!kGrad) {
          __syncwarp();
          if (lane == 0) mbarrier_arrive(empty + place.stage);
        }
        place.advance(stages);
      }
      if (edge >= 0) {
        const float x[1] = {edge == entry.target ? maths.transform_at(mine.row, edge) : maths.transform(edge_raw)};
        if (edge == entry.target) targets[set] = x[0];
        maths.add(part, x, edge);
      }
      part.template reduce_over_warp<kFeatures>();
      Partial* places = of_warps + set * kReducerWarps;
      if (lane == 0) places[warp] = part;
      bar_sync(1, Role::kReducers);
      if (warp == exchange.stage % kReducerWarps) {  // another warp for each row, so that none falls behind
        // With a gradient, full rings hold the reducers back. Forward only, they could overtake the writer.
        if (!kGrad && sent >= kExchanges) mbarrier_wait_parity(collected + exchange.stage, exchange.phase ^ 1);
        part = lane < kReducerWarps ? places[lane] : Partial{};
        part.template reduce_over_warp<kFeatures>();
        const bool in_vectors = target_vector >= 0 && target_vector < mine.count;
        const bool on_edge = rank == 0 && (entry.target < mine.span.head || entry.target >= p.vocab - mine.span.tail);
        part.target = in_vectors || on_edge ? targets[set] : 0.f;
        if (cluster == 1) {  // an ordinary store suffices, and compute-sanitizer does not know st.async to the own block
          if (lane == 0) {
            results[exchange.stage] = part;
            mbarrier_arrive(exchanged + exchange.stage);
          }
        } else {
          if (lane == 0) mbarrier_arrive_expect_tx(exchanged + exchange.stage, cluster * sizeof(Partial));
          if (lane < cluster) {
            uint4 words[sizeof(Partial) / 16];
            memcpy(words, &part, sizeof part);
            auto* to = reinterpret_cast<uint4*>(results + exchange.stage * cluster + rank);
#pragma unroll
            for (int i = 0; i < int(sizeof(Partial) / 16); i++) st_async_16(to + i, words[i], exchanged + exchange.stage, lane);
          }
        }
      }
      exchange.advance(kExchanges);
      sent = min(sent + 1, kExchanges);
    }
  } else if (threadIdx.x < Role::kReducers + Role::kWriters) {  // ---- writers
    constexpr int kPerThread = kChunkVectors / Role::kWriters;
    const int thread = threadIdx.x - Role::kReducers;
    const Maths maths(p, Maths::kHasUniform ? *Workspace(p).class_weight_sum : 0.f);
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      const int64_t t = entry.row;
      const int32_t y = entry.target;
      if (y < 0) {
        if (rank == 0 && thread == 0) write_ignored_row(p, t, y);
        if constexpr (kGrad)
          zero_row(row_of<T>(p.grad, p.grad_layout, t), p.vocab, rank * Role::kWriters + thread, cluster * Role::kWriters);
        continue;
      }
      const float scale = state(p.scale, t);
      const RowPart<T> mine(p, t, cluster, rank);
      mbarrier_wait_parity_cluster(exchanged + exchange.stage, exchange.phase);
      const Partial* arrived = results + exchange.stage * cluster;
      Partial part = lane < cluster ? arrived[lane] : Partial{};
      part.template reduce_over_warp<kFeatures>();
      part.target = 0;
      for (int c = 0; c < cluster; c++) part.target += arrived[c].target;  // 0 but in one block
      if (!kGrad && lane == 0) mbarrier_arrive(collected + exchange.stage);
      exchange.advance(kExchanges);
      if (rank == 0 && thread == 0) write_row<kFeatures>(p, maths, t, part, y);
      if constexpr (kGrad) {
        const RowGradient<T, kFeatures> gradient(maths, y, part.max, part.sum, scale);
        const int64_t column = mine.column();
        T* out = row_of<T>(p.grad, p.grad_layout, t);
        const int target_element = y - int32_t(column);
        const int target_vector = target_element >= 0 ? target_element / kVec<T> : -1;
        for (int done = 0; done < mine.count; done += kChunkVectors) {
          uint4* chunk = ring + place.stage * kChunkVectors;
          const auto write = [&](int v) {
            chunk[v] = gradient.others(chunk[v], column + int64_t(done + v) * kVec<T>);
            if (done + v == target_vector)
              reinterpret_cast<T*>(chunk + v)[target_element % kVec<T>] = from_float<T>(gradient.target(part.target));
          };
          if (mine.count - done >= kChunkVectors) {
#pragma unroll
            for (int k = 0; k < kPerThread; k++) write(thread + k * Role::kWriters);
          } else {
            for (int v = thread; v < mine.count - done; v += Role::kWriters) write(v);
          }
          fence_proxy_async();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(written + place.stage);
          place.advance(stages);
        }
        const int64_t edge = rank == 0 ? mine.edge(p.vocab, thread) : -1;
        if (edge >= 0)
          out[edge] = from_float<T>(edge == y ? gradient.target(part.target) : gradient.other(to_float(mine.row[edge]), edge));
      }
    }
  } else if (threadIdx.x == Role::kReducers + Role::kWriters) {  // ---- copier
    bool wrapped = false;                                        // in the first round every stage is free
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      if (entry.target < 0) continue;
      const RowPart<T> mine(p, entry.row, cluster, rank);
      const auto* source = reinterpret_cast<const uint4*>(mine.row + mine.span.head) + mine.begin;
      for (int done = 0; done < mine.count; done += kChunkVectors) {
        const uint32_t bytes = uint32_t(min(kChunkVectors, mine.count - done)) * 16;
        if (wrapped) mbarrier_wait_parity(empty + place.stage, place.phase ^ 1);
        mbarrier_arrive_expect_tx(full + place.stage, bytes);
        cp_async_bulk(ring + place.stage * kChunkVectors, source + done, bytes, full + place.stage);
        place.advance(stages);
        if (place.stage == 0) wrapped = true;
      }
    }
  } else if (kGrad && threadIdx.x == Role::kReducers + Role::kWriters + 32) {  // ---- storer
    MBarrier* reading = nullptr;  // frees the chunk that the last store may still read
    while (!walk.done()) {
      const RowEntry entry = walk.take();
      if (entry.target < 0) continue;
      const RowPart<T> mine(p, entry.row, cluster, rank);
      T* out = row_of<T>(p.grad, p.grad_layout, entry.row) + mine.column();
      for (int done = 0; done < mine.count; done += kChunkVectors) {
        if (reading && !mbarrier_test_wait_parity(written + place.stage, place.phase)) {  // nothing to do meanwhile
          cp_async_bulk_wait_group_read<0>();
          mbarrier_arrive(reading);
          reading = nullptr;
        }
        mbarrier_wait_parity(written + place.stage, place.phase);
        const uint32_t bytes = uint32_t(min(kChunkVectors, mine.count - done)) * 16;
        cp_async_bulk_store(out + int64_t(done) * kVec<T>, ring + place.stage * kChunkVectors, bytes);
        cp_async_bulk_commit_group();
        if (reading) {
          cp_async_bulk_wait_group_read<1>();
          mbarrier_arrive(reading);
        }
        reading = empty + place.stage;
        place.advance(stages);
      }
    }
    cp_async_bulk_wait_group();
  }
  __syncwarp();
  cluster_sync();  // a block must not exit while another still writes into its shared memory
#endif
}

}  // namespace
}  // namespace packops

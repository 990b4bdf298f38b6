// How ce_loss.cu runs a problem, decided from sizes alone, so that it can be tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace packops {

struct DeviceLimits {
  int architecture;      // 80, 90, 100, ...
  int shared_per_sm;     // bytes
  int shared_per_block;  // bytes, opt-in
};

inline constexpr int kResidentThreads = 512;   // that compute; one more warp issues the loads
inline constexpr int kResidentBlocks = 2;      // per SM, so that one computes while the other waits for its cluster
inline constexpr int kChunkBytes = 8192;       // of a bulk copy, and of a stage of the ring
inline constexpr int kMaxStages = 32;
inline constexpr int kMaxCluster = 8;          // the largest portable cluster

// Shared memory beside the ring: two barriers a stage, two for the exchange, and two sets of partial results of every warp of
// the cluster, `partial_bytes` each.
inline int resident_overhead(int cluster, int partial_bytes) {
  return int(sizeof(uint64_t)) * (2 * kMaxStages + 2) + 2 * cluster * (kResidentThreads / 32) * partial_bytes + 128;
}

struct CeLossConfig {
  bool resident = false;  // read once, the row waits in shared memory; otherwise read twice, the second time from the L2 with luck
  int cluster = 1;        // blocks that share a row
  int stages = 0;
  int shared_bytes = 0;
};

// The smallest cluster whose blocks hold their part of a row in at most about two thirds of the ring: the rest prefetches the
// next row while this one is reduced. Without a gradient nothing must stay, and one block streams rows of any length.
inline CeLossConfig choose_ce_loss_config(int64_t vocab, int element_bytes, bool grad, bool same_alignment, int partial_bytes, const DeviceLimits& device) {
  CeLossConfig config;
  if (device.architecture < 90 || (grad && !same_alignment)) return config;
  const int64_t row_bytes = vocab * element_bytes;
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int overhead = resident_overhead(cluster, partial_bytes);
    const int per_block = std::min(device.shared_per_sm / kResidentBlocks - 1024, device.shared_per_block);
    const int stages = std::min((per_block - overhead) / kChunkBytes, kMaxStages);
    const int64_t part_chunks = (row_bytes / cluster + kChunkBytes - 1) / kChunkBytes + 1;
    const bool last = cluster == kMaxCluster;
    if (stages < 4) return config;
    if (!grad || part_chunks * 3 <= stages * 2 + 2 || (last && part_chunks + 2 <= stages)) {
      config.resident = true;
      config.cluster = cluster;
      config.stages = stages;
      config.shared_bytes = stages * kChunkBytes + overhead;
      return config;
    }
  }
  return config;
}

}  // namespace packops

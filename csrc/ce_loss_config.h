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

#ifndef PACKOPS_CE_CHUNK
#define PACKOPS_CE_CHUNK 8192
#endif
#ifndef PACKOPS_CE_DEPTH
#define PACKOPS_CE_DEPTH 13
#endif
#ifndef PACKOPS_CE_ROLE
#define PACKOPS_CE_ROLE 128
#endif
#ifndef PACKOPS_CE_BLOCKS
#define PACKOPS_CE_BLOCKS 2
#endif
#ifndef PACKOPS_CE_FWD
#define PACKOPS_CE_FWD 256
#endif
#ifndef PACKOPS_CE_FWD_BLOCKS
#define PACKOPS_CE_FWD_BLOCKS 4
#endif
inline constexpr int kRoleThreads = PACKOPS_CE_ROLE;    // that reduce, and as many that write
inline constexpr int kForwardThreads = PACKOPS_CE_FWD;  // that reduce where nothing is written
constexpr int resident_blocks(bool grad) { return grad ? PACKOPS_CE_BLOCKS : PACKOPS_CE_FWD_BLOCKS; }  // per SM
inline constexpr int kChunkBytes = PACKOPS_CE_CHUNK;  // of a bulk copy, and of a stage of the ring
inline constexpr int kRingDepth = PACKOPS_CE_DEPTH;   // tenths of rows that the ring should hold
inline constexpr int kMaxStages = 16;
inline constexpr int kMaxCluster = 8;               // the largest portable cluster
inline constexpr int kExchanges = 16;               // rows whose partial results can be on their way at once
inline constexpr int kMaxWarps = 16;                // that reduce
inline constexpr int64_t kMinResidentBytes = 1024;  // of a row; below, a row has too little for the machinery

// Shared memory beside the ring: barriers, a partial result of every block of the cluster for every exchange, and two of every
// warp, `partial_bytes` each.
inline int resident_overhead(int cluster, int partial_bytes) {
  return int(sizeof(uint64_t)) * (2 * kMaxStages + 2 * kExchanges) + (kExchanges * cluster + 2 * kMaxWarps) * partial_bytes + 128;
}

struct CeLossConfig {
  bool resident =
      false;        // read once, the row waits in shared memory; otherwise read twice, the second time from the L2 with luck
  int cluster = 1;  // blocks that share a row
  int stages = 0;
  int shared_bytes = 0;
};

// The smallest cluster whose blocks can hold their parts of kRingDepth / 10 rows, so that one row is loaded and reduced while
// another is written. Without a gradient nothing must stay, and one block streams rows of any length.
inline CeLossConfig choose_ce_loss_config(int64_t vocab, int element_bytes, bool grad, bool same_alignment, int partial_bytes,
                                          const DeviceLimits& device) {
  CeLossConfig config;
  const int64_t row_bytes = vocab * element_bytes;
  if (device.architecture < 90 || (grad && !same_alignment) || row_bytes < kMinResidentBytes) return config;
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int overhead = resident_overhead(cluster, partial_bytes);
    const int per_block = std::min(device.shared_per_sm / resident_blocks(grad) - 1024, device.shared_per_block);
    const int stages = std::min((per_block - overhead) / kChunkBytes, kMaxStages);
    if (stages < 4) return config;
    const int64_t part_chunks = (row_bytes / 16 / cluster + 1 + kChunkBytes / 16 - 1) / (kChunkBytes / 16);
    const bool last = cluster == kMaxCluster;
    // A block's reducers may run ahead of another's writers by twice the rows that a ring holds: kExchanges must cover that.
    const bool exchanges_suffice = cluster == 1 || 2 * (stages / part_chunks + 1) < kExchanges;
    if (!exchanges_suffice) return config;
    if (!grad || part_chunks * kRingDepth <= stages * 10 || (last && part_chunks < stages)) {
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

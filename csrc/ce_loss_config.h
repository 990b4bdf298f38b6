// How ce_loss.cu runs a problem, decided from sizes alone, so that it can be tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/device.h"
#include "common/dtype.h"

namespace packops {

// Of the persistent kernel. With a gradient one block has a multiprocessor for itself: of two of half the size rows need clusters
// twice as large. Without, small chunks let short rows in.
inline constexpr int kRoleThreads = 256;                              // that reduce, and as many that write
inline constexpr int kForwardThreads = 256;                           // that reduce where nothing is written
constexpr int resident_blocks(bool grad) { return grad ? 1 : 4; }     // per multiprocessor
constexpr int chunk_bytes(bool grad) { return grad ? 16384 : 8192; }  // of a bulk copy, and of a stage of the ring
inline constexpr int kRingDepth = 13;                                 // tenths of rows that the ring should hold
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

// Of the kernel whose blocks keep a row each. Fewer threads leave more registers for each, and less that every thread does once a row;
// where short rows let many blocks be on a multiprocessor, they need fewer still.
constexpr int staged_blocks(int threads) { return 768 / threads; }  // that registers must suffice for
inline constexpr int kStagedOverhead = 1536;  // bytes of shared memory of a block beside its row; 1024 are the system's
inline int most_staged_bytes(const DeviceLimits& device) { return device.shared_per_sm / 2 - kStagedOverhead; }

// How rows are worked on.
enum class CeLossPath {
  streaming,  // a block reads its row twice, the second time from the L2 with luck
  staged,     // a block reads its row once and keeps it in shared memory until the gradient is written
  resident,   // persistent clusters read rows once, which wait in rings of shared memory
};

struct CeLossConfig {
  CeLossPath path = CeLossPath::streaming;
  int threads = 0;  // staged
  int cluster = 1;  // resident: blocks that share a row
  int stages = 0;   // resident
  int shared_bytes = 0;
};

// A gradient's rows: in one block's shared memory if two such blocks fit on a multiprocessor, so that one loads while the other works.
// Else in the smallest cluster whose blocks can hold their parts of kRingDepth / 10 rows, so that one row is loaded and reduced while
// another is written. Without a gradient nothing must stay, and one block of the persistent kernel streams rows of any length.
inline CeLossConfig choose_ce_loss_config(int64_t vocab, int element_bytes, bool grad, bool same_alignment, int partial_bytes,
                                          const DeviceLimits& device) {
  CeLossConfig config;
  const int64_t row_bytes = vocab * element_bytes;
  if ((grad && !same_alignment) || row_bytes < kMinResidentBytes) return config;
  if (grad && row_bytes <= most_staged_bytes(device)) {
    config.path = CeLossPath::staged;
    config.shared_bytes = int(row_bytes / 16 * 16);
    config.threads = device.shared_per_sm / (config.shared_bytes + kStagedOverhead) >= 4 ? 128 : 256;
    return config;
  }
  if (!device.has_clusters()) return config;
  const int chunk = chunk_bytes(grad);
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int overhead = resident_overhead(cluster, partial_bytes);
    const int per_block = std::min(device.shared_per_sm / resident_blocks(grad) - 1024, device.shared_per_block);
    const int stages = std::min((per_block - overhead) / chunk, kMaxStages);
    if (stages < 4) return config;
    const int64_t part_chunks = (row_bytes / 16 / cluster + 1 + chunk / 16 - 1) / (chunk / 16);
    const bool last = cluster == kMaxCluster;
    // A block's reducers may run ahead of another's writers by twice the rows that a ring holds: kExchanges must cover that.
    const bool exchanges_suffice = cluster == 1 || 2 * (stages / part_chunks + 1) < kExchanges;
    if (!exchanges_suffice) return config;
    if (!grad || part_chunks * kRingDepth <= stages * 10 || (last && part_chunks < stages)) {
      config.path = CeLossPath::resident;
      config.cluster = cluster;
      config.stages = stages;
      config.shared_bytes = stages * chunk + overhead;
      return config;
    }
  }
  return config;
}

// Whether 16-bit rows may be capped the fast way. Elements share reciprocals of e^2u + 1, u = logit scale / softcap: the logit where
// e^2u is 2^kLargestExponent has to be a normal number of the type, with room for its rounding. Then tanh u is 1 there, in fp32, and
// the product of four such sums is finite. And terms are relative to the softcap: 2^31 times e^(2 softcap), the largest quotient of a
// row's sum and one of its terms, has to be finite, with room for the factors of a gradient.
inline constexpr float kLargestExponent = 30, kLargestSoftcap = 32;
inline bool is_capped_fast(float softcap, float logit_scale, DType dtype) {
  const float largest = kLargestExponent * 0.34657359f * softcap / logit_scale;
  return softcap <= kLargestSoftcap &&
         (dtype == DType::f16 ? largest > 0x1p-13f && largest < 65000 : largest > 0x1p-120f && largest < 0x1p120f);
}

// Blocks of the cluster that prepares the rows in one launch, each a tile of kTile rows at a time; 0: too many rows, several
// launches. One block needs no cluster, which older architectures do not have.
inline constexpr int kTile = 1024;  // rows, and threads, of a block that prepares
inline int prepare_cluster(int64_t rows, bool documents, const DeviceLimits& device) {
  const int64_t tiles = (rows + kTile - 1) / kTile;
  if (tiles <= (documents ? 2 : 1)) return 1;
  if (documents || !device.has_clusters() || tiles > 8 * kMaxCluster) return 0;  // a document may be as long as all rows
  int cluster = 2;
  while (cluster < kMaxCluster && cluster < tiles) cluster *= 2;
  return cluster;
}

}  // namespace packops

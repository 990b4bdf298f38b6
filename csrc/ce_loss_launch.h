// How ce_loss.cu runs a problem. Plain functions of the parameters and the device, so that they are tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ce_loss.h"
#include "common/device.h"

namespace packops {

// ---- What of the maths a kernel is compiled for. z_loss, the token's scale, and class weights without smoothing only change the
// coefficients of a row, which costs nothing.

enum Features : int {
  kPlain = 0,
  kScale = 1,       // logit_scale
  kUniform = 2,     // label smoothing
  kStatistics = 4,  // entropy, argmax
  kSoftcap = 8,     // and logit_scale
  kEverything = 15,
};

// Whether 16-bit rows can take the fast softcap. Four elements share one reciprocal of e^2u + 1 each, u = logit_scale x /
// softcap, so logits are clamped to where e^2u is 2^kLargestExponent: there tanh u is 1 in fp32, and the product of four such
// sums is finite. The clamp has to be a normal number of the type. Terms are relative to the softcap, so 2^31 e^(2 softcap), the
// largest quotient of a row's sum and one of its terms, has to be finite, with room for a gradient's factors.
inline constexpr float kLargestExponent = 30, kLargestSoftcap = 32;
inline bool is_capped_fast(float softcap, float logit_scale, DType dtype) {
  const float largest = kLargestExponent * 0.34657359f * softcap / logit_scale;
  return softcap <= kLargestSoftcap &&
         (dtype == DType::f16 ? largest > 0x1p-13f && largest < 65000 : largest > 0x1p-120f && largest < 0x1p120f);
}

// The smallest compiled set that covers the problem.
inline Features ce_loss_features(const CeLossParams& p) {
  const bool softcap = p.softcap > 0, scale = p.logit_scale != 1, uniform = p.label_smoothing != 0,
             statistics = p.entropy || p.prediction;
  if (!uniform && !statistics) {
    if (softcap && (p.logits_dtype == DType::f32 || is_capped_fast(float(p.softcap), float(p.logit_scale), p.logits_dtype)))
      return kSoftcap;
    if (scale && !softcap) return kScale;
  }
  if (statistics || softcap || scale) return kEverything;
  return uniform ? kUniform : kPlain;
}
// Bytes of a warp's partial result.
constexpr int ce_loss_partial_bytes(Features features) { return features & kStatistics ? 32 : 16; }

// ---- The persistent kernel. With a gradient, one block per SM: two half-size blocks would need clusters twice as large. Forward
// only: small chunks, so that short rows qualify.

inline constexpr int kRoleThreads = 256;                              // reducers, and as many writers
inline constexpr int kForwardThreads = 256;                           // reducers of the forward-only kernel
constexpr int resident_blocks(bool grad) { return grad ? 1 : 4; }     // per SM
constexpr int chunk_bytes(bool grad) { return grad ? 16384 : 8192; }  // of a bulk copy, which fills one stage of the ring
inline constexpr int kRingDepth = 13;                                 // the ring should hold this many tenths of a row
inline constexpr int kMaxStages = 16;
inline constexpr int kMaxCluster = 8;               // the largest portable cluster
inline constexpr int kExchanges = 16;               // rows whose partial results can be in flight at once
inline constexpr int kMaxWarps = 16;                // of reducers
inline constexpr int64_t kMinResidentBytes = 1024;  // shorter rows have too little work for the pipeline

// Shared memory beside the ring: barriers, one partial result per block of the cluster for every exchange, and two per warp.
inline int resident_overhead(int cluster, int partial_bytes) {
  return int(sizeof(uint64_t)) * (3 * kMaxStages + 2 * kExchanges) + (kExchanges * cluster + 2 * kMaxWarps) * partial_bytes + 128;
}

// ---- The staged kernel, a block per row. Fewer threads leave more registers for each thread and repeat less per-row work. Short
// rows let many blocks share an SM, so they need still fewer threads.

constexpr int staged_blocks(int threads) { return 768 / threads; }  // per SM; registers must suffice for them
inline constexpr int kStagedOverhead = 1536;  // shared bytes of a block beside its row; the driver takes 1024 of them
inline int most_staged_bytes(const DeviceLimits& device) { return device.shared_per_sm / 2 - kStagedOverhead; }

enum class CeLossPath {
  streaming,  // a block reads its row twice, the second time from the L2 with luck
  staged,     // a block reads its row once and keeps it in shared memory until the gradient is written
  resident,   // persistent clusters read rows once, into rings of shared memory
};

struct CeLossLaunch {
  CeLossPath path = CeLossPath::streaming;
  int threads = 0;        // staged
  int blocks_per_sm = 0;  // staged
  int cluster = 1;        // resident: blocks that share a row
  int stages = 0;         // resident
  int shared_bytes = 0;
};

constexpr int ce_loss_element_bytes(const CeLossParams& p) { return p.logits_dtype == DType::f32 ? 4 : 2; }

// Whether every gradient row starts at the same place modulo 16 bytes as its row of logits.
inline bool has_same_alignment(const CeLossParams& p) {
  const auto same = [&](int64_t a, int64_t b) { return (a - b) * ce_loss_element_bytes(p) % 16 == 0; };
  return (reinterpret_cast<uintptr_t>(p.logits) - reinterpret_cast<uintptr_t>(p.grad)) % 16 == 0 &&
         p.logits_layout.inner == p.grad_layout.inner && same(p.logits_layout.outer, p.grad_layout.outer) &&
         same(p.logits_layout.step, p.grad_layout.step);
}

// With a gradient: staged if an SM holds two such blocks, so that one loads while the other works. Longer rows take the smallest
// cluster whose blocks hold kRingDepth / 10 of their parts, so that one row is loaded and reduced while another is written.
// Without a gradient nothing has to stay, and one block of the persistent kernel streams rows of any length.
inline CeLossLaunch choose_ce_loss_launch(const CeLossParams& p, const DeviceLimits& device) {
  CeLossLaunch launch;
  const bool grad = p.grad;
  const int64_t row_bytes = p.vocab * ce_loss_element_bytes(p);
  if ((grad && !has_same_alignment(p)) || row_bytes < kMinResidentBytes) return launch;
  if (grad && row_bytes <= most_staged_bytes(device)) {
    launch.path = CeLossPath::staged;
    launch.shared_bytes = int(row_bytes / 16 * 16);
    const int fitting = device.shared_per_sm / (launch.shared_bytes + kStagedOverhead);
    launch.threads = fitting >= 4 ? 128 : 256;
    launch.blocks_per_sm = std::min(fitting, staged_blocks(launch.threads));
    return launch;
  }
  if (!device.has_clusters()) return launch;
  const int chunk = chunk_bytes(grad);
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int overhead = resident_overhead(cluster, ce_loss_partial_bytes(ce_loss_features(p)));
    const int per_block = std::min(device.shared_per_sm / resident_blocks(grad) - 1024, device.shared_per_block);
    const int stages = std::min((per_block - overhead) / chunk, kMaxStages);
    if (stages < 4) return launch;
    const int64_t part_chunks = (row_bytes / 16 / cluster + 1 + chunk / 16 - 1) / (chunk / 16);
    const bool last = cluster == kMaxCluster;
    // One block's reducers may be ahead of another's writers by twice the rows that a ring holds. kExchanges has to cover that.
    const bool exchanges_suffice = cluster == 1 || 2 * (stages / part_chunks + 1) < kExchanges;
    if (!exchanges_suffice) return launch;
    if (!grad || part_chunks * kRingDepth <= stages * 10 || (last && part_chunks < stages)) {
      launch.path = CeLossPath::resident;
      launch.cluster = cluster;
      launch.stages = stages;
      launch.shared_bytes = stages * chunk + overhead;
      return launch;
    }
  }
  return launch;
}

// ---- Preparation: blocks of the cluster that prepares all rows in one launch, a tile of kTile rows per block at a time. 0: too
// many rows, several launches. One block needs no cluster, so it runs on older architectures, too.

inline constexpr int kTile = 1024;  // rows, and threads of a block
inline int prepare_cluster(int64_t rows, bool documents, const DeviceLimits& device) {
  const int64_t tiles = (rows + kTile - 1) / kTile;
  if (tiles <= (documents ? 2 : 1)) return 1;
  if (documents || !device.has_clusters() || tiles > 8 * kMaxCluster) return 0;  // a document may be as long as all rows
  int cluster = 2;
  while (cluster < kMaxCluster && cluster < tiles) cluster *= 2;
  return cluster;
}

}  // namespace packops

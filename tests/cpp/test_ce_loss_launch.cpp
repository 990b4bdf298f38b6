// The choice of a cross-entropy kernel, for devices that this machine need not have.
#include "ce_loss_launch.h"

#include "check.h"

using namespace packops;

namespace {
constexpr DeviceLimits kA100 = {80, 108, 167936, 166912}, kH100 = {90, 132, 233472, 232448},
                       kRtx5090 = {120, 170, 102400, 101376};

CeLossLaunch launch_of(int64_t vocab, int bytes, bool grad, bool same_alignment, const DeviceLimits& device,
                       bool statistics = false) {
  static char memory[32];
  CeLossParams p;
  p.vocab = vocab;
  p.logits = memory;
  p.logits_dtype = bytes == 4 ? DType::f32 : DType::bf16;
  p.logits_layout = p.grad_layout = {1, vocab, 0};
  if (grad) p.grad = memory + (same_alignment ? 16 : 8);
  if (statistics) p.entropy = memory;
  return choose_ce_loss_launch(p, device);
}

}  // namespace

CASE(a_chosen_kernel_fits_the_device) {
  for (const DeviceLimits& device : {kA100, kH100, kRtx5090}) {
    for (int64_t vocab : {1, 127, 1000, 32000, 50257, 65536, 128256, 151936, 262144, 1000000, 100000000}) {
      for (int bytes : {2, 4}) {
        for (auto [grad, statistics] : {std::pair{false, false}, {false, true}, {true, false}, {true, true}}) {
          const CeLossLaunch launch = launch_of(vocab, bytes, grad, true, device, statistics);
          if (launch.path == CeLossPath::staged) {
            CHECK(grad && (launch.threads == 128 || launch.threads == 256));
            CHECK(vocab * bytes / 16 * 16 <= launch.shared_bytes);  // a row's whole vectors
            CHECK(launch.shared_bytes <= device.shared_per_block);
            CHECK(2 * (launch.shared_bytes + 1024) <= device.shared_per_sm);
          }
          if (launch.path != CeLossPath::resident) continue;
          CHECK(device.has_clusters());  // older ones have neither clusters nor bulk copies
          CHECK(launch.cluster >= 1 && launch.cluster <= kMaxCluster && (launch.cluster & (launch.cluster - 1)) == 0);
          CHECK(launch.stages >= 1 && launch.stages <= kMaxStages);
          CHECK(launch.shared_bytes <= device.shared_per_block);
          CHECK(resident_blocks(grad) * (launch.shared_bytes + 1024) <=
                device.shared_per_sm);  // 1 KiB of a block is the driver's
          CHECK(launch.shared_bytes >=
                launch.stages * chunk_bytes(grad) + resident_overhead(launch.cluster, statistics ? 32 : 16));
          // What has to stay until the gradient is written fits into the ring, ends of a chunk included.
          if (grad) CHECK(vocab * bytes <= int64_t(launch.cluster) * launch.stages * chunk_bytes(grad));
        }
      }
    }
  }
}

CASE(common_vocabularies_are_read_once_on_h100) {
  int cluster = 1;
  for (int64_t vocab : {32000, 50304, 128256, 151936, 262144}) {
    const CeLossLaunch launch = launch_of(vocab, 2, true, true, kH100);
    CHECK(launch.path != CeLossPath::streaming);
    CHECK(launch.cluster >= cluster);  // never fewer blocks for a longer row
    cluster = launch.cluster;
  }
}

CASE(rows_of_which_a_multiprocessor_holds_two_are_staged) {
  const auto path = [](int64_t vocab, int bytes, const DeviceLimits& device) {
    return launch_of(vocab, bytes, true, true, device).path;
  };
  for (int64_t vocab : {1000, 8000, 24000}) CHECK(path(vocab, 2, kRtx5090) == CeLossPath::staged);
  for (int64_t vocab : {1000, 8000, 32000}) CHECK(path(vocab, 2, kA100) == CeLossPath::staged);
  for (int64_t vocab : {1000, 32000, 50257, 57600}) CHECK(path(vocab, 2, kH100) == CeLossPath::staged);
  CHECK(path(28800, 4, kH100) == CeLossPath::staged);
  CHECK(path(57601, 2, kH100) == CeLossPath::resident);
  CHECK(path(50257, 2, kA100) == CeLossPath::streaming);
  // Few long rows on a multiprocessor need more threads each than many short ones.
  CHECK_EQ(launch_of(24000, 2, true, true, kH100).threads, 128);
  CHECK_EQ(launch_of(32000, 2, true, true, kH100).threads, 256);
}

CASE(what_cannot_be_read_once_streams) {
  CHECK(launch_of(128256, 2, true, true, kA100).path == CeLossPath::streaming);
  CHECK(launch_of(128256, 2, true, false, kH100).path == CeLossPath::streaming);  // gradient rows start elsewhere in 16 bytes
  CHECK(launch_of(100000000, 2, true, true, kH100).path == CeLossPath::streaming);
}

CASE(rows_are_prepared_in_as_few_launches_as_can_be) {
  for (const DeviceLimits& device : {kA100, kH100}) {
    CHECK_EQ(prepare_cluster(0, false, device), 1);
    CHECK_EQ(prepare_cluster(kTile, false, device), 1);
    CHECK_EQ(prepare_cluster(2 * kTile, true, device), 1);
    CHECK_EQ(prepare_cluster(2 * kTile + 1, true, device), 0);
    CHECK_EQ(prepare_cluster(1000000, false, device), 0);
  }
  CHECK_EQ(prepare_cluster(2 * kTile, false, kA100), 0);
  CHECK_EQ(prepare_cluster(2 * kTile, false, kH100), 2);
  CHECK_EQ(prepare_cluster(5 * kTile, false, kH100), 8);
  CHECK_EQ(prepare_cluster(64 * kTile, false, kH100), 8);
}

CASE(rows_are_capped_fast_where_no_number_on_the_way_overflows) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    CHECK(is_capped_fast(30, 1, dtype));
    CHECK(is_capped_fast(0.5f, 0.0625f, dtype));
    CHECK(!is_capped_fast(30, -1, dtype));
    CHECK(!is_capped_fast(30, 0, dtype));
    CHECK(!is_capped_fast(0, 1, dtype));
    CHECK(is_capped_fast(32, 1, dtype));
    CHECK(!is_capped_fast(33, 1, dtype));
  }
  CHECK(!is_capped_fast(30, 0.004f, DType::f16));  // no fp16 logit is that large, so the clamp would be infinity
  CHECK(is_capped_fast(30, 0.004f, DType::bf16));
  CHECK(!is_capped_fast(1e-5f, 1, DType::f16));  // the clamp would be subnormal, with few digits
}

CASE(features_are_the_smallest_compiled_set) {
  CeLossParams p;
  p.logits_dtype = DType::bf16;
  CHECK_EQ(ce_loss_features(p), kPlain);
  p.z_loss = 1;
  CHECK_EQ(ce_loss_features(p), kPlain);
  p.label_smoothing = 0.1f;
  CHECK_EQ(ce_loss_features(p), kUniform);
  p.logit_scale = 2;
  CHECK_EQ(ce_loss_features(p), kEverything);
  p.label_smoothing = 0;
  CHECK_EQ(ce_loss_features(p), kScale);
  p.softcap = 30;
  CHECK_EQ(ce_loss_features(p), kSoftcap);
  p.softcap = 300;  // too large for the fast way
  CHECK_EQ(ce_loss_features(p), kEverything);
  p.logits_dtype = DType::f32;
  CHECK_EQ(ce_loss_features(p), kSoftcap);
  int32_t prediction;
  p.prediction = &prediction;
  CHECK_EQ(ce_loss_features(p), kEverything);
  CHECK_EQ(ce_loss_partial_bytes(kEverything), 32);
}

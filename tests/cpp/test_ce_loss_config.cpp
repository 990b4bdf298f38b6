// The choice of a cross-entropy kernel, for devices that this machine need not have.
#include "ce_loss_config.h"

#include "check.h"

using namespace packops;

namespace {
constexpr DeviceLimits kA100 = {80, 108, 167936, 166912}, kH100 = {90, 132, 233472, 232448},
                       kRtx5090 = {120, 170, 102400, 101376};
constexpr int kPartial = 16;  // bytes of a warp's partial result
}  // namespace

CASE(a_chosen_kernel_fits_the_device) {
  for (const DeviceLimits& device : {kA100, kH100, kRtx5090}) {
    for (int64_t vocab : {1, 127, 1000, 32000, 50257, 65536, 128256, 151936, 262144, 1000000, 100000000}) {
      for (int bytes : {2, 4}) {
        for (bool grad : {false, true}) {
          const CeLossConfig config = choose_ce_loss_config(vocab, bytes, grad, true, kPartial, device);
          if (config.path == CeLossPath::staged) {
            CHECK(grad && (config.threads == 128 || config.threads == 256));
            CHECK(vocab * bytes / 16 * 16 <= config.shared_bytes);  // a row's whole vectors
            CHECK(config.shared_bytes <= device.shared_per_block);
            CHECK(2 * (config.shared_bytes + 1024) <= device.shared_per_sm);
          }
          if (config.path != CeLossPath::resident) continue;
          CHECK(device.architecture >= 90);  // older ones have neither clusters nor bulk copies
          CHECK(config.cluster >= 1 && config.cluster <= kMaxCluster && (config.cluster & (config.cluster - 1)) == 0);
          CHECK(config.stages >= 1 && config.stages <= kMaxStages);
          CHECK(config.shared_bytes <= device.shared_per_block);
          CHECK(resident_blocks(grad) * (config.shared_bytes + 1024) <=
                device.shared_per_sm);  // 1 KiB of a block is the driver's
          CHECK(config.shared_bytes >= config.stages * chunk_bytes(grad) + resident_overhead(config.cluster, kPartial));
          // What has to stay until the gradient is written fits into the ring, ends of a chunk included.
          if (grad) CHECK(vocab * bytes <= int64_t(config.cluster) * config.stages * chunk_bytes(grad));
        }
      }
    }
  }
}

CASE(common_vocabularies_are_read_once_on_h100) {
  int cluster = 1;
  for (int64_t vocab : {32000, 50304, 128256, 151936, 262144}) {
    const CeLossConfig config = choose_ce_loss_config(vocab, 2, true, true, kPartial, kH100);
    CHECK(config.path != CeLossPath::streaming);
    CHECK(config.cluster >= cluster);  // never fewer blocks for a longer row
    cluster = config.cluster;
  }
}

CASE(rows_of_which_a_multiprocessor_holds_two_are_staged) {
  const auto path = [](int64_t vocab, int bytes, const DeviceLimits& device) {
    return choose_ce_loss_config(vocab, bytes, true, true, kPartial, device).path;
  };
  for (int64_t vocab : {1000, 8000, 24000}) CHECK(path(vocab, 2, kRtx5090) == CeLossPath::staged);
  for (int64_t vocab : {1000, 8000, 32000}) CHECK(path(vocab, 2, kA100) == CeLossPath::staged);
  for (int64_t vocab : {1000, 32000, 50257, 57600}) CHECK(path(vocab, 2, kH100) == CeLossPath::staged);
  CHECK(path(28800, 4, kH100) == CeLossPath::staged);
  CHECK(path(57601, 2, kH100) == CeLossPath::resident);
  CHECK(path(50257, 2, kA100) == CeLossPath::streaming);
  // Few long rows on a multiprocessor need more threads each than many short ones.
  CHECK_EQ(choose_ce_loss_config(24000, 2, true, true, kPartial, kH100).threads, 128);
  CHECK_EQ(choose_ce_loss_config(32000, 2, true, true, kPartial, kH100).threads, 256);
}

CASE(what_cannot_be_read_once_streams) {
  CHECK(choose_ce_loss_config(128256, 2, true, true, kPartial, kA100).path == CeLossPath::streaming);
  CHECK(choose_ce_loss_config(128256, 2, true, false, kPartial, kH100).path ==
        CeLossPath::streaming);  // gradient rows start elsewhere in 16 bytes
  CHECK(choose_ce_loss_config(100000000, 2, true, true, kPartial, kH100).path == CeLossPath::streaming);
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

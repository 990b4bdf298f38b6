// What launches are chosen by: the older of what the device is and of what the loaded code was compiled for.
#include "check.h"
#include "common/device.h"

using namespace packops;

namespace {

struct Abilities {
  bool clusters, overlap, wgmma;
  bool operator==(const Abilities&) const = default;
};

Abilities abilities(int device, LoadedCode code) {
  const DeviceLimits limits = usable_limits({device, 132, 233472, 232448}, code);
  CHECK_EQ(limits.multiprocessors, 132);
  CHECK_EQ(limits.shared_per_sm, 233472);
  CHECK_EQ(limits.shared_per_block, 232448);
  return {limits.has_clusters(), limits.overlaps_launches(), limits.has_wgmma};
}

}  // namespace

CASE(the_older_of_device_and_code_decides) {
  const Abilities none{}, sm90{true, true, false}, sm90a{true, true, true};
  CHECK(abilities(80, {80}) == none);
  CHECK(abilities(89, {80}) == none);
  CHECK(abilities(90, {80}) == none);  // PTX of 8.0 on a Hopper
  CHECK(abilities(90, {89}) == none);
  CHECK(abilities(120, {80}) == none);
  CHECK(abilities(90, {90}) == sm90);  // PTX of 9.0
  CHECK(abilities(90, {90, true}) == sm90a);
  CHECK(abilities(100, {90}) == sm90);  // PTX of 9.0 on a Blackwell
  CHECK(abilities(100, {100}) == sm90);
  CHECK(abilities(120, {100}) == sm90);
  CHECK(abilities(100, {90, true}) == sm90);  // does not load, and has no wgmma there
}

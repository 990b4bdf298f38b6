// The library runs the best instruction set of the machine alone; the tests run every one that the machine has. Include after
// common/simd_targets.h.
#pragma once

#include "check.h"

// f(isa) for each.
template <typename F>
void for_each_isa(F&& f) {
  for (const auto isa : {packops::CpuIsa::baseline, packops::CpuIsa::avx2, packops::CpuIsa::avx512}) {
    if (isa > packops::cpu_isa()) continue;
    const int before = check::failures;
    f(isa);
    if (check::failures != before) std::printf("  the failures above are those of %s\n", packops::name_of(isa));
  }
}

// The library runs the best instruction set of the machine alone; the tests run every one that the machine has. Include after
// common/simd_targets.h.
#pragma once

#include "check.h"

// f(isa, name) for each.
template <typename F>
void for_each_isa(F&& f) {
  for (auto [isa, name] : {std::pair{packops::CpuIsa::baseline, "baseline"}, std::pair{packops::CpuIsa::avx2, "avx2"},
                           std::pair{packops::CpuIsa::avx512, "avx512"}}) {
    if (isa > packops::cpu_isa()) continue;
    const int before = check::failures;
    f(isa);
    if (check::failures != before) std::printf("  the failures above are those of %s\n", name);
  }
}

// The function of that name in the namespace of an instruction set.
#define PACKOPS_OF_ISA(isa, function)                           \
  ((isa) == packops::CpuIsa::avx512 ? packops::avx512::function \
   : (isa) == packops::CpuIsa::avx2 ? packops::avx2::function   \
                                    : packops::baseline::function)

// Compiles one header once per instruction set, so that a portable binary runs the best one the machine has:
//
//   #define PACKOPS_SIMD_FILE "ce_loss_simd.h"
//   #include "common/simd_targets.h"     // namespaces packops::baseline, packops::avx2, packops::avx512
//
// The file is included inside the namespace with PACKOPS_LANES floats per vector and common/simd.h before it. It must not include
// anything itself: code of the standard library compiled here would carry the wrong instructions into every other file.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/convert.h"
#include "common/cpu_isa.h"
#include "common/dtype.h"

// The function of that name in the namespace of an instruction set, and in that of the best one.
#define PACKOPS_OF_ISA(isa, function)                            \
  ((isa) == packops::CpuIsa::avx512 ? &packops::avx512::function \
   : (isa) == packops::CpuIsa::avx2 ? &packops::avx2::function   \
                                    : &packops::baseline::function)
#define PACKOPS_BEST_ISA(function) PACKOPS_OF_ISA(packops::cpu_isa(), function)

#define PACKOPS_LANES 4
namespace packops::baseline {
#include "common/simd.h"
#include PACKOPS_SIMD_FILE
}  // namespace packops::baseline
#undef PACKOPS_LANES

#if defined(__x86_64__) && defined(__GNUC__)
#define PACKOPS_F16C
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define PACKOPS_LANES 8
namespace packops::avx2 {
#include "common/simd.h"
#include PACKOPS_SIMD_FILE
}  // namespace packops::avx2
#undef PACKOPS_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define PACKOPS_LANES 16
namespace packops::avx512 {
#include "common/simd.h"
#include PACKOPS_SIMD_FILE
}  // namespace packops::avx512
#undef PACKOPS_LANES
#pragma GCC pop_options
#undef PACKOPS_F16C
#else
namespace packops {
namespace avx2 = baseline;
namespace avx512 = baseline;
}  // namespace packops
#endif
#undef PACKOPS_SIMD_FILE

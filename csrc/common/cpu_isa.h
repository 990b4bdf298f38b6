// The instruction sets that CPU kernels are compiled for (simd_targets.h), and the best one of this machine.
#pragma once

namespace packops {

enum class CpuIsa { baseline, avx2, avx512 };

constexpr const char* name_of(CpuIsa isa) { return isa == CpuIsa::avx512 ? "avx512" : isa == CpuIsa::avx2 ? "avx2" : "baseline"; }

inline CpuIsa cpu_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const CpuIsa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return CpuIsa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return CpuIsa::avx2;
    return CpuIsa::baseline;
  }();
  return isa;
#else
  return CpuIsa::baseline;
#endif
}

}  // namespace packops

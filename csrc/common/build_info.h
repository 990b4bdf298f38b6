// What this library was built with; shown by `packops info`.
#pragma once

#define PACKOPS_STRINGIFY_(x) #x
#define PACKOPS_STRINGIFY(x) PACKOPS_STRINGIFY_(x)

namespace packops {

#ifdef PACKOPS_WITH_CUDA
inline constexpr const char* kCudaVersion = PACKOPS_STRINGIFY(PACKOPS_CUDA_VERSION);
inline constexpr const char* kCudaArchs = PACKOPS_STRINGIFY(PACKOPS_CUDA_ARCHS);  // "8.0_9.0_12.0+PTX"
#else
inline constexpr const char* kCudaVersion = "";
inline constexpr const char* kCudaArchs = "";
#endif
inline constexpr const char* kTorchTarget = PACKOPS_STRINGIFY(TORCH_TARGET_VERSION);
inline constexpr const char* kCompiler = "C++ " __VERSION__;

}  // namespace packops

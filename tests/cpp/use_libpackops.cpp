// A C++ program that loads libpackops.so into LibTorch and calls an op by its name, as a server without Python would.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define REQUIRE(condition)                                             \
  if (!(condition)) {                                                  \
    std::printf("%s:%d: %s failed\n", __FILE__, __LINE__, #condition); \
    return 1;                                                          \
  }

int main(int count, char** arguments) {
  REQUIRE(count == 2);
  if (!dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL)) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  // packed_metadata([0, 3, 5], 6): documents of 3 and 2 tokens, one token of padding.
  Tensor cu_seqlens = torch::stable::empty({3}, ScalarType::Int);
  auto* bounds = static_cast<int32_t*>(cu_seqlens.data_ptr());
  bounds[0] = 0, bounds[1] = 3, bounds[2] = 5;
  StableIValue stack[] = {torch::stable::detail::from(cu_seqlens), torch::stable::detail::from(int64_t{6})};
  REQUIRE(torch_call_dispatcher("packops::packed_metadata", "", stack, TORCH_ABI_VERSION) == 0);
  const Tensor positions = torch::stable::detail::to<Tensor>(stack[0]);
  const int64_t want[] = {0, 1, 2, 0, 1, 0};
  for (int i = 0; i < 6; i++) REQUIRE(static_cast<const int64_t*>(positions.data_ptr())[i] == want[i]);
  std::printf("packops::packed_metadata from C++: ok\n");
  return 0;
}

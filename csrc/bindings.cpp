// The Python module packops._C. Importing it registers the torch ops (static initialisers in torch/library.cpp); its own
// functions speak numbers, strings and numpy arrays, never tensors, so that the wheel is not tied to one torch.
#include <pybind11/pybind11.h>

#include "ce_loss.h"
#include "common/build_info.h"

namespace py = pybind11;

namespace packops {
extern const char* const kSourceDigest;  // written by the build (python/packops/_build.py)
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "packops native code: build information and bin packing";
  m.def("build_info", [] {
    py::dict info;
    info["cuda"] = packops::kCudaVersion;
    info["cuda_archs"] = packops::kCudaArchs;
    info["torch_target"] = packops::kTorchTarget;
    info["cpu_isa"] = packops::ce_loss_cpu_isa();
    info["compiler"] = packops::kCompiler;
    info["sources"] = packops::kSourceDigest;
    return info;
  });
}

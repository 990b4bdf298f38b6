// The Python module packops._C. Importing it registers the torch ops (static initialisers in torch/ops_*.cpp); its own
// functions speak numbers, strings and numpy arrays, never tensors, so that the wheel is not tied to one torch.
#include "common/build_info.h"
// Some torch releases ship a pybind11 that refuses to be included where a stable-ABI target is named. It is right about tensors,
// but this file has none.
#undef TORCH_TARGET_VERSION

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "ce_loss.h"
#include "common/cpu_isa.h"
#include "packed_forest.h"
#include "packing.h"
#include "prefix_forest.h"
#include "rms_norm_launch.h"
#include "torch/error.h"

namespace py = pybind11;

namespace packops {
extern const char* const kSourceDigest;  // written by the build (python/packops/_build.py)
}

namespace {

using Integers = py::array_t<int64_t, py::array::c_style>;

constexpr std::array<std::pair<std::string_view, packops::Strategy>, 5> kStrategies{{{"best_fit", packops::Strategy::best_fit},
                                                                                     {"bfd", packops::Strategy::bfd},
                                                                                     {"ffd", packops::Strategy::ffd},
                                                                                     {"next_fit", packops::Strategy::next_fit},
                                                                                     {"wrapped", packops::Strategy::wrapped}}};
constexpr std::array<std::pair<std::string_view, packops::Overlong>, 4> kOverlong{{{"error", packops::Overlong::error},
                                                                                   {"truncate", packops::Overlong::truncate},
                                                                                   {"split", packops::Overlong::split},
                                                                                   {"drop", packops::Overlong::drop}}};

template <typename Names>
auto named(const Names& names, std::string_view argument, std::string_view name) {
  std::string known;
  for (const auto& [key, value] : names) {
    if (key == name) return value;
    known += (known.empty() ? "\"" : ", \"") + std::string(key) + "\"";
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + known + ", got \"" + std::string(name) + "\"");
}

// The vector's own memory as a numpy array.
py::array to_numpy(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<int64_t>*>(pointer); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple pack(const Integers& lengths, int64_t capacity, const std::string& strategy, std::optional<uint64_t> seed,
               uint64_t epoch, int64_t max_docs, const std::string& overlong, int64_t multiple) {
  packops::PackRequest request;
  request.lengths = lengths.data();
  request.count = lengths.size();
  request.capacity = capacity;
  request.strategy = named(kStrategies, "strategy", strategy);
  request.seed = seed;
  request.epoch = epoch;
  request.max_docs = max_docs;
  request.overlong = named(kOverlong, "overlong", overlong);
  request.multiple = multiple;
  packops::PackResult result;
  {
    const py::gil_scoped_release release;
    result = packops::pack(request);
  }
  return py::make_tuple(to_numpy(std::move(result.indices)), to_numpy(std::move(result.offsets)),
                        to_numpy(std::move(result.starts)), to_numpy(std::move(result.lengths)), result.empty, result.overlong,
                        result.dropped_tokens);
}

py::tuple prefix_forest(const Integers& tokens, const Integers& offsets, int64_t min_shared) {
  const int64_t documents = int64_t(offsets.size()) - 1;
  if (documents < 0 || offsets.data()[0] != 0 || offsets.data()[documents] != int64_t(tokens.size()))
    throw std::invalid_argument("offsets must run from 0 to the number of tokens");
  packops::PrefixForest forest;
  {
    const py::gil_scoped_release release;
    forest = packops::make_prefix_forest({tokens.data(), offsets.data(), documents, min_shared});
  }
  return py::make_tuple(to_numpy(std::move(forest.document)), to_numpy(std::move(forest.start)),
                        to_numpy(std::move(forest.length)), to_numpy(std::move(forest.parent)), to_numpy(std::move(forest.last)));
}

py::array permutation(uint32_t count, uint64_t seed, uint64_t epoch) {
  std::vector<int64_t> items;
  {
    const py::gil_scoped_release release;
    items = packops::permutation(count, seed, epoch);
  }
  return to_numpy(std::move(items));
}

// An exception that torch, like every pybind11 module, lets set the Python error itself.
class PythonError : public py::builtin_exception {
 public:
  PythonError(const char* type, const char* message) : py::builtin_exception(message), type_(type) {}
  void set_error() const override {
    try {
      const py::object error = py::module_::import("packops._errors").attr("error_of")(type_, what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    } catch (py::error_already_set& failure) {
      failure.restore();
    }
  }

 private:
  const char* type_;  // a literal
};

void throw_python_error(const char* type, const char* message) { throw PythonError(type, message); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "packops native code: build information and bin packing";
  packops_set_error_hook(&throw_python_error);
  m.attr("error_hook") = reinterpret_cast<uintptr_t>(&throw_python_error);  // for libraries loaded later
  m.def("build_info", [] {
    py::dict info;
    info["cuda"] = packops::kCudaVersion;
    info["cuda_archs"] = packops::kCudaArchs;
    info["torch_target"] = packops::kTorchTarget;
    info["cpu_isa"] = packops::name_of(packops::cpu_isa());
    info["compiler"] = packops::kCompiler;
    info["sources"] = packops::kSourceDigest;
    return info;
  });
  m.def(
      "constants",
      [] {
        py::dict constants;
        constants["ignored"] = packops::kIgnored;
        constants["bad_label"] = packops::kBadLabel;
        constants["partial_states"] = int(packops::kPartialStates);
        constants["attention_rows"] = packops::kAttentionRows;
        constants["attention_tile_numbers"] = int(packops::kAttentionTileNumbers);
        constants["attention_head_dim_step"] = packops::kAttentionHeadDimStep;
        constants["attention_most_head_dim"] = packops::kAttentionMostHeadDim;
        constants["forest_per_segment"] = packops::kForestPerSegment;
        constants["forest_per_token"] = packops::kForestPerToken;
        constants["rms_norm_row_bytes"] = packops::kRmsNormRowBytes;
        return constants;
      },
      "Numbers of csrc/ that Python needs, by name");
  m.def("pack", &pack, py::arg("lengths"), py::arg("capacity"), py::arg("strategy"), py::arg("seed"), py::arg("epoch"),
        py::arg("max_docs"), py::arg("overlong"), py::arg("multiple"),
        "(indices, offsets, starts, lengths, empty, overlong, dropped_tokens) of csrc/packing.h");
  m.def("prefix_forest", &prefix_forest, py::arg("tokens"), py::arg("offsets"), py::arg("min_shared"),
        "(document, start, length, parent, last) of csrc/prefix_forest.h");
  m.def("permutation", &permutation, py::arg("count"), py::arg("seed"), py::arg("epoch"),
        "A permutation of 0..count-1 that depends on (seed, epoch) alone, the same on every machine");
}

// Every op schema of packops, in one place. The implementations register themselves in ops_*.cpp; autograd and fake kernels in
// python/packops/_register/. Loading two libraries of one namespace would end the process, so experiments build this file with
// another PACKOPS_NAMESPACE (python/packops/jit.py).
#include "torch/namespace.h"

PACKOPS_LIBRARY(m) {
  m.def("packed_metadata(Tensor cu_seqlens, SymInt total_tokens) -> (Tensor position_ids, Tensor seq_idx)");
  m.def("packed_labels(Tensor labels, Tensor cu_seqlens, *, bool shift=True, int ignore_index=-100) -> (Tensor target, Tensor counts)");
}

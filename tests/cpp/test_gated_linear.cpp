// The gate of a gated MLP on the CPU against its formula in double precision, on every instruction set; and how gated_linear.cu cuts
// its work.
#include <algorithm>

#include "gated_linear_launch.h"

namespace packops {
template <typename T>
struct GatedStretch {
  const T *grad, *gate, *up;
  T *product, *grad_gate, *grad_up;
};
}  // namespace packops

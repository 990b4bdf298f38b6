// Memory that is written in place must not hold one element under two indices.
#pragma once

#include <cstdlib>

#include "torch/check.h"

namespace packops {

// Whether two elements may have one address: with the dimensions sorted by stride, each must step over all that lie below it. (A few
// layouts that interleave without touching are refused too; no view of torch makes them.)
inline bool may_overlap(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t reach = 0, last = -1;  // the largest offset of the dimensions seen so far; their largest stride
  int64_t left = 0;
  for (size_t i = 0; i < sizes.size(); i++) {
    if (sizes[i] == 0) return false;
    left += sizes[i] > 1;
  }
  while (left > 0) {  // in the order of strides; a tensor has few dimensions
    int64_t next = -1;
    for (size_t i = 0; i < sizes.size(); i++)
      if (sizes[i] > 1 && strides[i] > last && (next < 0 || strides[i] < strides[size_t(next)])) next = int64_t(i);
    if (next < 0 || strides[size_t(next)] <= reach) return true;  // next < 0: two dimensions share a stride
    last = strides[size_t(next)];
    reach += (sizes[size_t(next)] - 1) * last;
    left--;
  }
  return false;
}

// Whether two tensors, each without overlaps, may share an element. Exact where they have the same strides and elements of one size, as
// slices of one fused tensor have; otherwise their ranges of memory are compared.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const auto m = a.sizes(), n = b.sizes(), s = a.strides(), t = b.strides();
  if (a.numel() == 0 || b.numel() == 0) return false;
  struct Dim {
    int64_t stride, most, least;  // the index of a minus the index of b lies in [-least, most]
  };
  Dim dims[8];
  int64_t end_a = 0, end_b = 0;
  bool comparable = m.size() == n.size() && m.size() <= 8;
  for (size_t i = 0; i < m.size(); i++) end_a += (m[i] - 1) * s[i];
  for (size_t i = 0; i < n.size(); i++) end_b += (n[i] - 1) * t[i];
  int used = 0;
  for (size_t i = 0; comparable && i < m.size(); i++) {
    if (m[i] == 1 && n[i] == 1) continue;
    if (m[i] > 1 && n[i] > 1 && s[i] != t[i]) comparable = false;
    const Dim dim{m[i] > 1 ? s[i] : t[i], m[i] - 1, n[i] - 1};
    int at = used++;  // sorted, the largest stride first
    for (; at > 0 && dims[at - 1].stride < dim.stride; at--) dims[at] = dims[at - 1];
    dims[at] = dim;
  }
  const int64_t size = int64_t(a.element_size()), size_b = int64_t(b.element_size());
  const int64_t bytes = static_cast<const char*>(b.const_data_ptr()) - static_cast<const char*>(a.const_data_ptr());
  if (size != size_b) return bytes < (end_a + 1) * size && -bytes < (end_b + 1) * size_b;
  const int64_t distance = bytes / size;
  if (distance > end_a || distance < -end_b) return false;
  if (!comparable || bytes % size) return true;
  // Is there a difference of indices that makes up for the distance? One or two candidates a dimension.
  const auto reachable = [&](auto&& self, int i, int64_t rest) -> bool {
    if (i == used) return rest == 0;
    int64_t below = 0;  // what the smaller strides reach
    for (int j = i + 1; j < used; j++) below += std::max(dims[j].most, dims[j].least) * dims[j].stride;
    const Dim& dim = dims[i];
    const int64_t first = std::max(-dim.least, (rest - below) / dim.stride - 1),
                  last = std::min(dim.most, (rest + below) / dim.stride + 1);
    for (int64_t k = first; k <= last; k++)
      if (std::llabs(rest - k * dim.stride) <= below && self(self, i + 1, rest - k * dim.stride)) return true;
    return false;
  };
  return reachable(reachable, 0, distance);
}

inline void check_no_overlap(const char* op, const char* name, const Tensor& tensor) {
  PACKOPS_CHECK(
      !may_overlap(tensor), ValueError, op, ": ", name, " of shape ", shape_of(tensor), " with strides ", strides_of(tensor),
      " has elements that share memory (expand, unfold or as_strided make such views), so it cannot be overwritten in place: "
      "clone it, or use inplace=False");
}

}  // namespace packops

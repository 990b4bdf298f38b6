// What a document of a packed axis is: document s is the tokens [cu_seqlens[s], cu_seqlens[s + 1]), as attention kernels take it.
// Empty documents are legal; tokens at or past the last boundary are padding.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace packops {

// Its length belongs to the op: rows, tokens.
struct PackedAxis {
  const void* cu_seqlens = nullptr;  // (documents + 1,) contiguous, i32 or i64; null where an op may do without
  DType index_dtype = DType::i32;
  int64_t documents = 0;
};

PACKOPS_HOST_DEVICE int64_t boundary(const PackedAxis& axis, int64_t i) {
  return integer_at(axis.cu_seqlens, axis.index_dtype, i);
}

// The first i at which cu_seqlens does not start at 0, decreases or exceeds `length`; -1 if it is well formed. Host memory.
inline int64_t first_malformed_boundary(const PackedAxis& axis, int64_t length) {
  for (int64_t i = 0, least = 0; i <= axis.documents; i++) {
    const int64_t value = boundary(axis, i);
    if (value < least || value > (i == 0 ? 0 : length)) return i;
    least = value;
  }
  return -1;
}

// A packed axis whose index type is known, for kernels that search it.
template <typename Index>
struct Documents {
  const Index* cu_seqlens;  // (count + 1,)
  int64_t count;

  PACKOPS_HOST_DEVICE explicit Documents(const PackedAxis& axis)
      : cu_seqlens(static_cast<const Index*>(axis.cu_seqlens)), count(axis.documents) {}

  // The document of `token`, or `count` if it is padding. Reads cu_seqlens[0..count] only, so that malformed boundaries
  // give a wrong document and never a wrong address.
  PACKOPS_HOST_DEVICE int64_t find(int64_t token) const {
    int64_t low = 0, high = count + 1;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (static_cast<int64_t>(cu_seqlens[middle]) <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Where the document that holds `token` begins, within [0, token] whatever cu_seqlens holds.
  PACKOPS_HOST_DEVICE int64_t begin(int64_t document, int64_t token) const {
    const int64_t start = static_cast<int64_t>(cu_seqlens[document]);
    return start < 0 ? 0 : start > token ? token : start;
  }
};

}  // namespace packops

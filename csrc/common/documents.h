// Documents of a packed axis, looked up in cu_seqlens as the attention kernels take it: document s is the tokens
// [cu_seqlens[s], cu_seqlens[s + 1]); empty documents are legal; tokens at or past the last boundary are padding.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PACKOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PACKOPS_HOST_DEVICE inline
#endif

namespace packops {

template <typename Index>
struct Documents {
  const Index* cu_seqlens;  // (count + 1,)
  int64_t count;

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

  // The first i at which cu_seqlens does not start at 0, decreases or exceeds `total`; -1 if it is well formed.
  int64_t first_malformed(int64_t total) const {
    for (int64_t i = 0; i <= count; i++) {
      const int64_t value = static_cast<int64_t>(cu_seqlens[i]);
      const int64_t least = i == 0 ? 0 : static_cast<int64_t>(cu_seqlens[i - 1]);
      if (value < least || value > (i == 0 ? 0 : total)) return i;
    }
    return -1;
  }
};

}  // namespace packops

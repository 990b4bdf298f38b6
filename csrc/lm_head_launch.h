// How lm_head.cu cuts the product of the weight's gradient into tiles; that of the logits is cut as common/product.h has it.
#pragma once

#include "common/product.h"

namespace packops {

// The weight's gradient, transposed: rows are features, columns classes. Tiles that are computed at once advance over the tokens together,
// so that what counts is how many rows and columns they have: some 2000 of both. 512 to 2048 features were equally fast, but for 512 of
// 4096, which were slower.
constexpr ProductGrid choose_weight_gradient_grid(int64_t vocab, int64_t width) {
  return product_grid(width, kTileRows, vocab, kTileColumns * kProductCluster, (width + 2047) / 2048);
}

}  // namespace packops

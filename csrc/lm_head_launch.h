// How lm_head.cu cuts its product into tiles: arithmetic on sizes only, so that it runs and is tested on a machine without a GPU.
#pragma once

#include <cstdint>

#include "lm_head.h"

namespace packops {

// Blocks in pairs (clusters of two), one block per multiprocessor. A pair has two neighbouring tiles and shares an operand, of which each
// block fetches half for both. 128 x 192 was as fast as or faster than 128 x 176 wherever both were measured,
// and two warp groups that share one tile of 128 x 256 were slower (docs/design.md).
inline constexpr int kLmHeadRows = 128, kLmHeadColumns = 192;  // of a tile; a warp group computes all of it alone
inline constexpr int kLmHeadDepth = 64;                        // terms of a sum in a stage: 128 bytes, what the swizzle spans
inline constexpr int kLmHeadCluster = 2;
inline constexpr int kLmHeadConsumers = 2;  // warp groups that multiply
inline constexpr int kLmHeadThreads = 128 * (1 + kLmHeadConsumers);
inline constexpr int kLmHeadStages = 5;
inline constexpr int kLmHeadBand = 16 << 20;  // bytes of hidden states that are walked together, so that they stay in the L2

inline constexpr int kLmHeadStageBytes = 2 * kLmHeadDepth * (kLmHeadRows + kLmHeadColumns);
inline constexpr int kLmHeadStoreBytes = 8192;  // of each consuming warp group, for what is on its way to memory
inline constexpr int kLmHeadShared =
    kLmHeadStages * kLmHeadStageBytes + kLmHeadConsumers * kLmHeadStoreBytes + 8 * (2 * kLmHeadStages + kLmHeadConsumers);
static_assert(kLmHeadShared <= 227 * 1024);

struct LmHeadGrid {
  int rows = 0, columns = 0;  // of clusters' tiles: 256 x 192, or 128 x 384
  int band = 0;               // rows of these that are walked together, a column at a time
  constexpr int64_t tiles() const { return int64_t(rows) * columns; }
};
constexpr LmHeadGrid lm_head_grid(int64_t rows, int height, int64_t columns, int width,
                                  int64_t bands) {  // bands: of equal height
  const auto quotient = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
  LmHeadGrid grid{quotient(rows, height), quotient(columns, width)};
  grid.band = bands < 1 ? grid.rows : quotient(grid.rows, bands);
  if (grid.band < 1) grid.band = 1;
  return grid;
}

// hidden weight^T: rows are tokens, columns classes.
constexpr LmHeadGrid choose_lm_head_grid(int64_t rows, int64_t vocab, int64_t width) {
  return lm_head_grid(rows, kLmHeadRows * kLmHeadCluster, vocab, kLmHeadColumns,
                      (2 * rows * width + kLmHeadBand - 1) / kLmHeadBand);
}
// The weight's gradient, transposed: rows are features, columns classes. Tiles that are computed at once advance over the tokens together,
// so that what counts is how many rows and columns they have: some 2000 of both. 512 to 2048 features were equally fast, but for 512 of
// 4096, which were slower.
constexpr LmHeadGrid choose_weight_gradient_grid(int64_t vocab, int64_t width) {
  return lm_head_grid(width, kLmHeadRows, vocab, kLmHeadColumns * kLmHeadCluster, (width + 2047) / 2048);
}

// Where tile number `tile` of the walk lies: bands from top to bottom, in each column after column, top to bottom.
struct LmHeadTile {
  int row, column;
};
constexpr LmHeadTile lm_head_tile(const LmHeadGrid& grid, int64_t tile) {
  const int64_t of_band = int64_t(grid.band) * grid.columns;
  const int above = int(tile / of_band) * grid.band;
  const int inside = int(tile % of_band), height = grid.rows - above < grid.band ? grid.rows - above : grid.band;
  return {above + inside % height, inside / height};
}

}  // namespace packops

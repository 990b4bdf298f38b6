// How product.cuh cuts a product of matrices into tiles: arithmetic on sizes only, so that it runs and is tested on a machine without a
// GPU.
#pragma once

#include <cstdint>

namespace packops {

// Blocks in pairs (clusters of two), one block per multiprocessor. A pair has two neighbouring tiles and shares an operand, of which each
// block fetches half for both. 128 x 192 was as fast as or faster than 128 x 176 wherever both were measured,
// and two warp groups that share one tile of 128 x 256 were slower (docs/design.md).
inline constexpr int kTileRows = 128, kTileColumns = 192;  // of a tile; a warp group computes all of it alone
inline constexpr int kStageTerms = 64;                     // terms of a sum in a stage: 128 bytes, what the swizzle spans
inline constexpr int kProductCluster = 2;
inline constexpr int kProductConsumers = 2;  // warp groups that multiply
inline constexpr int kProductThreads = 128 * (1 + kProductConsumers);
inline constexpr int kProductStages = 5;       // at most
inline constexpr int kProductBand = 16 << 20;  // bytes of the left operand that are walked together, so that they stay in the L2

inline constexpr int kProductStageBytes = 2 * kStageTerms * (kTileRows + kTileColumns);
inline constexpr int kProductBarrierBytes = 8 * (2 * kProductStages + kProductConsumers);

// Stages beside what each consuming warp group needs to finish its tiles, in bytes.
constexpr int product_stages(int finish_bytes) {
  const int most = (227 * 1024 - kProductConsumers * finish_bytes - kProductBarrierBytes) / kProductStageBytes;
  return most < kProductStages ? most : kProductStages;
}

struct ProductGrid {
  int rows = 0, columns = 0;  // of clusters' tiles: 256 x 192, or 128 x 384
  int band = 0;               // rows of these that are walked together, a column at a time
  constexpr int64_t tiles() const { return int64_t(rows) * columns; }
};
constexpr ProductGrid product_grid(int64_t rows, int height, int64_t columns, int width,
                                   int64_t bands) {  // bands: of equal height
  const auto quotient = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
  ProductGrid grid{quotient(rows, height), quotient(columns, width)};
  grid.band = bands < 1 ? grid.rows : quotient(grid.rows, bands);
  if (grid.band < 1) grid.band = 1;
  return grid;
}

// Rows are tokens, and the blocks of a cluster have tiles one above the other. terms: of each sum.
constexpr ProductGrid choose_product_grid(int64_t rows, int64_t columns, int64_t terms) {
  return product_grid(rows, kTileRows * kProductCluster, columns, kTileColumns,
                      (2 * rows * terms + kProductBand - 1) / kProductBand);
}

// Where tile number `tile` of the walk lies: bands from top to bottom, in each column after column, top to bottom.
struct ProductTile {
  int row, column;
};
constexpr ProductTile product_tile(const ProductGrid& grid, int64_t tile) {
  const int64_t of_band = int64_t(grid.band) * grid.columns;
  const int above = int(tile / of_band) * grid.band;
  const int inside = int(tile % of_band), height = grid.rows - above < grid.band ? grid.rows - above : grid.band;
  return {above + inside % height, inside / height};
}

}  // namespace packops

// How the lm_head's product is cut into tiles.
#include <set>
#include <utility>

#include "check.h"
#include "lm_head_launch.h"

using namespace packops;

// Every tile is walked once, whatever is left over.
static void covers(int64_t rows, int64_t vocab, int64_t width) {
  const LmHeadGrid grid = choose_lm_head_grid(rows, vocab, width);
  CHECK(int64_t(grid.rows) * kLmHeadRows * kLmHeadCluster >= rows);
  CHECK(int64_t(grid.rows - 1) * kLmHeadRows * kLmHeadCluster < rows);
  CHECK(int64_t(grid.columns) * kLmHeadColumns >= vocab);
  CHECK(int64_t(grid.columns - 1) * kLmHeadColumns < vocab);
  std::set<std::pair<int, int>> seen;
  for (int64_t i = 0; i < grid.tiles(); i++) {
    const LmHeadTile tile = lm_head_tile(grid, i);
    CHECK(tile.row >= 0 && tile.row < grid.rows && tile.column >= 0 && tile.column < grid.columns);
    seen.insert({tile.row, tile.column});
  }
  CHECK(int64_t(seen.size()) == grid.tiles());
}

CASE(every_tile_is_walked_once) {
  covers(1, 7, 8);
  covers(257, 193, 72);
  covers(4096, 1000, 4096);
  covers(5000, 2000, 8192);   // bands of unequal height
  covers(70000, 400, 16384);  // bands of one
}

CASE(bands_fit_into_the_cache) {
  const LmHeadGrid grid = choose_lm_head_grid(8192, 128256, 4096);
  CHECK(grid.rows == 32 && grid.columns == 668);
  CHECK_EQ(grid.band, 8);  // 8 x 256 rows of 8 KB: 16 MB
  CHECK_EQ(choose_lm_head_grid(4096, 151936, 896).band, 16);
}

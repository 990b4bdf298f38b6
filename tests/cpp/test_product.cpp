// How products of matrices are cut into tiles, those of the lm_head's weight gradient among them.
#include <set>
#include <utility>

#include "check.h"
#include "lm_head_launch.h"

using namespace packops;

// Every tile is walked once, whatever is left over. height, width: of a cluster's tile.
static void covers(const ProductGrid& grid, int64_t rows, int height, int64_t columns, int width) {
  CHECK(int64_t(grid.rows) * height >= rows);
  CHECK(int64_t(grid.rows - 1) * height < rows);
  CHECK(int64_t(grid.columns) * width >= columns);
  CHECK(int64_t(grid.columns - 1) * width < columns);
  std::set<std::pair<int, int>> seen;
  for (int64_t i = 0; i < grid.tiles(); i++) {
    const ProductTile tile = product_tile(grid, i);
    CHECK(tile.row >= 0 && tile.row < grid.rows && tile.column >= 0 && tile.column < grid.columns);
    seen.insert({tile.row, tile.column});
  }
  CHECK(int64_t(seen.size()) == grid.tiles());
}
static void covers(int64_t tokens, int64_t vocab, int64_t width) {
  covers(choose_product_grid(tokens, vocab, width), tokens, 256, vocab, 192);
  covers(choose_weight_gradient_grid(vocab, width), width, 128, vocab, 384);
}

CASE(every_tile_is_walked_once) {
  covers(1, 7, 8);
  covers(257, 193, 72);
  covers(4096, 1000, 4096);
  covers(5000, 2000, 8192);   // bands of unequal height
  covers(70000, 400, 16384);  // bands of one
  covers(1, 385, 2056);
}

CASE(bands_fit_into_the_cache) {
  const ProductGrid grid = choose_product_grid(8192, 128256, 4096);
  CHECK(grid.rows == 32 && grid.columns == 668);
  CHECK_EQ(grid.band, 8);  // 8 x 256 rows of 8 KB: 16 MB
  CHECK_EQ(choose_product_grid(4096, 151936, 896).band, 16);
  CHECK_EQ(choose_weight_gradient_grid(128256, 4096).band, 16);  // 2048 features
  CHECK_EQ(choose_weight_gradient_grid(256000, 2304).band, 9);
}

CASE(as_many_stages_as_shared_memory_has_left) {
  CHECK_EQ(product_stages(8192), 5);
  CHECK_EQ(product_stages(12288), 5);
  CHECK_EQ(product_stages(25600), 4);
  for (int bytes = 0; bytes <= 64 << 10; bytes += 1024)
    CHECK(product_stages(bytes) * kProductStageBytes + 2 * bytes + kProductBarrierBytes <= 227 * 1024);
}

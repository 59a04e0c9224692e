// How the image ops walk their images on a CPU: a worker takes a tile at a time, and goes down it in steps of some rows, whose
// hidden channels stay in its cache. Host side, compiled at the baseline.
#pragma once
#include "common/cpu_parallel.h"

namespace autohdr {

struct Range {  // [first, end)
  int64_t first, end;
  int64_t size() const { return end - first; }
  Range around(int64_t halo) const { return {first - halo, end + halo}; }
  Range within(const Range& other) const { return {std::max(first, other.first), std::min(end, other.end)}; }
};

struct ImageShape {
  int64_t batch, height, width, channels;
  Range rows() const { return {0, height}; }
  Range columns() const { return {0, width}; }
};

struct Tile {
  int64_t image;
  Range rows, columns;
};

// Tiles are as high as the image and narrow enough for the cache; only where there would be too few of them for the threads they
// are cut into bands.
struct Steps {
  static constexpr int64_t kMostRows = 8;  // of a step

  int64_t batch;
  Range all_rows;
  int64_t width;
  int64_t tiles_across, bands;
  int64_t rows;  // of a step, at most: they go through the 1×1 convolution together
  int64_t workers;

  Steps(int64_t batch_, const Range& all_rows_, int64_t width_, int64_t bytes_a_pixel)
      : batch(batch_), all_rows(all_rows_), width(width_) {
    constexpr int64_t kBudget = 1 << 19;  // bytes of hidden rows that a worker holds: a quarter of a common L2 cache
    constexpr int64_t kPixels = 192;      // of a step: enough for a matrix product, which fetches its weights once a step
    constexpr int64_t kHeldRows = 4 + 2;  // of a step and its halo: so many should fit the budget
    constexpr int64_t kNarrow = 96 - 2, kWide = 192 - 2;  // with their halo both are whole register blocks of 8, 6 or 4 pixels
    constexpr int64_t kBandRows = 4;                      // at least, for the two rows of halo that a band computes again
    constexpr int64_t kTilesEach = 8;                     // for a thread, where tiles do not divide evenly among them
    tiles_across = ceil_div(width, std::clamp<int64_t>(kBudget / (kHeldRows * bytes_a_pixel), kNarrow, kWide));
    const int64_t fitting = kBudget / (most_columns() * bytes_a_pixel) - 2;
    rows = std::clamp<int64_t>(std::max(fitting, kPixels / most_columns()), 1, kMostRows);
    const int64_t threads = thread_count(), most_bands = ceil_div(all_rows.size(), kBandRows);
    bands = 1;
    while (bands < most_bands && tiles() % threads != 0 && tiles() < kTilesEach * threads) ++bands;
    workers = std::clamp<int64_t>(tiles(), 1, threads);
  }
  int64_t most_columns() const { return ceil_div(width, tiles_across); }  // of a tile
  int64_t tiles() const { return batch * tiles_across * bands; }
  Tile tile(int64_t i) const {
    const int64_t across = i % tiles_across, band = i / tiles_across % bands, height = all_rows.size();
    return {i / (tiles_across * bands),
            {all_rows.first + height * band / bands, all_rows.first + height * (band + 1) / bands},
            {width * across / tiles_across, width * (across + 1) / tiles_across}};
  }
  // f(worker, tile) for every tile, a contiguous run of them a worker: partial sums per worker add up in a fixed order.
  template <class F>
  void for_each(const F& f) const {
    parallel(workers, [&](int64_t w) {
      for (int64_t i = tiles() * w / workers; i < tiles() * (w + 1) / workers; ++i) f(w, tile(i));
    });
  }
};

}  // namespace autohdr

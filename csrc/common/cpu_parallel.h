// Threads from PyTorch's own pool, and how an image is cut into tiles for them. Host side, compiled at the baseline.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace autohdr {

// f(worker) for every worker in [0, workers), each once; workers run at the same time where the pool has threads for them.
template <class F>
void parallel(int64_t workers, const F& f) {
  if (workers == 1) return f(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) f(w);
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// f(worker, begin, end): [0, count) in one contiguous range a worker.
template <class F>
void parallel_ranges(int64_t count, const F& f) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads()));
  parallel(workers, [&](int64_t w) { f(w, count * w / workers, count * (w + 1) / workers); });
}

struct Tile {
  int64_t image, y0, y1, x0, x1;
};

// Tiles of a batch of images: full-height columns, narrow enough that a few rows of hidden channels stay in the L2 cache, cut
// into bands only where there would be too few of them for the threads.
struct Tiling {
  int64_t batch, height, width;
  int64_t columns, bands;
  int64_t rows_per_step;  // rows that go through the 1×1 convolution together
  int64_t workers;

  Tiling(int64_t batch_, int64_t height_, int64_t width_, int64_t hidden_bytes_per_pixel)
      : batch(batch_), height(height_), width(width_) {
    constexpr int64_t kBudget = 1 << 19;  // bytes of hidden rows a worker holds: a quarter of a common L2 cache
    constexpr int64_t kPixels = 192;      // that go through a matrix product together, so that its weights are fetched less often
    const int64_t widest = std::clamp<int64_t>(kBudget / (6 * hidden_bytes_per_pixel), 94, 190);
    columns = ceil_div(width, widest);
    const int64_t fitting = kBudget / (tile_width() * hidden_bytes_per_pixel) - 2;
    rows_per_step = std::clamp<int64_t>(std::max(fitting, kPixels / tile_width()), 1, 8);
    const int64_t threads = torch::stable::get_num_threads();
    bands = 1;
    while (bands < ceil_div(height, 4) && count() % threads != 0 && count() < 8 * threads) ++bands;
    workers = std::clamp<int64_t>(count(), 1, threads);
  }
  int64_t tile_width() const { return ceil_div(width, columns); }
  int64_t count() const { return batch * columns * bands; }
  Tile tile(int64_t i) const {
    const int64_t column = i % columns, band = i / columns % bands;
    return {i / (columns * bands), height * band / bands, height * (band + 1) / bands,
            width * column / columns, width * (column + 1) / columns};
  }
  // f(worker, tile) for every tile, a contiguous run of them a worker: partial sums per worker add up in a fixed order.
  template <class F>
  void for_each(const F& f) const {
    parallel(workers, [&](int64_t w) {
      for (int64_t i = count() * w / workers; i < count() * (w + 1) / workers; ++i) f(w, tile(i));
    });
  }
};

}  // namespace autohdr

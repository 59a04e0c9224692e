// How the image ops walk their images on a GPU: in steps of some rows (or of some whole images), small enough that what one kernel of
// a step writes is mostly still in the second-level cache when the next one reads it. Host side.
#pragma once
#include <algorithm>

#include "common/cuda_launch.cuh"

namespace autohdr {
namespace image {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {  // [first, end)
  int first, end;
  int size() const { return end - first; }
  Range around(int halo) const { return {first - halo, end + halo}; }
  Range within(const Range& other) const { return {std::max(first, other.first), std::min(end, other.end)}; }
};

// The images of a call.
struct ImageShape {
  int64_t batch;
  int height, width, channels;
  Range rows() const { return {0, height}; }
};
template <class Shape>
ImageShape image_of(const Shape& s) {
  return {s.batch, static_cast<int>(s.height), static_cast<int>(s.width), static_cast<int>(s.channels)};
}

// Memory for the buffers of one call; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    used_ = round_up(used_, 256);
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += count * static_cast<int64_t>(sizeof(T));
    return at;
  }
  bool counts_only() const { return !memory_; }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Bytes of a step's buffers. The emulation takes several steps of its small images.
inline const int64_t kForwardBudget = size_for(64 << 20, 48 << 10), kBackwardBudget = size_for(192 << 20, 320 << 10);
constexpr int64_t kMostImages = 65535;  // of a step: a grid's z

struct Steps {
  int64_t batch, images;  // images: of a step
  int height;
  Range all_rows;
  int rows;  // of a step, at most

  // So that rows, of pixel_bytes a pixel, and `halo` on each side stay within `budget`; at most max_images at once.
  Steps(const ImageShape& s, const Range& all_rows_, int64_t pixel_bytes, int halo, int64_t budget, int64_t max_images)
      : batch(s.batch), images(1), height(s.height), all_rows(all_rows_) {
    const int64_t row_bytes = pixel_bytes * s.width;
    const int64_t most = std::clamp<int64_t>(budget / row_bytes - 2 * halo, 1, all_rows.size());
    // Steps alike, and of whole tiles where there is room: for a rest of few rows kernels take as long as for many.
    const int64_t alike = ceil_div(all_rows.size(), std::max<int64_t>(1, ceil_div(all_rows.size(), most)));
    rows = static_cast<int>(std::min(most, round_up(alike, 8)));
    if (rows == all_rows.size())
      images =
          std::clamp<int64_t>(budget / (row_bytes * most_rows(halo)), 1, std::max<int64_t>(1, std::min(s.batch, max_images)));
  }
  bool only_one() const { return images >= batch && rows == all_rows.size(); }
  int most_rows(int halo) const { return std::min(rows + 2 * halo, height); }  // of a step and its halo
  Range around(const Range& strip, int halo) const { return strip.around(halo).within({0, height}); }
  // f(first image, images), all rows of them: one step or, image by image, several.
  template <class F>
  void each_group(const F& f) const {
    for (int64_t b = 0; b < batch; b += images) f(b, std::min(images, batch - b));
  }
  // f(rows).
  template <class F>
  void each_strip(const F& f) const {
    for (int y = all_rows.first; y < all_rows.end; y += rows) f(Range{y, std::min(y + rows, all_rows.end)});
  }
  // f(first image, images, rows).
  template <class F>
  void each(const F& f) const {
    each_group([&](int64_t b, int64_t count) { each_strip([&](const Range& strip) { f(b, count, strip); }); });
  }
};

}  // namespace image
}  // namespace autohdr

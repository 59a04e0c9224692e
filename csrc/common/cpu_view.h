// Images in memory: a view of a tensor's, and the ring in which a worker holds rows of hidden channels.
//
// Hidden channels lie in panels of 16·vecs channels, [panel][pixel][16·vecs]. A panel is what one pass of the matrix product makes,
// what the depthwise convolution walks over with its nine taps in registers, and what the outer product consumes, so no step
// ever transposes.
// Compiled per instruction set: common/cpu_each_isa.h.

// Images [batch][height][width][channels].
template <class T>
struct View {
  T* data;
  ImageShape shape;
  T* at(int64_t image, int64_t y, int64_t x) const {
    return data + ((image * shape.height + y) * shape.width + x) * shape.channels;
  }
};

// Floats from one pixel's channels to the next's: an odd number of cache lines, so that the pixels of a column are spread over all
// sets of a cache.
AUTOHDR_INLINE int64_t pixel_stride(int64_t channels) { return 16 * (ceil_div(channels, 16) | 1); }

// out [pixels][ld] = x [pixels][channels] as float, padded with zeros to a multiple of 16.
template <class T>
static void read_pixels(const T* x, int64_t pixels, int64_t channels, float* out, int64_t ld) {
  const int64_t padded = round_up(channels, 16);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < padded; c += W) store(out + p * ld + c, c < channels ? load_at(x + p * channels, c, channels) : vf{});
}

// The same of these rows and columns of an image.
template <class T>
static void read_pixels(const View<const T>& x, int64_t image, const Range& rows, const Range& columns, float* out, int64_t ld) {
  for (int64_t y = rows.first; y < rows.end; ++y, out += columns.size() * ld)
    read_pixels(x.at(image, y, columns.first), columns.size(), x.shape.channels, out, ld);
}

// out = base + add, [pixels][channels] from add [pixels][ld].
template <class T, class Out>
static void add_pixels(const T* base, const float* add, int64_t ld, int64_t pixels, int64_t channels, Out* out) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += W)
      store_at(out + p * channels, c, channels, load_at(base + p * channels, c, channels) + load(add + p * ld + c));
}

// A worker's ring of rows of hidden channels, [slot][panel][column][width]: the rows that one step leaves are there for the next.
// Outside the image the hidden channels are zero: the 3×3 convolution pads after the 1×1. Rows and columns are the image's.
struct Ring {
  float* data;
  int64_t slots, panels, columns, width;
  int64_t left = 0;  // the column that is the first here
  static int64_t floats(int64_t slots, int64_t panels, int64_t columns, int64_t width) {
    return slots * panels * columns * width;
  }
  int64_t slot(int64_t y) const { return (y % slots + slots) % slots; }
  float* row(int64_t y) const { return data + slot(y) * panels * columns * width; }
  int64_t panel_stride() const { return columns * width; }
  float* at(int64_t y, int64_t panel, int64_t x) const { return row(y) + (panel * columns + x - left) * width; }
  // Where the 3×3 convolution's output at (y, x) begins to read: three rows, from x - 1 on.
  void window(int64_t y, int64_t panel, int64_t x, const float** rows) const {
    for (int64_t r = 0; r < 3; ++r) rows[r] = at(y + r - 1, panel, x - 1);
  }
  void clear_row(int64_t y) const { __builtin_memset(row(y), 0, panels * columns * width * sizeof(float)); }
  void clear_columns(int64_t y, const Range& range) const {
    if (range.size() > 0)
      for (int64_t p = 0; p < panels; ++p) __builtin_memset(at(y, p, range.first), 0, range.size() * width * sizeof(float));
  }
};

// Layer norm over the channels of a pixel, and its backward pass.
// Compiled per instruction set: common/cpu_each_isa.h.

// What a layer norm over the channels takes.
struct Norm {
  const float* weight;  // [channels]
  const float* bias;    // [channels], or null: the bias-free norm
  float eps;
};

// Of a pixel: its mean, and 1 / sqrt(variance + eps).
struct Stats {
  float mean, factor;
};

// Without weight and bias, which are folded into the 1×1 convolution. In the bias-free norm, not `centre`, the variance is centred
// and the value is not. ahead: how many elements further lie the pixels that will be read next, which are fetched; or 0.
template <class T>
static void normalize(const T* x, int64_t pixels, int64_t channels, float eps, bool centre, float* out, int64_t ld, Stats* stats,
                      int64_t ahead = 0) {
  const float inverse = 1.0f / static_cast<float>(channels);
  const int64_t whole = channels / W * W, padded = round_up(channels, 16);
  for (int64_t p = 0; p < pixels; ++p) {
    const T* in = x + p * channels;
    float* row = out + p * ld;
    // Summed as differences from the first channel: the mean of equal channels is exact, whose rounding 1 / √eps would multiply.
    const float origin = load_at(in, 0, channels)[0];
    vf total = {};
    for (int64_t c = 0; c < whole; c += W) {
      const vf v = load(in + c);
      store(row + c, v);
      total += v - origin;
    }
    float rest = 0;
    for (int64_t c = whole; c < padded; c += W) store(row + c, c < channels ? load_part(in + c, channels - c) : vf{});
    for (int64_t c = whole; c < channels; ++c) rest += row[c] - origin;
    const float mean = origin + (sum(total) + rest) * inverse;
    vf squares = {};
    for (int64_t c = 0; c < whole; c += W) {
      const vf d = load(row + c) - mean;
      squares += d * d;
    }
    float variance = sum(squares);
    for (int64_t c = whole; c < channels; ++c) variance += (row[c] - mean) * (row[c] - mean);
    const float factor = 1.0f / __builtin_sqrtf(variance * inverse + eps);
    const float shift = centre ? mean : 0.0f;
    for (int64_t c = 0; c < channels; c += W) store(row + c, (load(row + c) - shift) * factor);
    for (int64_t c = channels; c < padded; ++c) row[c] = 0.0f;
    stats[p] = {mean, factor};
    if (ahead) fetch(in + ahead, channels);
  }
}

// dx = dy + the gradient through `normalize`, given the gradient d [pixels][ldd] at its output `normal` [pixels][ld].
template <class T>
static void norm_backward(const T* dy, const float* d, int64_t ldd, const float* normal, int64_t ld, const Stats* stats,
                          int64_t pixels, int64_t channels, bool centre, T* dx) {
  const float inverse = 1.0f / static_cast<float>(channels);
  for (int64_t p = 0; p < pixels; ++p) {
    const float *g = d + p * ldd, *h = normal + p * ld;
    vf total = {}, product = {};
    for (int64_t c = 0; c < channels; c += W) {  // both are zero in the padding
      total += load(g + c);
      product += load(g + c) * load(h + c);
    }
    const float factor = stats[p].factor;
    const float along = sum(product) * inverse;
    const float shift = centre ? sum(total) * inverse : 0.0f;
    const float offset = centre ? 0.0f : stats[p].mean * factor;  // without centring, normal less its mean
    for (int64_t c = 0; c < channels; c += W) {
      const vf grad = (load(g + c) - shift - (load(h + c) - offset) * along) * factor;
      store_at(dx + p * channels, c, channels, load_at(dy + p * channels, c, channels) + grad);
    }
  }
}

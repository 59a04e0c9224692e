// Threads from PyTorch's own pool. Host side, compiled at the baseline.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace autohdr {

// f(worker) for every worker in [0, workers), each once; workers run at the same time where the pool has threads for them.
template <class F>
void parallel(int64_t workers, const F& f) {
  if (workers == 1) return f(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t end) {
    for (int64_t w = first; w < end; ++w) f(w);
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// f(worker, first, end): [0, count) in one contiguous range [first, end) a worker.
template <class F>
void parallel_ranges(int64_t count, const F& f) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads()));
  parallel(workers, [&](int64_t w) { f(w, count * w / workers, count * (w + 1) / workers); });
}

}  // namespace autohdr

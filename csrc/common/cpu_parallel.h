// Threads: from PyTorch's own pool or, in a module without PyTorch (AUTOHDR_WITHOUT_TORCH), as many as its caller asks for. Host
// side, compiled at the baseline.
#pragma once
#include <algorithm>
#include <cstdint>

#ifdef AUTOHDR_WITHOUT_TORCH
#include <system_error>
#include <thread>
#include <vector>
#else
#include <torch/csrc/stable/ops.h>
#endif

namespace autohdr {

// thread_count(): of threads at most. parallel(workers, f): f(worker) for every worker in [0, workers), each once; workers run at
// the same time where there are threads for them.
#ifdef AUTOHDR_WITHOUT_TORCH
inline thread_local int64_t threads_of_call = 1;
inline int64_t thread_count() { return threads_of_call; }

template <class F>
void parallel(int64_t workers, const F& f) {
  std::vector<std::thread> others;
  others.reserve(workers);
  int64_t left = workers - 1;
  try {
    for (; left > 0; --left) others.emplace_back([&f, left] { f(left); });
  } catch (const std::system_error&) {  // no more threads are to be had: this one does the rest
  }
  for (; left >= 0; --left) f(left);
  for (std::thread& other : others) other.join();
}
#else
inline int64_t thread_count() { return torch::stable::get_num_threads(); }

template <class F>
void parallel(int64_t workers, const F& f) {
  if (workers == 1) return f(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t end) {
    for (int64_t w = first; w < end; ++w) f(w);
  });
}
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// f(worker, first, end): [0, count) in one contiguous range [first, end) a worker.
template <class F>
void parallel_ranges(int64_t count, const F& f) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(count, thread_count()));
  parallel(workers, [&](int64_t w) { f(w, count * w / workers, count * (w + 1) / workers); });
}

}  // namespace autohdr

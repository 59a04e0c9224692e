// Sums over slots: what each piece of the work has left of a parameter's gradient, added up in order.
// Compiled per instruction set: common/cpu_each_isa.h.

// put(i, the sum of element i of `size` over slots [count][size]).
template <class Put>
static void sum_slots(const float* slots, int64_t count, int64_t size, const Put& put) {
  parallel_ranges(size, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      double total = 0;
      for (int64_t k = 0; k < count; ++k) total += slots[k * size + i];
      put(i, static_cast<float>(total));
    }
  });
}

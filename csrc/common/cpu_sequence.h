// Elements of a sequence, whose dtype is told apart when they are loaded or stored.
// Compiled per instruction set: common/cpu_each_isa.h.

// f(a zero of the type).
template <class F>
AUTOHDR_INLINE void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
  }
}

template <class F>
AUTOHDR_INLINE void with_pointer(const Sequence& s, int64_t offset, const F& f) {
  with_dtype(s.dtype, [&](auto zero) __attribute__((always_inline)) { f(static_cast<decltype(zero)*>(s.data) + offset); });
}

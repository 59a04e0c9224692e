// Elements of a sequence, whose dtype is told apart when they are loaded or stored.
// Compiled per instruction set: common/cpu_each_isa.h.

template <class F>
AUTOHDR_INLINE void with_pointer(const Sequence& s, int64_t offset, const F& f) {
  switch (s.dtype) {
    case Dtype::f32: return f(static_cast<float*>(s.data) + offset);
    case Dtype::bf16: return f(static_cast<bf16*>(s.data) + offset);
    case Dtype::f16: return f(static_cast<f16*>(s.data) + offset);
  }
}

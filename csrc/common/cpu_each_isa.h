// Compiles the kernel body AUTOHDR_BODY once per instruction set, in the namespaces autohdr::baseline, avx2 and avx512, and where
// AUTOHDR_WITH_VNNI is defined, for products in 8 bits, in avxvnni and avx512vnni.
//
// There is no set with AVX512-BF16: Intel's processors run its dot product at half the rate of float32 multiply-adds (measured on
// Emerald Rapids: 86 against 174 GFLOP/s a core), so bfloat16 is a storage format here and arithmetic is float32.
//
// All other headers must be included before, at the baseline, so that no shared inline function is compiled for a wider set.
// No include guard: used once per kernel file, after <op>_host.h.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpu_parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics
#endif

#define AUTOHDR_WIDTH 4
#define AUTOHDR_VNNI 0
namespace autohdr::baseline {
#include "common/cpu_vector.h"
#include AUTOHDR_BODY
}  // namespace autohdr::baseline
#undef AUTOHDR_WIDTH

#if AUTOHDR_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define AUTOHDR_WIDTH 8
namespace autohdr::avx2 {
#include "common/cpu_vector.h"
#include AUTOHDR_BODY
}  // namespace autohdr::avx2
#undef AUTOHDR_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define AUTOHDR_WIDTH 16
namespace autohdr::avx512 {
#include "common/cpu_vector.h"
#include AUTOHDR_BODY
}  // namespace autohdr::avx512
#pragma GCC pop_options

#ifdef AUTOHDR_WITH_VNNI
#undef AUTOHDR_VNNI
#define AUTOHDR_VNNI 1
#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
namespace autohdr::avx512vnni {
#include "common/cpu_vector.h"
#include AUTOHDR_BODY
}  // namespace autohdr::avx512vnni
#undef AUTOHDR_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma,f16c,bmi2")
#define AUTOHDR_WIDTH 8
namespace autohdr::avxvnni {
#include "common/cpu_vector.h"
#include AUTOHDR_BODY
}  // namespace autohdr::avxvnni
#pragma GCC pop_options
#else
namespace autohdr {
namespace avxvnni = avx2;
namespace avx512vnni = avx512;
}  // namespace autohdr
#endif
#undef AUTOHDR_WIDTH

// Calls the chosen instruction set's version of a function.
#define AUTOHDR_CALL(function, ...)                                                       \
  switch (::autohdr::current_isa()) {                                                     \
    case ::autohdr::Isa::baseline: return ::autohdr::baseline::function(__VA_ARGS__);     \
    case ::autohdr::Isa::avx2: return ::autohdr::avx2::function(__VA_ARGS__);             \
    case ::autohdr::Isa::avxvnni: return ::autohdr::avxvnni::function(__VA_ARGS__);       \
    case ::autohdr::Isa::avx512: return ::autohdr::avx512::function(__VA_ARGS__);         \
    case ::autohdr::Isa::avx512vnni: return ::autohdr::avx512vnni::function(__VA_ARGS__); \
  }
#else
#define AUTOHDR_CALL(function, ...) return ::autohdr::baseline::function(__VA_ARGS__)
#endif

#ifndef AUTOHDR_WITHOUT_TORCH
namespace autohdr {
namespace {

// The body's functions run(parameters), as <op>_host.h calls them.
struct CpuKernels {
  template <class F>
  static void with_type(const char* op, const Tensor& x, const F& f) {
    with_image_type(op, x, f);
  }
  template <class Parameters>
  static void run(const Parameters& a, const Tensor&) {
    AUTOHDR_CALL(run, a);
  }
};

}  // namespace
}  // namespace autohdr
#endif

// Run-time choice of the instruction set for the CPU kernels, and what they share that does not depend on it.
//
// A kernel body is a header without an include guard, compiled once per instruction set inside a namespace of its own
// (common/cpu_each_isa.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AUTOHDR_X86 1
#include <immintrin.h>
#else
#define AUTOHDR_X86 0
#endif

#include "common/constants.h"

namespace autohdr {

// Storage types of a tensor's elements beside float: its upper half, and half precision.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Isa { baseline, avx2, avxvnni, avx512, avx512vnni };  // the better ones last

// The set the kernels run with: the best for this processor, or the one that use_isa named.
Isa current_isa();
const char* isa_name(Isa isa);
// For tests and comparisons. Throws std::invalid_argument if the set is unknown or cannot run here.
void use_isa(const std::string& name);
std::vector<const char*> compiled_isas();
std::vector<const char*> usable_isas();

// A bump allocator over memory that stays with the calling thread: an op takes what it needs and gives all back at its
// end, so that no call after the first pays for page faults.
class Scratch {
 public:
  // With poison, what is taken holds NaN, so that a test sees an element that nobody wrote.
  static void poison(bool on);
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  template <class T>
  T* zeros(int64_t count) {
    T* p = take<T>(count);
    __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(T));
    return p;
  }

 private:
  void* bytes(size_t count);
};

}  // namespace autohdr

// Runs CUDA kernels on the CPU: the very .cu files, compiled by g++ with AUTOHDR_EMULATION and -fsanitize=address,alignment,bounds
// (what only records launches goes without: build.py).
//
// A CUDA thread is a fiber; the blocks of a grid run one after the other. A fiber runs until it has to wait for others. Found are:
// - accesses outside of global memory, dynamic and static shared memory, and vector accesses that are not aligned (sanitizers);
// - a barrier or shuffle that some of its threads never reach, and a caller that its mask leaves out;
// - shared memory read before it is written: every block finds NaN in the dynamic one;
// - missing barriers, under some order of threads: a seed other than 0 draws who goes on at every wait, and turns the order of blocks
//   around if odd. Every launch has another one, its number, unless AUTOHDR_EMULATION_SEED gives all of them the same;
// - an asynchronous copy that nobody waited for: its bytes arrive at the wait, and are NaN until then;
// - launches beyond the hardware's limits.
// With AUTOHDR_RECORD_LAUNCHES, a file's name, nothing runs: every launch becomes a line of it, "kernel grid block shared parameters"
// (its place in the library; 3 and 3 numbers; bytes; hexadecimal, as they lie in a GPU's memory), and host code chooses sizes as for
// a GPU of AUTOHDR_MULTIPROCESSORS, whose blocks can have AUTOHDR_SHARED bytes of shared memory.
// With AUTOHDR_TF32 products of float32 may be of TF32.
// Stricter than the hardware: a thread that has returned counts as missing from barriers and masks.
// Not seen: races within a warp that lockstep execution would hide, memory ordering between blocks, speed.
//
// Fibers are not announced to AddressSanitizer, which needs that only for exceptions and stack use after return: kernels throw none.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#ifndef __x86_64__
#error "the emulation of CUDA switches stacks with x86-64 assembly"
#endif

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

// For what takes most of the time and reads no kernel's memory: optimised, and without the sanitizers' checks.
#define AUTOHDR_UNCHECKED __attribute__((no_sanitize("address", "alignment", "bounds"), optimize("O2")))

// Saves this stack's pointer to *from, goes on with the stack `to`.
extern "C" void autohdr_switch_stack(void** from, void* to);
asm(R"(
.text
.weak autohdr_switch_stack
.type autohdr_switch_stack, @function
autohdr_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size autohdr_switch_stack, .-autohdr_switch_stack
)");

extern "C" {
// How many kernels have run, for those who want to be sure.
__attribute__((weak)) unsigned long autohdr_emulated_launches = 0;
// cuBLAS, as far as tf32_cuda.cpp asks it.
__attribute__((weak)) int32_t torch_get_current_cuda_blas_handle(void**) { return 0; }
__attribute__((weak)) int cublasGetMathMode(void*, int* mode) {
  *mode = std::getenv("AUTOHDR_TF32") ? 3 : 0;
  return 0;
}
}

namespace emulation {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr int kWarp = 32;

struct alignas(16) Copy {
  unsigned char bytes[16];
  void* to;
  size_t size;
  int group;
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  uint3 thread{};
  int warp = 0, lane = 0;
  std::vector<Copy> copies;  // that have not arrived
  int group = 0;             // of copies, that comes next
  Fiber* next = nullptr;     // that waits at the same barrier
};

struct Barrier {
  unsigned generation = 0;
  int waiting = 0;
  Fiber* last = nullptr;  // that has come
};

// The shuffles of one mask: what the lanes bring to this one, and to the one before, which some may not have read yet. A shuffle
// takes at most 8 bytes of a lane, a tensor core 24.
struct Exchange {
  Barrier barrier;
  alignas(8) unsigned char slots[2][kWarp * 24];
};

struct Warp {
  unsigned lanes = 0;  // that the block has
  Exchange whole;
  std::map<unsigned, Exchange> parts;  // by mask
};

struct Block {
  std::vector<Fiber> fibers;
  Fiber* ready[1024];
  int ready_count = 0;
  std::vector<Warp> warps;
  Barrier barrier;
  int threads = 0, returned = 0, predicates[2] = {};
  uint3 index{};
  dim3 size, grid;
  char* shared = nullptr;
  std::function<void()> body;
  std::string error;
  uint64_t seed = 0, random = 0;
  Fiber launcher;
};

inline Block block;
inline Fiber* self = &block.launcher;

AUTOHDR_UNCHECKED inline void resume(Fiber& next) {
  Fiber& from = *self;
  self = &next;
  if (&next != &from) autohdr_switch_stack(&from.sp, next.sp);
}

AUTOHDR_UNCHECKED inline uint64_t draw() {
  block.random = block.random * 6364136223846793005u + 1442695040888963407u;
  return block.random >> 33;
}

// Ends the launch with an error.
inline void fail(const std::string& what) {
  const auto text = [](const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  block.error = what + ", block " + text(block.index) + ", thread " + text(self->thread);
  resume(block.launcher);
}

// Goes on with another fiber.
AUTOHDR_UNCHECKED inline void wait() {
  if (!block.ready_count)
    return fail("deadlock: " + std::to_string(block.barrier.waiting) + " of " + std::to_string(block.threads) +
                " threads wait at __syncthreads, " + std::to_string(block.returned) +
                " have returned, the others wait for their warp");
  Fiber*& chosen = block.ready[block.seed ? draw() % block.ready_count : block.ready_count - 1];
  Fiber* next = chosen;
  chosen = block.ready[--block.ready_count];
  resume(*next);
}

AUTOHDR_UNCHECKED inline void arrive(Barrier& barrier, int expected) {
  self->next = barrier.last;
  barrier.last = self;
  if (++barrier.waiting == expected) {
    ++barrier.generation;
    for (Fiber* fiber = barrier.last; fiber; fiber = fiber->next) block.ready[block.ready_count++] = fiber;
    barrier.last = nullptr;
    barrier.waiting = 0;
  }
  wait();
}

// Waits for all lanes of the mask; what each of them brought.
template <class T>
AUTOHDR_UNCHECKED const T* exchange(unsigned& mask, const T& value) {
  static_assert(sizeof(T) * kWarp <= sizeof Exchange::slots[0] && std::is_trivially_copyable_v<T>);
  Warp& warp = block.warps[self->warp];
  mask &= warp.lanes;
  if (!(mask >> self->lane & 1)) fail("a lane is not in the mask of its own warp function");
  Exchange& e = mask == warp.lanes ? warp.whole : warp.parts[mask];
  T* slots = reinterpret_cast<T*>(e.slots[e.barrier.generation % 2]);
  slots[self->lane] = value;
  arrive(e.barrier, __builtin_popcount(mask));
  return slots;
}

// The value of lane `source`, the caller's own if not `inside` its segment, NaN from a lane that takes no part.
template <class T>
AUTOHDR_UNCHECKED T shuffle(unsigned mask, T value, int source, bool inside) {
  const T* values = exchange(mask, value);
  if (!inside) return value;
  if (mask >> source & 1) return values[source];
  memset(&value, 0xff, sizeof value);
  return value;
}

template <class T>
void copy_later(T* to, const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const T value = *from;
  Copy copy{{}, to, sizeof value, self->group};
  memcpy(copy.bytes, &value, sizeof value);
  self->copies.push_back(copy);
  T unknown;
  memset(&unknown, 0xff, sizeof unknown);
  *to = unknown;
}

inline void commit_copies() { ++self->group; }

// Until no more than the last `left` groups, and copies in none, are on their way.
inline void wait_for_copies(int left) {
  std::vector<Copy> later;
  for (const Copy& copy : self->copies) {
    if (copy.group < self->group - left)
      memcpy(copy.to, copy.bytes, copy.size);
    else
      later.push_back(copy);
  }
  self->copies.swap(later);
}

inline int count_predicates(bool predicate) {
  int& count = block.predicates[block.barrier.generation % 2];
  block.predicates[1 - block.barrier.generation % 2] *= block.barrier.waiting > 0;
  count += predicate;
  arrive(block.barrier, block.threads);
  const int result = count;
  arrive(block.barrier, block.threads);
  return result;
}

__attribute__((no_sanitize_address)) inline void fiber_main() {
  for (;;) {
    block.body();
    if (++block.returned == block.threads)
      resume(block.launcher);
    else
      wait();
  }
}

inline void prepare(Fiber& f) {
  if (!f.stack) {
    f.stack =
        static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (f.stack == MAP_FAILED || mprotect(f.stack, kGuard, PROT_NONE))
      throw std::runtime_error("emulation: no memory for stacks");
  }
  ASAN_UNPOISON_MEMORY_REGION(f.stack + kGuard, kStack - kGuard);
  void** sp = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.sp = sp;
}

inline int64_t most_shared() {  // bytes of a block
  const char* bytes = std::getenv("AUTOHDR_SHARED");
  return bytes ? std::atoll(bytes) : autohdr::kMaxShared;
}

// Blocks with so many of them that a multiprocessor has room for, if AUTOHDR_SHARED is all of its own but the system's 1024 a block.
inline int64_t resident(size_t shared_bytes) {
  if (!std::getenv("AUTOHDR_SHARED")) return INT64_MAX;
  return std::max<int64_t>(1, (most_shared() + 1024) / (static_cast<int64_t>(shared_bytes) + 1024));
}

inline void check_limits(dim3 grid, dim3 size, size_t shared_bytes) {
  const auto check = [](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string("emulation: launch with ") + what);
  };
  check(grid.x && grid.y && grid.z, "an empty grid");
  check(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "a grid beyond 2147483647 x 65535 x 65535");
  check(size.x && size.y && size.z, "an empty block");
  check(size.z <= 64 && uint64_t{size.x} * size.y * size.z <= 1024, "more than 1024 threads a block, or 64 in z");
  check(shared_bytes <= most_shared(), "more shared memory than a block can have");
}

inline void run_block() {
  Block& b = block;
  b.returned = 0;
  memset(b.predicates, 0, sizeof b.predicates);
  for (int i = b.threads; i-- > 0;) {
    b.fibers[i].copies.clear();
    b.fibers[i].group = 0;
    b.ready[b.ready_count++] = &b.fibers[i];
  }
  wait();  // until all threads have returned, or one has failed
  if (b.error.empty()) return;
  for (Fiber& f : b.fibers) prepare(f);
  b.ready_count = 0;
  b.barrier = {};
  b.warps.clear();
}

inline void run(dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> body) {
  check_limits(grid, size, shared_bytes);
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Block& b = block;
  const char* seed = std::getenv("AUTOHDR_EMULATION_SEED");
  b.seed = seed ? std::strtoull(seed, nullptr, 10) : autohdr_emulated_launches;
  ++autohdr_emulated_launches;
  b.random = b.seed;
  b.threads = static_cast<int>(size.x * size.y * size.z);
  b.size = size, b.grid = grid, b.body = std::move(body);
  b.error.clear();
  if (b.fibers.size() < static_cast<size_t>(b.threads)) {
    b.fibers.resize(b.threads);
    for (Fiber& f : b.fibers) prepare(f);
  }
  b.warps.assign((b.threads + kWarp - 1) / kWarp, {});
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    f.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    f.warp = i / kWarp, f.lane = i % kWarp;
    b.warps[f.warp].lanes |= 1u << f.lane;
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks && b.error.empty(); ++k) {
    const uint64_t i = b.seed % 2 ? blocks - 1 - k : k;
    b.index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
               static_cast<unsigned>(i / grid.x / grid.y)};
    b.shared = static_cast<char*>(std::malloc(shared_bytes));  // of exactly this size, between red zones
    memset(b.shared, 0xff, shared_bytes);                      // NaN in every float type
    run_block();
    std::free(b.shared);
  }
  b.body = nullptr;
  if (!b.error.empty()) throw std::runtime_error("emulation: " + b.error);
}

inline bool recording() { return std::getenv("AUTOHDR_RECORD_LAUNCHES") != nullptr; }

inline int64_t multiprocessors() {  // 2: small tests are split in some shapes and not in others
  const char* count = std::getenv("AUTOHDR_MULTIPROCESSORS");
  return count ? std::atoll(count) : 2;
}

inline void record(void* kernel, dim3 grid, dim3 size, size_t shared_bytes, const std::vector<unsigned char>& parameters) {
  Dl_info library{};
  dladdr(kernel, &library);
  FILE* file = std::fopen(std::getenv("AUTOHDR_RECORD_LAUNCHES"), "a");
  if (!file) throw std::runtime_error("emulation: the file of launches cannot be written");
  const auto place = static_cast<char*>(kernel) - static_cast<char*>(library.dli_fbase);
  std::fprintf(file, "%td %u %u %u %u %u %u %zu ", place, grid.x, grid.y, grid.z, size.x, size.y, size.z, shared_bytes);
  for (unsigned char byte : parameters) std::fprintf(file, "%02x", byte);
  std::fprintf(file, "\n");
  std::fclose(file);
}

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 size, size_t shared_bytes, P... parameters) {
  if (!recording()) return run(grid, size, shared_bytes, [=] { kernel(parameters...); });
  check_limits(grid, size, shared_bytes);
  std::vector<unsigned char> bytes;
  const auto add = [&](const auto& parameter) {
    constexpr size_t align = alignof(decltype(parameter));
    bytes.resize((bytes.size() + align - 1) / align * align);
    const auto* begin = reinterpret_cast<const unsigned char*>(&parameter);
    bytes.insert(bytes.end(), begin, begin + sizeof parameter);
  };
  (add(parameters), ...);
  record(reinterpret_cast<void*>(kernel), grid, size, shared_bytes, bytes);
}

template <class A, class B>
using Common = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;

}  // namespace emulation

#define threadIdx (::emulation::self->thread)
#define blockIdx (::emulation::block.index)
#define blockDim (::emulation::block.size)
#define gridDim (::emulation::block.grid)
constexpr int warpSize = emulation::kWarp;

inline void __syncthreads() { emulation::arrive(emulation::block.barrier, emulation::block.threads); }
inline int __syncthreads_count(int p) { return emulation::count_predicates(p); }
inline int __syncthreads_or(int p) { return emulation::count_predicates(p) > 0; }
inline int __syncthreads_and(int p) { return emulation::count_predicates(p) == emulation::block.threads; }
inline void __syncwarp(unsigned mask = ~0u) { emulation::exchange(mask, '\0'); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emulation::shuffle(mask, v, (emulation::self->lane & -width) | (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  const int source = emulation::self->lane ^ bits;
  return emulation::shuffle(mask, v, source, source < (emulation::self->lane & -width) + width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = emulation::self->lane, source = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, v, source, source >= (lane & -width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = emulation::self->lane, source = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, v, source, source < (lane & -width) + width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int* predicates = emulation::exchange(mask, predicate);
  unsigned votes = 0;
  for (int i = 0; i < emulation::kWarp; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(predicates[i] != 0) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}

template <class A, class B>
emulation::Common<A, B> min(A a, B b) {
  const emulation::Common<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B>
emulation::Common<A, B> max(A a, B b) {
  const emulation::Common<A, B> x = a, y = b;
  return x < y ? y : x;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> std::min(by, 32u));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
AUTOHDR_UNCHECKED inline float __uint_as_float(unsigned x) {
  float f;
  memcpy(&f, &x, sizeof f);
  return f;
}
AUTOHDR_UNCHECKED inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, sizeof u);
  return u;
}
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }

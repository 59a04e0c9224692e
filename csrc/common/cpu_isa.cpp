#include "common/cpu_isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace autohdr {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni"};

bool runs_here(Isa isa) {
#if AUTOHDR_X86
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avxvnni: return runs_here(Isa::avx2) && __builtin_cpu_supports("avxvnni");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512vnni: return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa best() {
  for (Isa isa : {Isa::avx512vnni, Isa::avx512, Isa::avxvnni, Isa::avx2})
    if (runs_here(isa)) return isa;
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

constexpr size_t kAlign = 64;            // bytes: a cache line and the widest vector
constexpr size_t kLeastBlock = 1 << 20;  // bytes that are asked of the system at once

struct Arena {
  struct Block {
    void* data;
    size_t size;
  };
  std::vector<Block> blocks;
  size_t used = 0;  // bytes taken from the last block

  void free_all() {
    for (Block& b : blocks) std::free(b.data);
    blocks.clear();
  }
  void add(size_t size) {
    size = (size + kAlign - 1) / kAlign * kAlign;
    void* data = std::aligned_alloc(kAlign, size);
    if (!data) throw std::bad_alloc();
    blocks.push_back({data, size});
    used = 0;
  }
  ~Arena() { free_all(); }
};

thread_local Arena arena;
std::atomic<bool> poisoned{false};

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

void use_isa(const std::string& name) {
  for (size_t i = 0; i < compiled_isas().size(); ++i)
    if (name == kNames[i] && runs_here(static_cast<Isa>(i))) {
      chosen().store(static_cast<Isa>(i), std::memory_order_relaxed);
      return;
    }
  std::string usable;
  for (const char* isa : usable_isas()) usable += std::string(usable.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("use_cpu_isa: expected one of " + usable + ", got " + name);
}

std::vector<const char*> compiled_isas() { return {kNames, kNames + (AUTOHDR_X86 ? 5 : 1)}; }

std::vector<const char*> usable_isas() {
  std::vector<const char*> names;
  for (size_t i = 0; i < compiled_isas().size(); ++i)
    if (runs_here(static_cast<Isa>(i))) names.push_back(kNames[i]);
  return names;
}

void* Scratch::bytes(size_t count) {
  count = (count + kAlign - 1) / kAlign * kAlign;
  if (arena.blocks.empty() || arena.used + count > arena.blocks.back().size) arena.add(std::max(count, kLeastBlock));
  void* p = static_cast<char*>(arena.blocks.back().data) + arena.used;
  arena.used += count;
  if (poisoned.load(std::memory_order_relaxed)) std::memset(p, 0xff, count);
  return p;
}

void Scratch::poison(bool on) { poisoned.store(on, std::memory_order_relaxed); }

// What several blocks held fits one block next time.
Scratch::~Scratch() {
  if (arena.blocks.size() > 1) {
    size_t total = 0;
    for (auto& b : arena.blocks) total += b.size;
    arena.free_all();
    try {
      arena.add(total);
    } catch (const std::bad_alloc&) {  // the next call takes what it needs piece by piece
    }
  }
  arena.used = 0;
}

}  // namespace autohdr

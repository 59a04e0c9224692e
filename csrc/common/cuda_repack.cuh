// Weights and sums in the order that the kernels want: padded, transposed, added up over slots.
#pragma once
#include <type_traits>

#include "common/cuda_math.cuh"
#include "common/cuda_steps.cuh"

namespace autohdr {
namespace image {

// Hidden channels come in groups (q, k, v of each head; the two halves of the gate), each padded to whole pieces. They lie one after
// the other, or in turns of `turn` channels: so a lane finds what it needs of all groups in one place.
struct Groups {
  int64_t count, size, turn;
  static Groups one_by_one(int64_t count, int64_t size) { return {count, size, round_up(size, 8)}; }
  int padded() const { return static_cast<int>(round_up(size, 8)); }   // channels of a group
  int channels() const { return static_cast<int>(count) * padded(); }  // of all
};

// Where element i of a padded or transposed copy lies in the original, axis by axis, with `stride` from a channel to the next.
struct Axis {
  Groups groups;
  int64_t stride;
  bool unpads;  // the original is in turns, the copy not; or the other way around, and the copy holds 0 where there is none
  static Axis pad(const Groups& g, int64_t stride) { return {g, stride, false}; }
  static Axis unpad(const Groups& g, int64_t stride) { return {g, stride, true}; }
  static Axis plain(int64_t from, int64_t stride) { return {{1, from, 1}, stride, false}; }
  // In 32 bits, to which Repack::add holds a copy: 64 take a hundred instructions to divide.
  __device__ bool has(unsigned i) const { return unpads || index(i, i / turn()) < static_cast<unsigned>(groups.size); }
  __device__ int64_t place(unsigned i) const {
    const unsigned count = groups.count, size = groups.size;
    if (!unpads) {
      const unsigned turns = i / turn();
      return (turns % count * size + index(i, turns)) * stride;
    }
    const unsigned group = i / size, index = i % size, turns = index / turn();
    return ((turns * count + group) * turn() + (index - turns * turn())) * stride;
  }

 private:
  __device__ unsigned turn() const { return groups.turn; }
  // Within its group, of what is in turn `turns`.
  __device__ unsigned index(unsigned i, unsigned turns) const {
    return turns / static_cast<unsigned>(groups.count) * turn() + (i - turns * turn());
  }
};

// A copy of from[slot·s + …], added up over the slots.
struct Gather {
  Axis rows, columns;
  int64_t count, width;  // elements and columns of the copy
  int64_t slot = 0;
  int slots = 1;
};

// Where there are many slots, kSlotThreads threads share an element.
constexpr int kSlotThreads = 8, kGatherThreads = 256;
__host__ __device__ constexpr int slot_threads(int slots) { return slots > kSlotThreads ? kSlotThreads : 1; }

struct GatherTask {
  Gather gather;
  const float* from;
  void* to;
  int element;  // bytes of one in `to`
};
// Tasks that one launch does.
struct GatherTasks {
  static constexpr int kMost = 8;
  GatherTask tasks[kMost];
  int count = 0;
};

template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_elements(GatherTasks all) {
  __shared__ double sums[kSlotThreads][kGatherThreads / kSlotThreads];
  const GatherTask& task = all.tasks[blockIdx.y];
  const Gather& g = task.gather;
  const int threads = slot_threads(g.slots), each = kGatherThreads / threads;
  const int mine = threadIdx.x % each, part = threadIdx.x / each;
  for (int64_t first = int64_t{blockIdx.x} * each; first < g.count; first += int64_t{gridDim.x} * each) {
    const int64_t i = first + mine;
    const unsigned width = g.width, row = static_cast<unsigned>(i) / width, column = static_cast<unsigned>(i) - row * width;
    double sum = 0;
    if (i < g.count && g.rows.has(row) && g.columns.has(column)) {
      const float* at = task.from + g.rows.place(row) + g.columns.place(column);
#pragma unroll 2
      for (int s = part; s < g.slots; s += threads) sum += at[s * g.slot];
    }
    if (threads > 1) {
      sums[part][mine] = sum;
      __syncthreads();
      if (part == 0)
        for (int s = 1; s < kSlotThreads; ++s) sum += sums[s][mine];
      __syncthreads();
    }
    if (part > 0 || i >= g.count) continue;
    if (task.element == 8)
      static_cast<double*>(task.to)[i] = sum;
    else if (task.element == 4)
      static_cast<float*>(task.to)[i] = static_cast<float>(sum);
    else
      static_cast<T*>(task.to)[i] = from_float<T>(static_cast<float>(sum));
  }
}

// Copies to T, float or double in one launch, where they are no more than GatherTasks::kMost. None is made to null: memory is only
// counted.
template <class T>
class Repack {
 public:
  explicit Repack(cudaStream_t stream) : stream_(stream) {}
  template <class To>
  void add(const Gather& g, const float* from, To* to) {
    static_assert(std::is_same_v<To, T> || std::is_same_v<To, float> || std::is_same_v<To, double>);
    if (!g.count || !to) return;
    if (g.count >> 32) throw std::runtime_error("weights or sums of more than 2^32 elements");
    if (all_.count == GatherTasks::kMost) run();
    all_.tasks[all_.count++] = {g, from, to, static_cast<int>(sizeof(To))};
    blocks_ = std::max(blocks_, ceil_div(g.count * slot_threads(g.slots), kGatherThreads));
  }
  // The same into memory of its own.
  template <class To>
  To* make(Workspace& memory, const Gather& g, const float* from) {
    To* to = memory.take<To>(g.count);
    add(g, from, to);
    return to;
  }
  // to[i] = Σ_slot from[slot][i].
  template <class To>
  void add_up(const float* from, int64_t slots, int64_t count, To* to) {
    add({Axis::plain(1, 0), Axis::plain(count, 1), count, count, count, static_cast<int>(slots)}, from, to);
  }
  void run() {
    if (all_.count)
      launch(gather_elements<T>, dim3(std::min<int64_t>(blocks_, 8192), all_.count), dim3(kGatherThreads), 0, stream_, all_);
    all_.count = 0, blocks_ = 0;
  }

 private:
  cudaStream_t stream_;
  GatherTasks all_{};
  int64_t blocks_ = 0;
};

}  // namespace image
}  // namespace autohdr

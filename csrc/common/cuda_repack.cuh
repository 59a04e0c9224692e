// Weights and sums in the order that the kernels want: padded, transposed, added up over slots.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "common/cuda_view.cuh"

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
  // Whether `many` elements of the copy, from a multiple of it on, are each `stride` after the one before.
  bool runs(int many) const { return groups.count == 1 || (groups.turn % many == 0 && (!unpads || groups.size % many == 0)); }
  struct Place {
    int64_t at;
    int left;  // how many elements of its group there are from here on
  };
  // In 32 bits, to which Repack::add holds a copy: 64 take a hundred instructions to divide.
  __device__ __forceinline__ Place place(unsigned i) const {
    const unsigned count = groups.count, size = groups.size, turn = groups.turn;
    if (unpads) {
      const unsigned group = i / size, index = i - group * size, turns = index / turn;
      return {((turns * count + group) * turn + (index - turns * turn)) * stride, static_cast<int>(size - index)};
    }
    const unsigned turns = i / turn, round = turns / count, index = round * turn + (i - turns * turn);
    return {((turns - round * count) * size + index) * stride, static_cast<int>(size - index)};
  }
};

// A copy of from[slot·s + …], added up over the slots.
struct Gather {
  Axis rows, columns;
  int64_t count, width;  // elements and columns of the copy
  int64_t slot = 0;
  int slots = 1;
  bool roots = false;   // of the sums
  bool rounds = false;  // to the kernels' T, whatever the copy is of; of float32 to TF32
};

// A thread makes some neighbouring elements of a row, or, where there are many slots, a warp.
constexpr int kGathered = 8, kGatherThreads = 256;

struct GatherTask {
  Gather gather;
  const float* from;
  void* to;
  int element;       // bytes of one in `to`
  int rows, across;  // of the copy; threads of a row
  int lanes;         // that share the slots of an element
  bool down;         // what lies side by side in the original are rows of the copy
  bool runs;         // a thread's elements lie one stride apart
  bool loads_pieces, stores_pieces;
  int end;  // of its blocks

  // v += the slots first, first + lanes, … of the elements from (row, column) on.
  template <class Sum>
  __device__ __forceinline__ void add(int row, int column, int first, Sum (&v)[kGathered]) const {
    const Axis::Place of_row = gather.rows.place(row), of_column = gather.columns.place(column);
    const float* at = from + of_row.at + of_column.at;
    const int slots = of_row.left > 0 ? gather.slots : 0, width = static_cast<int>(gather.width) - column;
    if (loads_pieces && min(width, of_column.left) >= kGathered) {
#pragma unroll 4
      for (int s = first; s < slots; s += lanes) {
        float piece[kGathered];
        load_floats(at + s * gather.slot, piece);
#pragma unroll
        for (int e = 0; e < kGathered; ++e) v[e] += piece[e];
      }
      return;
    }
    const float* element_at[kGathered];
#pragma unroll
    for (int e = 0; e < kGathered; ++e) {
      Axis::Place place{of_column.at + e * gather.columns.stride, of_column.left - e};
      if (!runs) place = gather.columns.place(column + e);
      element_at[e] = e < width && place.left > 0 ? from + of_row.at + place.at : nullptr;
    }
    for (int s = first; s < slots; s += lanes) {
      float piece[kGathered] = {};
#pragma unroll
      for (int e = 0; e < kGathered; ++e)
        if (element_at[e]) piece[e] = element_at[e][s * gather.slot];
#pragma unroll
      for (int e = 0; e < kGathered; ++e) v[e] += piece[e];
    }
  }
  template <class T, class Sum>
  __device__ __forceinline__ void store(int row, int column, const Sum (&v)[kGathered]) const {
    const int64_t at = row * gather.width + column;
    if (element == 8)
      store_as(static_cast<double*>(to) + at, column, v);
    else if (element == 4 && gather.rounds)
      store_as<std::conditional_t<std::is_same_v<T, float>, Tf32, T>>(static_cast<float*>(to) + at, column, v);
    else if (element == 4)
      store_as(static_cast<float*>(to) + at, column, v);
    else
      store_as(static_cast<T*>(to) + at, column, v);
  }

 private:
  template <class Rounded = float, class To, class Sum>
  __device__ __forceinline__ void store_as(To* at, int column, const Sum (&v)[kGathered]) const {
    if constexpr (sizeof(To) == 8) {
#pragma unroll
      for (int e = 0; e < kGathered; ++e)
        if (column + e < gather.width) at[e] = v[e];
    } else {
      float rounded[kGathered];
#pragma unroll
      for (int e = 0; e < kGathered; ++e) {
        const float single = static_cast<float>(v[e]);
        if constexpr (std::is_same_v<Rounded, Tf32>)
          rounded[e] = __uint_as_float(tf32_operand(single) & ~0x1fffu);
        else
          rounded[e] = to_float(from_float<Rounded>(single));
      }
      if (stores_pieces) return store_floats(at, rounded);
#pragma unroll
      for (int e = 0; e < kGathered; ++e)
        if (column + e < gather.width) at[e] = from_float<To>(rounded[e]);
    }
  }
};
// Tasks that one launch does, each in blocks of its own.
struct GatherTasks {
  static constexpr int kMost = 12;
  GatherTask tasks[kMost];
  int count = 0;
};

template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_elements(GatherTasks all) {
  int index = 0, begin = 0;
  const int block = blockIdx.x;
  while (block >= all.tasks[index].end) begin = all.tasks[index++].end;
  const GatherTask& task = all.tasks[index];
  const bool shared = task.lanes > 1;
  const unsigned thread = (block - begin) * kGatherThreads + threadIdx.x, unit = shared ? thread / 32 : thread,
                 inner = task.down ? task.rows : task.across, outer = unit / inner, rest = unit - outer * inner;
  const int row = task.down ? rest : outer, column = (task.down ? outer : rest) * kGathered;
  const bool there = row < task.rows && column < task.gather.width;
  if (task.gather.slots == 1 && !task.gather.roots) {
    if (!there) return;
    float v[kGathered] = {};
    task.add(row, column, 0, v);
    return task.template store<T>(row, column, v);
  }
  double v[kGathered] = {};
  const int lane = shared ? threadIdx.x % 32 : 0;
  if (there) task.add(row, column, lane, v);
  if (shared) {
#pragma unroll
    for (int e = 0; e < kGathered; ++e)
#pragma unroll
      for (int d = 16; d > 0; d /= 2) v[e] += __shfl_xor_sync(~0u, v[e], d);
    if (lane > 0) return;
  }
  if (task.gather.roots)
#pragma unroll
    for (int e = 0; e < kGathered; ++e) v[e] = sqrt(v[e]);
  if (there) task.template store<T>(row, column, v);
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
    if (g.count >> 31) throw std::runtime_error("weights or sums of more than 2^31 elements");
    if (all_.count == GatherTasks::kMost) run();
    const auto on_pieces = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const int rows = static_cast<int>(g.count / g.width), across = static_cast<int>(ceil_div(g.width, kGathered)),
              lanes = g.slots > kGathered ? 32 : 1;
    const bool runs = g.columns.runs(kGathered), whole = g.width % kGathered == 0;
    const int64_t steps = g.rows.stride | g.slot | (g.columns.groups.count > 1 ? g.columns.groups.size : 0);
    blocks_ += ceil_div(int64_t{rows} * across * lanes, kGatherThreads);
    all_.tasks[all_.count++] = {g,
                                from,
                                to,
                                static_cast<int>(sizeof(To)),
                                rows,
                                across,
                                lanes,
                                std::abs(g.rows.stride) < std::abs(g.columns.stride),
                                runs,
                                runs && g.columns.stride == 1 && steps % 4 == 0 && on_pieces(from),
                                whole && on_pieces(to),
                                static_cast<int>(blocks_)};
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
    if (all_.count) launch(gather_elements<T>, dim3(blocks_), dim3(kGatherThreads), 0, stream_, all_);
    all_.count = 0, blocks_ = 0;
  }

 private:
  cudaStream_t stream_;
  GatherTasks all_{};
  int64_t blocks_ = 0;
};

}  // namespace image
}  // namespace autohdr

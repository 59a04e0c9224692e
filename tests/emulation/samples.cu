// Small kernels, right and with a planted bug each, that test_emulation.py runs: samples CASE. Prints "right" or "wrong".
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "common/cuda_async.cuh"
#include "common/cuda_steps.cuh"

enum class Bug { none, offset, tail, barrier, divergent, short_shared, uninitialised, mask, misaligned, wait, early };
constexpr int kThreads = 128, kSize = 1000;

// out[block] = sum of x over the block's threads, the second time doubled.
template <Bug bug>
__global__ void __launch_bounds__(kThreads) sum(const float* x, int n, float* out) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  for (int round = 0; round < 2; ++round) {
    float v = 0;
    if (bug == Bug::misaligned)
      v = reinterpret_cast<const float4*>(x + 1)->x;
    else if (i < n || bug == Bug::tail)
      v = x[i + (bug == Bug::offset)];
    if (bug != Bug::uninitialised || t != 77) shared[t] = v * (round + 1);
    if (bug != Bug::barrier) __syncthreads();
    for (int stride = kThreads / 2; stride >= 32; stride /= 2) {
      if (t < stride) {
        shared[t] += shared[t + stride];
        if (bug == Bug::divergent) __syncthreads();
      }
      if (bug != Bug::divergent) __syncthreads();
    }
    if (t < 32) {
      v = shared[t];
      for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(bug == Bug::mask ? 0xffffu : ~0u, v, d);
      if (t == 0) out[blockIdx.x] = v;
    }
    __syncthreads();
  }
}

template <Bug bug>
bool sums() {
  std::vector<float> x(kSize);
  for (int i = 0; i < kSize; ++i) x[i] = static_cast<float>(i % 7);
  const int blocks = (kSize + kThreads - 1) / kThreads;
  std::vector<float> out(blocks);
  const size_t bytes = (kThreads - (bug == Bug::short_shared)) * sizeof(float);
  autohdr::launch(sum<bug>, dim3(blocks), dim3(kThreads), bytes, nullptr, x.data(), kSize, out.data());
  for (int b = 0; b < blocks; ++b) {
    float expected = 0;
    for (int i = b * kThreads; i < kSize && i < (b + 1) * kThreads; ++i) expected += 2 * x[i];
    if (out[b] != expected) return false;
  }
  return true;
}

// out[i] = x[i ^ 1], through two tiles in shared memory that copies fill in turn, one ahead; and the last element through a copy in no
// group.
template <Bug bug>
__global__ void __launch_bounds__(kThreads) pipeline(const float* x, int rounds, float* out) {
  __shared__ float tiles[2][kThreads], last;
  const int t = threadIdx.x;
  const auto copy = [&](int round) {
    if (round < rounds) autohdr::copy_async<float>(&tiles[round % 2][t], x + round * kThreads + t);
    autohdr::commit_copies();
  };
  copy(0);
  for (int round = 0; round < rounds; ++round) {
    copy(round + 1);
    if (bug != Bug::wait) autohdr::wait_for_groups<bug == Bug::early ? 2 : 1>();
    __syncthreads();
    out[round * kThreads + t] = tiles[round % 2][t ^ 1];
    __syncthreads();
  }
  if (t > 0) return;
  autohdr::copy_async<float>(&last, x + rounds * kThreads);
  autohdr::wait_for_copies();
  out[rounds * kThreads] = last;
}

template <Bug bug>
bool pipelines() {
  constexpr int kRounds = 5;
  std::vector<float> x(kRounds * kThreads + 1), out(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  autohdr::launch(pipeline<bug>, dim3(1), dim3(kThreads), 0, nullptr, x.data(), kRounds, out.data());
  for (size_t i = 0; i + 1 < x.size(); ++i)
    if (out[i] != x[i ^ 1]) return false;
  return out.back() == x.back();
}

template <int Columns>
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  __shared__ float tile[32][33];
  const int c = blockIdx.x * 32 + threadIdx.x, r0 = blockIdx.y * 32;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (r0 + k < rows && c < columns) tile[k][threadIdx.x] = x[(r0 + k) * columns + c];
  __syncthreads();
  const int r = r0 + threadIdx.x, c0 = blockIdx.x * 32;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (r < rows && c0 + k < columns) y[(c0 + k) * rows + r] = tile[threadIdx.x + (Columns != 33)][k];
}

bool transposes(bool right) {
  constexpr int kRows = 64, kColumns = 70;
  std::vector<float> x(kRows * kColumns), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  autohdr::launch(right ? transpose<33> : transpose<34>, dim3(3, 2), dim3(32, 8), 0, nullptr, x.data(), y.data(), kRows,
                  kColumns);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c)
      if (y[c * kRows + r] != x[r * kColumns + c]) return false;
  return true;
}

// Inclusive sums of each warp, a vote, and counts over the block, of a block that is not a multiple of a warp.
__global__ void warp_functions(double2* sums, unsigned* votes, int* counts) {
  const int t = threadIdx.x, lane = t % warpSize;
  double2 v{1.0, double(lane)};
  for (int d = 1; d < warpSize; d *= 2) {
    const double x = __shfl_up_sync(~0u, v.x, d), y = __shfl_up_sync(~0u, v.y, d);
    if (lane >= d) v.x += x, v.y += y;
  }
  sums[t] = v;
  votes[t] = __ballot_sync(~0u, lane % 3 == 0);
  __syncwarp();
  counts[t] = __syncthreads_count(t % 5 == 0) + 1000 * __syncthreads_or(t == 3) + 10000 * __syncthreads_and(t != 3) +
              100 * __any_sync(~0u, lane == 7) + 200 * __all_sync(~0u, lane != 50) +
              400 * (__shfl_down_sync(~0u, lane, 1, 8) == lane);
}

bool warps() {
  constexpr int kCount = 72;
  std::vector<double2> sums(kCount);
  std::vector<unsigned> votes(kCount);
  std::vector<int> counts(kCount);
  autohdr::launch(warp_functions, dim3(1), dim3(kCount), 0, nullptr, sums.data(), votes.data(), counts.data());
  for (int t = 0; t < kCount; ++t) {
    const int lane = t % 32;
    const bool right = sums[t].x == lane + 1 && sums[t].y == lane * (lane + 1) / 2 &&
                       votes[t] == (t < 64 ? 0x49249249u : 0x49u) && counts[t] == 15 + 1000 + 100 + 200 + 400 * (lane % 8 == 7);
    if (!right) return false;
  }
  return true;
}

// A row beyond any int's bytes is a step of its own.
bool wide_rows() {
  const autohdr::image::Steps steps({1, 8, 1 << 28, 8}, {0, 8}, 2 * 8 * sizeof(float), 1, autohdr::image::kForwardBudget, 1);
  return steps.rows == 1 && steps.images == 1;
}

__global__ void nothing() {}

bool limits(dim3 grid, dim3 block, size_t shared) {
  autohdr::launch(nothing, grid, block, shared, nullptr);
  return true;
}

int main(int, char** argv) {
  const struct {
    std::string name;
    std::function<bool()> run;
  } cases[] = {
      {"sum", sums<Bug::none>},
      {"transpose", [] { return transposes(true); }},
      {"warp", warps},
      {"pipeline", pipelines<Bug::none>},
      {"wide rows", wide_rows},
      {"no wait", pipelines<Bug::wait>},
      {"early", pipelines<Bug::early>},
      {"offset", sums<Bug::offset>},
      {"tail", sums<Bug::tail>},
      {"barrier", sums<Bug::barrier>},
      {"divergent", sums<Bug::divergent>},
      {"short shared", sums<Bug::short_shared>},
      {"static shared", [] { return transposes(false); }},
      {"uninitialised", sums<Bug::uninitialised>},
      {"mask", sums<Bug::mask>},
      {"misaligned", sums<Bug::misaligned>},
      {"threads", [] { return limits(dim3(1), dim3(1025), 0); }},
      {"grid", [] { return limits(dim3(1, 65536), dim3(1), 0); }},
      {"empty", [] { return limits(dim3(0), dim3(1), 0); }},
      {"shared", [] { return limits(dim3(1), dim3(1), autohdr::kMaxShared + 1); }},
  };
  try {
    for (const auto& c : cases)
      if (c.name == argv[1]) std::puts(c.run() ? "right" : "wrong");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}

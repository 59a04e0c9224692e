// A sequence in memory, of any of three dtypes and in either order.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define AUTOHDR_ANYWHERE __host__ __device__
#else
#define AUTOHDR_ANYWHERE
#endif

namespace autohdr {

enum class Dtype { f32, bf16, f16 };

// Element (b, g, c, t) lies at data + b·batch + g·group + c·channel + t·token, and channel or token is 1.
struct Sequence {
  void* data;  // null: there is none
  Dtype dtype;
  int64_t batch, group, channel, token;
};

}  // namespace autohdr

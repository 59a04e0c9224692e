// Parameters of selective_scan's kernels. Tensors keep their dtypes and strides; parameters and states are contiguous float32.
#pragma once
#include "common/sequence.h"
#include "common/stream.h"

namespace autohdr {

constexpr int64_t kChunk = 64;  // tokens between two saved states; CHUNK in declaration.py

struct ScanShape {
  int64_t batch, seqlen, groups, channels, dstate;  // channels: of one group
  bool softplus, reverse;
  AUTOHDR_ANYWHERE int64_t dim() const { return groups * channels; }
  AUTOHDR_ANYWHERE int64_t chunks() const { return (seqlen + kChunk - 1) / kChunk; }
};

// A sequence's c counts the channels of group g; of B and C, the states.
struct ScanInputs {
  Sequence u, delta;  // with delta_weight, delta has one channel
  Sequence B, C;
  Sequence z;                  // optional
  const float* A;              // [dim, dstate]
  const float* D;              // [dim], or null
  const float* delta_bias;     // [dim], or null
  const float* delta_weight;   // [dim], or null: delta has every channel
  const float* initial_state;  // [batch, dim, dstate], or null
};

struct ScanForward {
  ScanShape shape;
  ScanInputs in;
  Sequence out;
  float* last_state;  // [batch, dim, dstate]
  float* states;      // [batch, chunks, dstate, dim], before each chunk in the scan's order; null: they are not kept
};

struct ScanBackward {
  ScanShape shape;
  ScanInputs in;
  const float* states;  // as the forward pass left them
  Sequence d_out;
  const float* d_last_state;  // [batch, dim, dstate], or null
  Sequence du, d_delta, dB, dC, dz;
  float *dA, *dD, *d_delta_bias, *d_delta_weight, *d_initial_state;  // as the parameters, unused where they are null
};

// How the work is split, and so the last bits of a result, depends on the device's number of multiprocessors.
int64_t queue(const ScanForward& a, void* memory, Stream stream);
int64_t queue(const ScanBackward& a, void* memory, Stream stream);

}  // namespace autohdr

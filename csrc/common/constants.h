// Numbers and polynomials that functions of a float use on every device.
#pragma once

namespace autohdr {

constexpr float kLog2e = 1.44269504088896341f, kLog2eRest = 1.92596299e-8f;  // log2(e) as a float, and what that leaves
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kNormalDensity = 0.398942280401432678f;  // 1 / √(2π), the standard normal's at 0

}  // namespace autohdr

// artanh(s) / s of s² for |s| <= 1/3, by least largest relative error (6e-9), exactly 1 at 0. softplus needs it:
// log(1 + e) = 2 artanh(s) with s = e / (2 + e), e = exp(-|x|) <= 1. A macro, so that it is compiled for the caller's instruction
// set. Triton has a copy in autohdr/kernels/selective_scan/triton_impl.py, and a test compares them.
#define AUTOHDR_ARTANH_BY_S(s2) \
  ((((0.140059963f * (s2) + 0.140009016f) * (s2) + 0.200107634f) * (s2) + 0.333332092f) * (s2) + 1.0f)

// Functions of a vector; cuda_math.cuh has those of a GPU.
// Compiled per instruction set: common/cpu_each_isa.h.

AUTOHDR_INLINE vf round_to_integer(vf v) {  // |v| < 2^22: there floats from 1.5·2^23 on are the integers
  const vf magic = splat(12582912.0f);
  return (v + magic) - magic;
}
// p·2^n for n in [-152, 129]: in two halves, so that subnormal results come out right.
AUTOHDR_INLINE vf scale_by_power(vf p, vf n) {
  const vi k = __builtin_convertvector(n, vi);
  const vi half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}

// exp for v <= 0, relative error below 2e-7; exactly zero far out.
AUTOHDR_INLINE vf exp_negative(vf v) {
  const vf x = clamp(v, -104.0f, 0.0f) * kLog2e;
  const vf n = round_to_integer(x);
  const vf f = (x - n) * kLn2;
  vf p = splat(1.0f / 5040);  // Taylor's series: on |f| <= ln 2 / 2 its relative error is 8e-9
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return scale_by_power(p, n);
}

#if AUTOHDR_WIDTH > 4
// The standard normal distribution function, absolute error below 7e-8: 1/2 and, with v's sign, a polynomial of |v|'s distance from
// the middle of its piece of [0, 5.3], beyond which it is within 6e-8 of 0 or 1. The lanes of a vector have a coefficient for each
// piece; the highest power's comes first. Fitted by least largest error (2e-8 before rounding).
constexpr float kPieces = W == 16 ? 2.924f : 1.415f;  // in a unit of v: 5.3 is in the last one
alignas(64) constexpr float kByPiece[][W] = {
#if AUTOHDR_WIDTH == 16
    {4.6378795e-05f, 3.3714467e-05f, 5.117804e-06f, -2.0072313e-05f, -2.8653285e-05f, -2.1541517e-05f, -8.6346363e-06f,
     1.2169164e-06f, 5.1517441e-06f, 4.8798483e-06f, 3.1282816e-06f, 1.5640227e-06f, 6.4157479e-07f, 2.2135373e-07f,
     6.5158744e-08f, 1.6514996e-08f},
    {0.0f, 0.00020999933f, 0.00030981191f, 0.00026728417f, 0.00013776838f, 7.5903049e-06f, -6.8032459e-05f, -8.4245374e-05f,
     -6.6023873e-05f, -3.9806731e-05f, -1.9627783e-05f, -8.1394483e-06f, -2.8829911e-06f, -8.8060131e-07f, -2.3344862e-07f,
     -5.395766e-08f},
    {-0.0026596282f, -0.0022151449f, -0.0011201412f, 8.2708648e-05f, 0.00090920337f, 0.0011860146f, 0.0010401416f, 0.00071663421f,
     0.00040861196f, 0.00019755076f, 8.2083068e-05f, 2.9556701e-05f, 9.2746459e-06f, 2.5460854e-06f, 6.1323158e-07f,
     1.298646e-07f},
    {0.0f, -0.0075256145f, -0.012629317f, -0.014141125f, -0.0125210285f, -0.009246368f, -0.0058314493f, -0.003180895f,
     -0.0015120563f, -0.0006294286f, -0.00023021176f, -7.4154836e-05f, -2.1073709e-05f, -5.2906298e-06f, -1.1745871e-06f,
     -2.3079568e-07f},
    {0.13643716f, 0.12868701f, 0.10797934f, 0.080602899f, 0.053525984f, 0.031621512f, 0.016618988f, 0.00777017f, 0.0032319189f,
     0.0011958987f, 0.00039367008f, 0.00011528545f, 3.0034524e-05f, 6.9609941e-06f, 1.4352455e-06f, 2.6326049e-07f},
    {0.0f, 0.13382351f, 0.25301069f, 0.34755227f, 0.41434225f, 0.45636579f, 0.47991437f, 0.4916667f, 0.49689025f, 0.49895793f,
     0.49968687f, 0.49991572f, 0.4999797f, 0.49999562f, 0.49999917f, 0.49999985f},
#else
    {0.0f, -0.00037897457f, 3.0369165e-05f, 0.00014809583f, 5.4937777e-06f, -2.1535423e-05f, -5.9282638e-06f, -6.4980878e-07f},
    {0.0017131879f, 0.00012420898f, -0.0010526821f, -0.00024095344f, 0.00019812127f, 9.6564727e-05f, 1.6624444e-05f,
     1.3957836e-06f},
    {0.0f, 0.0057063f, 0.0021641213f, -0.001388211f, -0.00107659f, -0.00027023206f, -3.2803888e-05f, -2.1295841e-06f},
    {-0.023463134f, -0.0091525037f, 0.0086208694f, 0.0086677866f, 0.0030192009f, 0.00052389968f, 4.9589227e-05f, 2.6592916e-06f},
    {0.0f, -0.054847509f, -0.051859621f, -0.02231803f, -0.0051810965f, -0.00068431243f, -5.2658444e-05f, -2.3910522e-06f},
    {0.28193784f, 0.21963459f, 0.103834614f, 0.029790407f, 0.0051868558f, 0.00054806488f, 3.5146248e-05f, 1.3679991e-06f},
    {0.0f, 0.26012781f, 0.421235f, 0.48300293f, 0.49764961f, 0.49979502f, 0.49998882f, 0.49999961f},
#endif
};
AUTOHDR_INLINE vf normal_cdf(vf v) {
  const vi sign = (vi)v & (vi{} + INT32_MIN);
  const vf t = clamp((vf)((vi)v ^ sign), 0.0f, 5.3f) * kPieces;
  const vf magic = splat(12582912.0f), shifted = t + magic;  // see round_to_integer; the last bits are the piece's number
  const vf f = t - (shifted - magic);
  const auto of_piece = [&](const float* coefficients) { return __builtin_shuffle(load(coefficients), (vi)shifted); };
  vf p = of_piece(kByPiece[0]);
  AUTOHDR_UNROLL for (size_t i = 1; i < std::size(kByPiece); ++i) p = p * f + of_piece(kByPiece[i]);
  return (vf)((vi)p ^ sign) + 0.5f;
}
#else
// The standard normal distribution function, absolute error below 1.5e-7: 1/2 + v·P(v²) on [-5.3, 5.3], beyond which it is within
// 6e-8 of 0 or 1. P is fitted by least largest error (5e-8 before rounding), in s = 2 v²/5.3² − 1, which keeps its coefficients
// small.
AUTOHDR_INLINE vf normal_cdf(vf v) {
  constexpr float kEven[] = {0.00028598976f, 0.00072502555f, 0.0031430798f, 0.0088235922f,
                             0.018927123f,   0.032079354f,   0.04926417f,   0.13339256f};
  constexpr float kOdd[] = {-0.00076641823f, -0.0010906473f, -0.0058553219f, -0.013182495f,
                            -0.025299037f,   -0.039588854f,  -0.066518508f};
  const vf x = clamp(v, -5.3f, 5.3f), s = x * x * (2.0f / 28.09f) - 1.0f, s2 = s * s;
  vf even = splat(kEven[0]), odd = splat(kOdd[0]);  // two chains, each half as long
  AUTOHDR_UNROLL for (int i = 1; i < 7; ++i) {
    even = even * s2 + kEven[i];
    odd = odd * s2 + kOdd[i];
  }
  even = even * s2 + kEven[7];
  return x * (even + odd * s) + 0.5f;
}
#endif

AUTOHDR_INLINE vf exp2_polynomial(vf f) {  // on [-1/2, 1/2], by least largest relative error (1.6e-8); exactly 1 at 0
  vf p = splat(0.00015353362f);
  p = p * f + 0.0013398875f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  return p * f + 1.0f;
}
// v[j] = 2^v[j], at most one unit in the last place from the true value. Several at a time: one alone is a long chain.
template <int Count>
AUTOHDR_INLINE void exp2(vf* v) {
#if AUTOHDR_WIDTH == 16
  // On [0, 1], by least largest relative error (7e-9), exactly 1 and 2 at its ends: scalef takes v's floor itself, where the nearest
  // integer would cost an instruction.
  constexpr float kCoefficients[] = {0.0012440879f, 0.009678064f, 0.055484142f, 0.24022956f, 0.693147f, 1.0f};
  vf f[Count], p[Count];
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) f[j] = (vf)_mm512_reduce_ps((__m512)v[j], 9);  // minus its floor, 0 for infinities
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) p[j] = splat(0.00021715024f);
  AUTOHDR_UNROLL for (int i = 0; i < 6; ++i)
    AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) p[j] = p[j] * f[j] + kCoefficients[i];
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) v[j] = (vf)_mm512_scalef_ps((__m512)p[j], (__m512)v[j]);
#else
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) {
    const vf x = clamp(v[j], -152.0f, 129.0f), n = round_to_integer(x);
    v[j] = scale_by_power(exp2_polynomial(x - n), n);
  }
#endif
}

// exp(v) for v <= 88, above that as at 88; accurate for large |v| too, where exp2(v·log2(e)) is not. A NaN stays one.
AUTOHDR_INLINE vf exp(vf v) {
  v = clamp(v, -105.0f, 88.0f);
  const vf n = round_to_integer(v * kLog2e);
  const vf f = (v - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts, the first exact in 15 bits
#if AUTOHDR_WIDTH == 16
  return (vf)_mm512_scalef_ps((__m512)exp2_polynomial(f * kLog2e), (__m512)n);
#else
  return scale_by_power(exp2_polynomial(f * kLog2e), n);
#endif
}
// 1 / v for normal v whose reciprocal is normal; a division costs as much as five of a scan's steps.
AUTOHDR_INLINE vf reciprocal(vf v) {
#if AUTOHDR_WIDTH == 16
  const vf r = (vf)_mm512_rcp14_ps((__m512)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}
AUTOHDR_INLINE vf sigmoid(vf v) { return reciprocal(1.0f + exp(-v)); }  // below -88, where it is 6e-39, it stays so
struct Softplus {
  vf value, slope;
};
AUTOHDR_INLINE Softplus softplus(vf v) {  // log(1 + exp(v)), the identity above 20, as in PyTorch; and its derivative, sigmoid(v)
  const vf positive = v > 0.0f ? v : vf{};
  const vf e = exp(v > 0.0f ? -v : v);
  const vf s = e * reciprocal(2.0f + e), s2 = s * s;
  return {v > 20.0f ? v : positive + 2.0f * s * AUTOHDR_ARTANH_BY_S(s2), (v > 0.0f ? splat(1.0f) : e) * reciprocal(1.0f + e)};
}

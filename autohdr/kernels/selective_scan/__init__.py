"""Mamba's selective scan as one op."""

import torch
from torch import Tensor

from autohdr.kernels.common import DTYPES, HALVES, autocast, check_tensors
from autohdr.kernels.selective_scan import declaration

MAX_DSTATE = 256
_SEQUENCE = {"bdl": "[batch, dim, seqlen]", "bld": "[batch, seqlen, dim]"}
_PROJECTION = {"bdl": "[batch, n_groups, dstate, seqlen]", "bld": "[batch, seqlen, n_groups, dstate]"}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    layout: str = "bdl",
    delta_weight: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan: a linear recurrence whose decay and input change with every token, one for each channel and state.

    ``h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t`` and ``y_t = C_t · h_t + D u_t``; the output is ``y_t``, with z ``y_t silu(z_t)``.
    ``Δ = delta + delta_bias``, or ``Δ = delta_weight · delta + delta_bias`` for a rank-one delta; with ``delta_softplus`` its
    softplus (``log(1 + exp(Δ))``, above 20 the identity).

    Saved where a backward pass follows: the inputs and one state in 64 tokens; all else is computed again. A backend takes a
    sequence without a copy where its channels (states for B and C) or its tokens are one element apart, whatever the other
    strides; any other is copied once to a contiguous one.

    Args:
        u: [batch, dim, seqlen], float32, bfloat16, float16 or float64, with at least one token. Under autocast u and z are cast,
            nothing else is: B and C come from projections that autocast has cast already.
        delta: as u, or [batch, 1, seqlen] with delta_weight. delta, B, C and z may each have another of the three narrow dtypes
            than u; float64 goes with a float64 u alone.
        A: [dim, dstate], dstate at most 256. A, D, delta_bias, delta_weight and initial_state may have any floating dtype.
        B: [batch, n_groups, dstate, seqlen] where n_groups divides dim: channel d reads group d // (dim / n_groups); or
            [batch, dstate, seqlen], one group.
        C: as B.
        D: [dim], or None for zero.
        z: as u, or None.
        delta_bias: [dim], or None for zero.
        delta_softplus: whether Δ is passed through softplus.
        reverse: whether the scan runs from the last token to the first. The initial state then lies behind the last token, and
            the last state is the first token's.
        initial_state: [batch, dim, dstate], or None for zero.
        return_last_state: whether to return the state after the scan too.
        layout: "bdl", or "bld" where u, delta, z and the output are [batch, seqlen, dim], a rank-one delta [batch, seqlen, 1], B
            and C [batch, seqlen, n_groups, dstate] or [batch, seqlen, dstate].
        delta_weight: [dim]; makes delta rank one.
        out_dtype: of the output: u's (the default) or float32.
        backend: "auto", "cuda", "triton", "cpu" or "reference". State, Δ and sums are float32 (float64 for float64).

    Returns:
        out, the shape of u; with return_last_state ``(out, last_state)``, last_state [batch, dim, dstate] in float32 (float64 for
        float64). Gradients flow through both.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected.
        RuntimeError: the named backend cannot run here.

    Source: Gu and Dao, Mamba (2023), section 3.2, algorithm 2.
    """
    if layout not in _SEQUENCE:
        raise ValueError(f"selective_scan: layout must be 'bdl' or 'bld', got {layout!r}")
    for name, t in {"u": u, "delta": delta, "A": A, "B": B, "C": C}.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"selective_scan: {name} must be a tensor, got {type(t).__name__}")
    B, C = (t.unsqueeze(1 if layout == "bdl" else 2) if t.dim() == 3 else t for t in (B, C))
    _check_arguments(layout, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_weight)
    u, z = autocast(u), None if z is None else autocast(z)
    if out_dtype not in (None, u.dtype, torch.float32):
        raise ValueError(f"selective_scan: out_dtype must be None, {u.dtype} as u is, or torch.float32, got {out_dtype}")
    flags = (delta_softplus, reverse, layout == "bld", out_dtype == torch.float32)
    tensors = (u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state)
    out, last_state = declaration.selective_scan(*tensors, *flags, backend=backend)
    return (out, last_state) if return_last_state else out


def _check_arguments(layout, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_weight) -> None:
    def refuse(what: str):
        raise ValueError(f"selective_scan: {what}")

    if u.dim() != 3 or u.dtype not in DTYPES or 0 in u.shape[1:]:
        refuse(f"u must be a floating {_SEQUENCE[layout]} with no empty sequence, got {u.dtype} {list(u.shape)}")
    batch, dim, seqlen = u.shape if layout == "bdl" else (u.shape[0], u.shape[2], u.shape[1])
    if A.dim() != 2 or A.shape[0] != dim or not 1 <= A.shape[1] <= MAX_DSTATE:
        refuse(f"A must be [{dim}, dstate] with dstate from 1 to {MAX_DSTATE}, got {list(A.shape)}")
    dstate = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        if t.dim() != 4:
            refuse(f"{name} must be {_PROJECTION[layout]}, got {list(t.shape)}")
        n_groups = t.shape[1 if layout == "bdl" else 2]
        expected = (batch, n_groups, dstate, seqlen) if layout == "bdl" else (batch, seqlen, n_groups, dstate)
        if t.shape != expected:
            refuse(f"{name} must be {_PROJECTION[layout]} with {list(expected)} here, got {list(t.shape)}")
        if n_groups == 0 or dim % n_groups:
            refuse(f"the groups of {name} must divide the {dim} channels, got {n_groups}")
    if B.shape != C.shape:
        refuse(f"C must have the groups of B, {list(B.shape)}, got {list(C.shape)}")
    delta_shape = u.shape
    if delta_weight is not None:
        delta_shape = (batch, 1, seqlen) if layout == "bdl" else (batch, seqlen, 1)
    expected = {
        "delta": (delta, delta_shape),
        "A": (A, A.shape),
        "B": (B, B.shape),
        "C": (C, C.shape),
        "D": (D, (dim,)),
        "z": (z, u.shape),
        "delta_bias": (delta_bias, (dim,)),
        "delta_weight": (delta_weight, (dim,)),
        "initial_state": (initial_state, (batch, dim, dstate)),
    }
    check_tensors("selective_scan", "u", u, expected, ("D", "z", "delta_bias", "delta_weight", "initial_state"))
    for name, t in {"delta": delta, "B": B, "C": C, "z": z}.items():
        if t is not None and t.dtype not in HALVES and t.dtype != u.dtype:
            refuse(f"{name} must be float32, bfloat16 or float16 beside a {u.dtype} u, got {t.dtype}")

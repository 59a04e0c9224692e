"""What code written for mamba-ssm and causal-conv1d calls, under the same names and with the same arguments and defaults.

The full sequences run on this package's ops, on any of their backends. The steps of decoding, one token at a time, are a few
operations of PyTorch's own: they read the state and write it, which no kernel can avoid. ``take_over()`` hands the functions to
code that imports the packages by name, such as transformers.

What the packages have and this has not is refused by name: complex A, seq_idx and cu_seqlens. Gradients flow through last states
and final states too.
"""

import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.causal_conv1d import causal_conv1d
from autohdr.kernels.selective_scan import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """mamba_ssm's selective scan of u, delta and z [batch, dim, seqlen] with A [dim, dstate].

    B and C are [batch, dstate, seqlen] or [batch, n_groups, dstate, seqlen]; or [dim, dstate], the same for all tokens: each
    channel is then a group, which is slower. Returns out, and the last state [batch, dim, dstate] where asked.
    """
    _refuse("selective_scan_fn", A, cu_seqlens=cu_seqlens)
    B, C = _every_token(B, u), _every_token(C, u)
    if B.shape[1] != C.shape[1]:
        B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (B, C))
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """mamba_ssm's Mamba block behind its first projection: xz [batch, 2 · dim, seqlen], u above z, to [batch, seqlen, channels].

    conv1d_weight is [dim, 1, width], x_proj_weight [rank + 2 · dstate, dim], delta_proj_weight [dim, rank]. B and C, where given,
    take the place of the projection's. A weight of b_rms, c_rms, dt_rms norms that part of the projection. checkpoint_lvl changes
    nothing: the ops compute again what they need.
    """
    _refuse("mamba_inner_fn", A)
    rank, dstate = delta_proj_weight.shape[1], A.shape[1]
    u, z = xz.chunk(2, dim=1)
    u = _convolve(u, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    parts = F.linear(u.transpose(1, 2), x_proj_weight)
    dt = _rms_norm(parts[..., :rank], dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B = _projection(parts[..., rank : rank + dstate], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    if C is None:
        C = _projection(parts[..., -dstate:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_conv1d's convolution of x [batch, dim, seqlen] in either memory order by weight [dim, width], x's dtype.

    activation is None, "silu" or "swish"; without one the convolution is PyTorch's own. initial_states [batch, dim, width - 1]
    stand before the first token. Returns y, and where asked the last width - 1 tokens, initial states among them, in
    final_states_out where that is given.
    """
    _check_activation("causal_conv1d_fn", activation)
    _refuse("causal_conv1d_fn", seq_idx=seq_idx)
    before, seqlen = weight.shape[1] - 1, x.shape[2]
    tokens = x if initial_states is None else torch.cat((initial_states.to(x.dtype), x), 2)
    y = _convolve(tokens, weight, bias, activation)[..., -seqlen:]
    if not return_final_states:
        return y
    last = F.pad(tokens, (before, 0))[..., tokens.shape[2] :]
    return y, last if final_states_out is None else final_states_out.copy_(last)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """causal_conv1d's step: the convolution of x, [batch, dim] or [batch, dim, tokens], behind the tokens in conv_state.

    conv_state [batch, dim, state_len], state_len at least width - 1, is written in place: the last tokens, or with cache_seqlens
    [batch], the tokens there were before, a ring that x is written into. With conv_state_indices [batch] it has more rows, and
    these are x's. Returns y, the shape and dtype of x.
    """
    _check_activation("causal_conv1d_update", activation)
    new = x[..., None] if x.dim() == 2 else x
    rows = slice(None) if conv_state_indices is None else conv_state_indices.long()
    state, before, count = conv_state[rows], weight.shape[1] - 1, new.shape[2]
    length = state.shape[2]
    if length < before:
        raise ValueError(f"causal_conv1d_update: conv_state must hold at least {before} tokens, got {list(conv_state.shape)}")
    if cache_seqlens is None:
        tokens = torch.cat((state, new.to(state.dtype)), 2)
        conv_state[rows] = tokens[..., -length:]
    else:

        def places(first: int, end: int) -> Tensor:
            at = torch.arange(first, end, device=x.device) + cache_seqlens[:, None].long()
            return (at % length)[:, None].expand(-1, state.shape[1], -1)

        tokens = torch.cat((state.gather(2, places(-before, 0)), new.to(state.dtype)), 2)
        conv_state[rows] = state.scatter(2, places(max(count - length, 0), count), new[..., -length:].to(state.dtype))
    windows = tokens[..., -(before + count) :].float().unfold(2, before + 1, 1)
    y = (windows * weight.float()[:, None]).sum(-1)
    y = y if bias is None else y + bias.float()[:, None]
    return (y if activation is None else F.silu(y)).to(x.dtype).view(x.shape)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """mamba_ssm's step: one token of the scan, computed in float32, its state written in place.

    state is [batch, dim, dstate], x, dt and z [batch, dim], A [dim, dstate], D and dt_bias [dim], B and C [batch, dstate]; or all
    others have an axis of heads before dim, and B and C are [batch, n_groups, dstate], n_groups a divisor of the heads. With
    state_batch_indices [batch] state has more rows, and these are x's. Returns y, the shape and dtype of x.
    """
    _refuse("selective_state_update", A)
    rows = slice(None) if state_batch_indices is None else state_batch_indices.long()
    heads = x.shape[1] if x.dim() == 3 else 1
    wide = [None if t is None else t.float() for t in (D, z, dt_bias)]
    D, z, dt_bias = (None if t is None else t.reshape(-1, heads, x.shape[-1]) for t in wide)
    u, delta = (t.float().reshape(len(x), heads, -1) for t in (x, dt))
    B, C = (_heads(t.float(), heads) for t in (B, C))
    delta = delta if dt_bias is None else delta + dt_bias
    delta = F.softplus(delta) if dt_softplus else delta
    old = state[rows]
    h = torch.exp(delta[..., None] * A.float()) * old.float().reshape(*u.shape, -1) + (delta * u)[..., None] * B
    state[rows] = h.reshape(old.shape).to(state.dtype)
    y = (h * C).sum(-1)
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z)).to(x.dtype).view(x.shape)


def take_over() -> None:
    """Makes ``import mamba_ssm`` and ``import causal_conv1d`` find these functions from now on, in this process. Code that is
    imported later, as transformers' Mamba is by the first model, calls them."""
    places = {
        "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update),
        "mamba_ssm": (selective_scan_fn, mamba_inner_fn),
        "mamba_ssm.ops": (),
        "mamba_ssm.ops.selective_scan_interface": (selective_scan_fn, mamba_inner_fn),
        "mamba_ssm.ops.triton": (),
        "mamba_ssm.ops.triton.selective_state_update": (selective_state_update,),
    }
    for name, functions in places.items():
        module = sys.modules[name] = ModuleType(name, f"{name}'s functions, by autohdr.kernels.compat")
        module.__path__ = []
        for function in functions:
            setattr(module, function.__name__, function)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _refuse(function: str, A: Tensor | None = None, **unknown: Tensor | None) -> None:
    if A is not None and A.is_complex():
        raise ValueError(f"{function}: A must be real, got {A.dtype}: there are no complex states here")
    for name, value in unknown.items():
        if value is not None:
            raise ValueError(
                f"{function}: {name} must be None: packed sequences are not implemented, call it once for each of them"
            )


def _check_activation(function: str, activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{function}: activation must be None, 'silu' or 'swish', got {activation!r}")


def _every_token(projection: Tensor, u: Tensor) -> Tensor:
    """B or C as [batch, n_groups, dstate, seqlen], of one that is constant a view."""
    if projection.dim() == 2:
        return projection[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    return projection[:, None] if projection.dim() == 3 else projection


def _projection(part: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float) -> Tensor:
    """B or C [batch, dstate, seqlen] from its columns of x_proj's output."""
    part = part if bias is None else part + bias.to(part.dtype)
    return _rms_norm(part, rms_weight, eps).transpose(1, 2)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if activation is None:
        y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)).to(weight.dtype), weight[:, None], bias, groups=len(weight))
        return y.to(x.dtype)
    if x.stride(1) == 1:
        return causal_conv1d(x.transpose(1, 2), weight, bias, layout="bld").transpose(1, 2)
    return causal_conv1d(x, weight, bias)


def _heads(projection: Tensor, heads: int) -> Tensor:
    """B or C as [batch, heads, 1, dstate]."""
    groups = projection.reshape(len(projection), -1, projection.shape[-1])
    return groups.repeat_interleave(heads // groups.shape[1], 1)[:, :, None]

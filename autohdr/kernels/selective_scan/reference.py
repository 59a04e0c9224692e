"""selective_scan in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    channel_last: bool,
    float_out: bool,
) -> tuple[Tensor, Tensor]:
    """B and C with their axis of groups. Returns out and the last state."""
    out_dtype, wide = torch.float32 if float_out else u.dtype, torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (t.to(wide) for t in (u, delta, A, B, C))
    D, z, delta_bias, delta_weight, initial_state = (
        None if t is None else t.to(wide) for t in (D, z, delta_bias, delta_weight, initial_state)
    )
    if not channel_last:  # every sequence as [batch, seqlen, ...]
        u, delta = (rearrange(t, "b d l -> b l d") for t in (u, delta))
        z = None if z is None else rearrange(z, "b d l -> b l d")
        B, C = (rearrange(t, "b g n l -> b l g n") for t in (B, C))
    if delta_weight is not None:
        delta = delta * delta_weight
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)  # the identity above 20
    channels_per_group = u.shape[2] // B.shape[2]
    B, C = (repeat(t, "b l g n -> b l (g r) n", r=channels_per_group) for t in (B, C))

    batch, seqlen, dim = u.shape
    if torch.compiler.is_exporting() and isinstance(seqlen, torch.SymInt):
        raise RuntimeError("selective_scan: backend 'reference' is a loop, which can't be exported for any seqlen")
    state = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state
    steps = list(zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True))
    outputs = []
    for u_t, delta_t, B_t, C_t in reversed(steps) if reverse else steps:
        state = torch.exp(delta_t[..., None] * A) * state + (delta_t * u_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs[::-1] if reverse else outputs, 1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return (y if channel_last else rearrange(y, "b l d -> b d l")).to(out_dtype), state

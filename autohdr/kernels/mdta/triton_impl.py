"""mdta in Triton; what it shares with gdfn is in autohdr/kernels/image.

Forward, two passes over the image, a step at a time: norm statistics, 1×1 to q and k, and 3×3 and Gram matrix in one; norm
statistics, 1×1 to v, and 3×3, project_out · attention (one matrix an image) and residual in one. Backward: a pass for the
gradient of that matrix, which needs v alone, some small matrices in double, and a pass for everything else, which needs q and k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.image.expansion import Expansion, ExpansionBackward, Hidden
from autohdr.kernels.image.product import outer, product, slots_of
from autohdr.kernels.image.repack import round_up
from autohdr.kernels.image.steps import BACKWARD_BUDGET, FORWARD_BUDGET, Buffer, Steps
from autohdr.kernels.image.view import View

LEAST_LENGTH = 1e-12  # that q and k are divided by


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight
    gram, q_square, k_square = statistics(x, *parameters, num_heads, eps, 0, x.shape[2])
    small = gram.float(), q_square.sqrt().float(), k_square.sqrt().float()
    return apply(x, *parameters, *small, num_heads, eps), *small


def statistics(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    num_heads: int,
    eps: float,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    from_, two = View.of(x), 2 * channels
    expansion = Expansion(from_, norm_weight, norm_bias, qkv_weight[:two], dwconv_weight[:two], 2 * num_heads, eps)
    size, padded = expansion.groups.size, expansion.groups.padded
    part = num_heads * padded
    steps = Steps(from_, expansion.channels * x.element_size(), 1, FORWARD_BUDGET, num_heads, range(first, end))
    memory = Hidden(expansion, steps, 1)
    slots = slots_of(padded, padded, steps.images * num_heads, steps.rows * x.shape[3])
    gram = torch.zeros((slots, batch * num_heads, padded, padded), dtype=torch.float32, device=x.device)
    squares = torch.zeros((2, slots, batch * num_heads, padded), dtype=torch.float32, device=x.device)
    for images, rows in steps:
        own, (hidden, _) = slice(images.start * num_heads, images.stop * num_heads), memory.of(images, rows)
        q, k = hidden.at(rows).channels(0, part), hidden.at(rows).channels(part, 2 * part)
        taps = expansion.taps, expansion.taps[:, part:]
        outer(q, k, gram[:, own], kinds=("conv", "conv"), taps=taps, heads=num_heads, squares=tuple(squares[:, :, own]))
    gram = gram.sum(0, dtype=torch.float64).view(batch, num_heads, padded, padded)[..., :size, :size]
    squares = squares.sum(1, dtype=torch.float64)[..., :size].reshape(2, batch, channels)
    return gram.contiguous(), squares[0], squares[1].clone()


def apply(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    y = torch.empty_like(x)
    from_, to = View.of(x), View.of(y)
    expansion = _value_expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, num_heads, eps)
    small = _Attention(gram, q_norm, k_norm, temperature, project_out_weight)
    combined = F.pad(small.combined, (0, expansion.groups.padding)).flatten(2).to(x.dtype)[:, None]
    steps = Steps(from_, expansion.channels * x.element_size(), 1, FORWARD_BUDGET)
    memory = Hidden(expansion, steps, 1)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        here, there = from_.at(rows, images), to.at(rows, images)
        product(hidden.at(rows), combined[images], there, kind="conv", taps=expansion.taps, added=here, add="plain")
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x)
    from_, back, to = View.of(x), View.of(dy), View.of(dx)
    small = _Attention(gram, q_norm, k_norm, temperature, project_out_weight)
    d_combined = _combined_grad(from_, back, norm_weight, norm_bias, qkv_weight, dwconv_weight, num_heads, eps)
    to_q, q_scale, to_k, k_scale, d_temperature, d_project_out = small.backward(d_combined, one_pixel=from_.place.pixels == 1)

    expansion, channels = Expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps), x.shape[1]
    pad, part = expansion.groups.padding, num_heads * expansion.groups.padded
    to_q, q_scale = _scaled(F.pad(to_q, (0, pad, 0, pad)), F.pad(q_scale, (0, pad)), x.dtype)
    to_k, k_scale = _scaled(F.pad(to_k, (0, pad, 0, pad)), F.pad(k_scale, (0, pad)), x.dtype)
    to_v = F.pad(small.combined, (0, pad, 0, 0, 0, round_up(channels) - channels)).flatten(2).transpose(1, 2)
    to_v = to_v.to(x.dtype).contiguous()[:, None]

    steps = Steps(from_, 3 * expansion.channels * x.element_size() + 4 * channels, 2, BACKWARD_BUDGET, num_heads)
    memory, d_memory = Hidden(expansion, steps, 2), Buffer(steps, expansion.channels, 1, x.dtype)
    expansion_backward = ExpansionBackward(expansion, steps)
    q_taps, k_taps = expansion.taps, expansion.taps[:, part:]
    for images, rows in steps:
        near, (hidden, norm) = steps.around(rows, 1), memory.of(images, rows)
        d = d_memory.view(images, near)
        q, k = hidden.at(near).channels(0, part), hidden.at(near).channels(part, 2 * part)
        dq, dk, dv = (d.channels(i * part, (i + 1) * part) for i in range(3))
        conv = {"kind": "conv", "add": "conv", "split": True}
        product(k, to_q[images], dq, **conv, taps=k_taps, added=q, added_taps=q_taps, scale=q_scale[images])
        product(q, to_k[images], dk, **conv, taps=q_taps, added=k, added_taps=k_taps, scale=k_scale[images])
        product(back.at(near, images), to_v[images], dv)
        expansion_backward.step(from_.at(rows, images), back.at(rows, images), to.at(rows, images), hidden, d, norm, images)
    gradients = expansion_backward.finish(qkv_weight, dwconv_weight)
    d_project_out = d_project_out.float().contiguous().view_as(project_out_weight)
    return dx, *gradients, d_temperature.float().view_as(temperature), d_project_out


def _value_expansion(
    x: View, norm_weight: Tensor, norm_bias: Tensor | None, qkv_weight: Tensor, dwconv_weight: Tensor, num_heads: int, eps: float
) -> Expansion:
    """That makes v alone."""
    two = 2 * x.data.shape[3]
    return Expansion(x, norm_weight, norm_bias, qkv_weight[two:], dwconv_weight[two:], num_heads, eps)


def _combined_grad(x: View, dy: View, *parameters) -> Tensor:
    """The gradient of every image's project_out · blockdiag(attention), Σ dy vᵀ: double [batch, channels, num_heads, size]."""
    expansion, (batch, _, width, channels) = _value_expansion(x, *parameters), x.data.shape
    steps = Steps(x, expansion.channels * x.data.element_size(), 1, FORWARD_BUDGET)
    memory = Hidden(expansion, steps, 1)
    slots = slots_of(channels, expansion.channels, steps.images, steps.rows * width)
    sums = torch.zeros((slots, batch, channels, expansion.channels), dtype=torch.float32, device=x.data.device)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        outer(dy.at(rows, images), hidden.at(rows), sums[:, images], kinds=("plain", "conv"), taps=(None, expansion.taps))
    return sums.sum(0, dtype=torch.float64).unflatten(2, (expansion.groups.count, -1))[..., : expansion.groups.size]


def _scaled(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """matrix [..., n, k] in dtype, its rows' largest elements made 1 for float16's sake, and what rounding left; and [..., 2, n]:
    what the rows' products are to be multiplied by, and `scale`. The product and q or k times that nearly cancel."""
    top = matrix.abs().amax(-1).clamp_min(1e-30)
    matrix = matrix / top[..., None]
    rounded = matrix.to(dtype)
    return torch.cat([rounded, (matrix - rounded).to(dtype)], -1), torch.stack([top, scale], 2).float()


class _Attention:
    """The small matrices of every image, in double: they are few, and the gradient takes differences of nearly equal ones."""

    def __init__(self, gram: Tensor, q_norm: Tensor, k_norm: Tensor, temperature: Tensor, project_out_weight: Tensor):
        heads = gram.shape[1]
        self.q_norm, self.k_norm = (n.unflatten(1, (heads, -1)) for n in (q_norm, k_norm))
        self.q, self.k = (n.clamp_min(LEAST_LENGTH).double() for n in (self.q_norm, self.k_norm))
        self.temperature = temperature.double()
        self.cosine = gram.double() / (self.q[..., :, None] * self.k[..., None, :])
        self.attention = torch.softmax(self.cosine * self.temperature, -1)
        self.project_out = project_out_weight[:, :, 0, 0].double().unflatten(1, (heads, -1))
        self.combined = torch.einsum("ohi,bhij->bohj", self.project_out, self.attention)
        """project_out · blockdiag(attention) [batch, channels, heads, size]"""

    def backward(self, d_combined: Tensor, one_pixel: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """to_q, q_scale, to_k and k_scale, [batch, heads, size, size] and [batch, heads, size]: dq = to_q k + q_scale q, and dk =
        to_k q + k_scale k; the gradients of temperature and of project_out."""
        d_project_out = torch.einsum("bohj,bhij->ohi", d_combined, self.attention)
        d_attention = torch.einsum("bohj,ohi->bhij", d_combined, self.project_out)
        d_score = self.attention * (d_attention - (d_attention * self.attention).sum(-1, keepdim=True))
        d_cosine = d_score * self.temperature
        through = d_cosine * self.cosine
        d_gram = d_cosine / (self.q[..., :, None] * self.k[..., None, :])
        q = _through_length(d_gram, through.sum(3) / self.q.square(), self.q_norm, one_pixel)
        k = _through_length(d_gram.transpose(2, 3), through.sum(2) / self.k.square(), self.k_norm, one_pixel)
        return *q, *k, (d_score * self.cosine).sum((0, 2, 3)), d_project_out


def _through_length(d_gram: Tensor, along: Tensor, norm: Tensor, one_pixel: bool) -> tuple[Tensor, Tensor]:
    """to_q and q_scale of vectors q of the lengths `norm`, given the gradient of q kᵀ and what it has along q.

    A q shorter than LEAST_LENGTH is divided by a constant, and its gradient is not orthogonal to it. A longer q of one pixel
    becomes ±1, whatever it was. Its gradient is 0 then; to_q k and q_scale q, which cancel, would leave their rounding, divided
    by q's length, as short as that may be.
    """
    normalised = norm >= LEAST_LENGTH
    if one_pixel:
        d_gram = d_gram.masked_fill(normalised[..., None], 0)
        along = torch.zeros_like(along)
    return d_gram, -along.masked_fill(~normalised, 0)

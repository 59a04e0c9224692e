"""mdta in Triton; what it shares with gdfn is in autohdr/kernels/image.

Forward, two passes over the image, a step at a time: norm and 1×1 to q and k, 3×3, Gram matrix; norm and 1×1 to v, 3×3,
project_out · attention (one matrix an image) and residual. Backward: a pass for the gradient of that matrix, which needs v alone,
some small matrices in double, and a pass for everything else, which needs q and k.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.depthwise import convolve
from autohdr.kernels.image.expansion import Expansion, ExpansionBackward, Hidden
from autohdr.kernels.image.product import dot, outer, product, slots_of
from autohdr.kernels.image.repack import round_up
from autohdr.kernels.image.steps import BACKWARD_BUDGET, FORWARD_BUDGET, Buffer, Steps
from autohdr.kernels.image.view import View, tile

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
    from_ = View.of(x)
    expansion = Expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps)
    sums = _sums(from_, expansion.part(0, 2 * num_heads), num_heads, range(x.shape[2]))
    batch, channels, size = *x.shape[:2], x.shape[1] // num_heads
    shapes = (batch, num_heads, size, size), (batch, channels), (batch, channels)
    small = tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    combined = _combined(*sums, temperature, project_out_weight, x.dtype, small)
    return _apply(x, expansion.part(2 * num_heads, 3 * num_heads), combined), *small


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
    from_ = View.of(x)
    expansion = Expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps)
    gram, *squares = _sums(from_, expansion.part(0, 2 * num_heads), num_heads, range(first, end))
    size = expansion.groups.size
    gram = gram[..., :size, :size].clone(memory_format=torch.contiguous_format)
    return gram, *(s[..., :size].flatten(1).clone() for s in squares)


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
    expansion = Expansion(View.of(x), norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps)
    combined = _combined(gram, q_norm, k_norm, temperature, project_out_weight, x.dtype)
    return _apply(x, expansion.part(2 * num_heads, 3 * num_heads), combined)


def _sums(x: View, expansion: Expansion, num_heads: int, rows_of_image: range) -> tuple[Tensor, Tensor, Tensor]:
    """q kᵀ [batch, num_heads, padded, padded] and the sums of squares [batch, num_heads, padded] of q and of k over rows: double,
    in one piece of memory."""
    (batch, _, width, _), padded = x.data.shape, expansion.groups.padded
    steps = Steps(x, 2 * expansion.channels * x.data.element_size(), 1, FORWARD_BUDGET, num_heads, rows_of_image)
    memory, convolved = Hidden(expansion, steps, 1), Buffer(steps, expansion.channels, 0, x.data.dtype)
    slots, matrices = slots_of(padded, padded, steps.images * num_heads, steps.rows * width), batch * num_heads
    sums = torch.zeros((slots, matrices * padded * (padded + 2)), dtype=torch.float32, device=x.data.device)

    def parts(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gram, *squares = sums.split([matrices * padded * padded, matrices * padded, matrices * padded], -1)
        return gram.unflatten(-1, (matrices, padded, padded)), *(s.unflatten(-1, (matrices, padded)) for s in squares)

    gram, q_square, k_square = parts(sums)
    for images, rows in steps:
        own, (hidden, _) = slice(images.start * num_heads, images.stop * num_heads), memory.of(images, rows)
        q, k = convolve(hidden.at(rows), expansion.taps, convolved.view(images, rows)).halves
        outer(q, k, gram[:, own], heads=num_heads, squares=(q_square[:, own], k_square[:, own]))
    gram, q_square, k_square = (part.unflatten(0, (batch, num_heads)) for part in parts(sums.sum(0, dtype=torch.float64)))
    return gram, q_square, k_square


def _apply(x: Tensor, expansion: Expansion, combined: Tensor) -> Tensor:
    y = torch.empty_like(x)
    from_, to = View.of(x), View.of(y)
    steps = Steps(from_, 2 * expansion.channels * x.element_size(), 1, FORWARD_BUDGET)
    memory, convolved = Hidden(expansion, steps, 1), Buffer(steps, expansion.channels, 0, x.dtype)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        v = convolve(hidden.at(rows), expansion.taps, convolved.view(images, rows))
        product(v, combined[images], to.at(rows, images), added=from_.at(rows, images), add="plain")
    return y


@triton.jit
def _attend(
    gram,  # [images · heads][pitch][pitch]
    q_norm,  # [images · heads][pitch], the lengths of q; squared, where `small` is to be written
    k_norm,
    small,  # gram, q_norm and k_norm, float32 without padding; or None
    temperature,  # [heads]
    project_out,  # [channels][channels]
    combined,  # [images][channels][heads · padded]
    channels,
    heads,
    size,
    pitch,
    padded,
    least,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BS: tl.constexpr,
):
    """combined = project_out · attention, for a head of an image and BM channels."""
    image, head, out = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.arange(0, BS)
    has, own, to_small = column < size, tl.program_id(0) * pitch, tl.program_id(0) * size
    k = tl.load(k_norm + own + column, mask=has, other=1.0)
    if small is not None:
        k = tl.sqrt(k).to(tl.float32)
        tl.store(small[2] + to_small + column, k, mask=has)
    k = tl.maximum(k, least)
    scale = tl.load(temperature + head)
    sums = tl.zeros([BM, BS], tl.float32)
    for start in range(0, size, BI):
        row = start + tl.arange(0, BI)
        there = (row < size)[:, None] & has[None, :]
        q = tl.load(q_norm + own + row, mask=row < size, other=1.0)
        score = tl.load(gram + (own + row[:, None]) * pitch + column[None, :], mask=there, other=0.0).to(tl.float32)
        if small is not None:  # each program of a head writes the same
            q = tl.sqrt(q).to(tl.float32)
            tl.store(small[1] + to_small + row, q, mask=row < size)
            tl.store(small[0] + (to_small + row[:, None]) * size + column[None, :], score, mask=there)
        q = tl.maximum(q, least)
        score = tl.where(has[None, :], score / q[:, None] / k[None, :] * scale, float("-inf"))
        score = tl.exp(score - tl.max(score, 1)[:, None])
        attention = score / tl.sum(score, 1)[:, None]
        at = project_out + out[:, None] * channels + head * size + row[None, :]
        left = tl.load(at, mask=(out < channels)[:, None] & (row < size)[None, :], other=0.0)
        sums = dot(left, attention, sums)
    to = combined + ((image * channels + out[:, None]) * heads + head) * padded + column[None, :]
    tl.store(to, sums, mask=(out < channels)[:, None] & (column < padded)[None, :])


def _combined(
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    dtype: torch.dtype,
    small: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Every image's project_out · blockdiag(attention) [batch, 1, channels, num_heads · padded], as product takes it. With
    `small` q_norm and k_norm are squares, and it gets the first three arguments without padding, the squares' roots."""
    (batch, heads, pitch, _), channels = gram.shape, project_out_weight.shape[0]
    size = channels // heads
    padded, bs = round_up(size), tile(size, 1 << 20)
    combined = torch.empty((batch, 1, channels, heads * padded), dtype=dtype, device=gram.device)
    _attend[batch * heads, triton.cdiv(channels, 16)](
        gram,
        q_norm,
        k_norm,
        small,
        temperature,
        project_out_weight,
        combined,
        channels,
        heads,
        size,
        pitch,
        padded,
        LEAST_LENGTH,
        BM=16,  # many programs: all of them wait
        BI=16,
        BS=bs,
        num_warps=min(max(bs // 16, 4), 16),
        enable_fp_fusion=True,
    )
    return combined


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
    expansion, channels = Expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps), x.shape[1]
    d_combined = _combined_grad(from_, back, expansion.part(2 * num_heads, 3 * num_heads))
    to_q, q_scale, to_k, k_scale, d_temperature, d_project_out = small.backward(d_combined, one_pixel=from_.place.pixels == 1)

    pad, part = expansion.groups.padding, num_heads * expansion.groups.padded
    to_q, q_scale = _scaled(F.pad(to_q, (0, pad, 0, pad)), F.pad(q_scale, (0, pad)), x.dtype)
    to_k, k_scale = _scaled(F.pad(to_k, (0, pad, 0, pad)), F.pad(k_scale, (0, pad)), x.dtype)
    to_v = F.pad(small.combined, (0, pad, 0, 0, 0, round_up(channels) - channels)).flatten(2).transpose(1, 2)
    to_v = to_v.to(x.dtype).contiguous()[:, None]

    steps = Steps(from_, (3 * expansion.channels + 2 * part) * x.element_size() + 4 * channels, 2, BACKWARD_BUDGET, num_heads)
    memory, d_memory = Hidden(expansion, steps, 2), Buffer(steps, expansion.channels, 1, x.dtype)
    convolved = Buffer(steps, 2 * part, 1, x.dtype)
    expansion_backward = ExpansionBackward(expansion, steps)
    for images, rows in steps:
        near, (hidden, norm) = steps.around(rows, 1), memory.of(images, rows)
        d = d_memory.view(images, near)
        q, k = convolve(hidden.at(near).channels(0, 2 * part), expansion.taps, convolved.view(images, near)).halves
        dq, dk, dv = (d.channels(i * part, (i + 1) * part) for i in range(3))
        product(k, to_q[images], dq, added=q, add="scaled", scale=q_scale[images], split=True)
        product(q, to_k[images], dk, added=k, add="scaled", scale=k_scale[images], split=True)
        product(back.at(near, images), to_v[images], dv)
        expansion_backward.step(from_.at(rows, images), back.at(rows, images), to.at(rows, images), hidden, d, norm, images)
    gradients = expansion_backward.finish(qkv_weight, dwconv_weight)
    d_project_out = d_project_out.float().contiguous().view_as(project_out_weight)
    return dx, *gradients, d_temperature.float().view_as(temperature), d_project_out


def _combined_grad(x: View, dy: View, expansion: Expansion) -> Tensor:
    """The gradient of every image's project_out · blockdiag(attention), Σ dy vᵀ: double [batch, channels, num_heads, size]."""
    batch, _, width, channels = x.data.shape
    steps = Steps(x, 2 * expansion.channels * x.data.element_size(), 1, FORWARD_BUDGET)
    memory, convolved = Hidden(expansion, steps, 1), Buffer(steps, expansion.channels, 0, x.data.dtype)
    slots = slots_of(channels, expansion.channels, steps.images, steps.rows * width)
    sums = torch.zeros((slots, batch, channels, expansion.channels), dtype=torch.float32, device=x.data.device)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        v = convolve(hidden.at(rows), expansion.taps, convolved.view(images, rows))
        outer(dy.at(rows, images), v, sums[:, images])
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

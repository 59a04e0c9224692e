"""mdta in Triton; what it shares with gdfn is in autohdr/kernels/image.

Forward, two passes over the image, a step at a time: norm and 1×1 to q and k, 3×3, Gram matrix; norm and 1×1 to v, 3×3,
project_out · attention (one matrix an image) and residual. Backward: a pass for the gradient of that matrix, which needs v alone,
some small matrices in double, and a pass for everything else, which needs q and k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.depthwise import convolve
from autohdr.kernels.image.expansion import Expansion, ExpansionBackward, Hidden
from autohdr.kernels.image.product import dot, outer, product, slots_of
from autohdr.kernels.image.repack import Axis, Repack, round_up
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
    expansion = _expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, num_heads, eps)
    sums = _sums(from_, expansion.part(0, 2 * num_heads), num_heads, range(x.shape[2]))
    batch, channels, size = *x.shape[:2], x.shape[1] // num_heads
    shapes = (batch, num_heads, size, size), (batch, channels), (batch, channels)
    small = tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    combined = _combined_like(x, expansion)
    _combined(*sums, temperature, project_out_weight, combined, small)
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
    expansion = _expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, num_heads, eps)
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
    expansion = _expansion(View.of(x), norm_weight, norm_bias, qkv_weight, dwconv_weight, num_heads, eps)
    combined = _combined_like(x, expansion)
    _combined(gram, q_norm, k_norm, temperature, project_out_weight, combined)
    return _apply(x, expansion.part(2 * num_heads, 3 * num_heads), combined)


def _expansion(
    x: View,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    num_heads: int,
    eps: float,
) -> Expansion:
    repack = Repack()
    expansion = Expansion(x, norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps, repack)
    repack.run()
    return expansion


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
        qk = convolved.view(images, rows)
        convolve(hidden.at(rows), expansion.taps, qk)
        q, k = qk.halves
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
        v = convolved.view(images, rows)
        convolve(hidden.at(rows), expansion.taps, v)
        product(v, combined[images], to.at(rows, images), added=from_.at(rows, images), add="plain")
    return y


def _combined_like(x: Tensor, expansion: Expansion) -> Tensor:
    """Memory for every image's combined matrix, as product takes it."""
    heads = expansion.groups.count // 3
    shape = x.shape[0], 1, x.shape[1], heads * expansion.groups.padded
    return torch.empty(shape, dtype=x.dtype, device=x.device)


@triton.jit
def _attend(
    gram,  # [images · heads][pitch][pitch]
    q_norm,  # [images · heads][pitch], the lengths of q; squared, where `small` is to be written
    k_norm,
    small,  # gram, q_norm and k_norm, float32 without padding; or None
    temperature,  # [heads]
    project_out,  # [channels][channels]
    combined,  # [images][channels][heads · padded], so many elements apart
    image_pitch,
    row_pitch,
    column_pitch,
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
    to = combined + image.to(tl.int64) * image_pitch + out[:, None] * row_pitch + (head * padded + column[None, :]) * column_pitch
    tl.store(to, sums, mask=(out < channels)[:, None] & (column < padded)[None, :])


def _combined(
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    combined: Tensor,
    small: tuple[Tensor, ...] | None = None,
) -> None:
    """combined [batch, 1, channels, num_heads · padded] = every image's project_out · blockdiag(attention). With `small` q_norm
    and k_norm are squares, and it gets the first three arguments without padding, the squares' roots."""
    (batch, heads, pitch, _), channels = gram.shape, project_out_weight.shape[0]
    size = channels // heads
    bs = tile(size, 1 << 20)
    _attend[batch * heads, triton.cdiv(channels, 16)](
        gram,
        q_norm,
        k_norm,
        small,
        temperature,
        project_out_weight,
        combined,
        combined.stride(0),
        *combined.stride()[2:],
        channels,
        heads,
        size,
        pitch,
        combined.shape[3] // heads,
        LEAST_LENGTH,
        BM=16,  # many programs: all of them wait
        BI=16,
        BS=bs,
        num_warps=min(max(bs // 16, 4), 16),
        enable_fp_fusion=True,
    )


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
    repack, channels, part = Repack(), x.shape[1], num_heads * round_up(x.shape[1] // num_heads)
    expansion = Expansion(from_, norm_weight, norm_bias, qkv_weight, dwconv_weight, 3 * num_heads, eps, repack)
    # In bytes a pixel: hidden, its convolution's gradient and its own, and q and k.
    steps = Steps(from_, (3 * expansion.channels + 2 * part) * x.element_size() + 4 * channels, 2, BACKWARD_BUDGET, num_heads)
    expansion_backward = ExpansionBackward(expansion, qkv_weight, steps, repack)
    repack.run()

    d_combined = _combined_grad(from_, back, expansion.part(2 * num_heads, 3 * num_heads))
    attention = gram, q_norm, k_norm, temperature, project_out_weight
    to_q, q_scale, to_k, k_scale, d_temperature, d_project_out = _attention_grad(
        d_combined, *attention, x.dtype, from_.place.pixels == 1, repack
    )
    to_v = torch.empty((x.shape[0], 1, part, round_up(channels)), dtype=x.dtype, device=x.device)
    _combined(*attention, to_v.transpose(2, 3)[:, :, :channels])

    memory, d_memory = Hidden(expansion, steps, 2), Buffer(steps, expansion.channels, 1, x.dtype)
    convolved = Buffer(steps, 2 * part, 1, x.dtype)
    for images, rows in steps:
        near, (hidden, norm) = steps.around(rows, 1), memory.of(images, rows)
        d, qk = d_memory.view(images, near), convolved.view(images, near)
        convolve(hidden.at(near).channels(0, 2 * part), expansion.taps, qk)
        q, k = qk.halves
        dq, dk, dv = (d.channels(i * part, (i + 1) * part) for i in range(3))
        product(k, to_q[images], dq, added=q, add="scaled", scale=q_scale[images])
        product(q, to_k[images], dk, added=k, add="scaled", scale=k_scale[images])
        product(back.at(near, images), to_v[images], dv)
        expansion_backward.step(from_.at(rows, images), back.at(rows, images), to.at(rows, images), hidden, d, norm, images)
    gradients = [*expansion_backward.finish(repack), d_temperature, d_project_out]
    repack.run()
    parameters = norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight
    return dx, *(d if p is None else d.view_as(p) for d, p in zip(gradients, parameters, strict=True))


def _combined_grad(x: View, dy: View, expansion: Expansion) -> Tensor:
    """The gradient of every image's project_out · blockdiag(attention), Σ dy vᵀ: [batch, channels, num_heads · padded]."""
    batch, _, width, channels = x.data.shape
    steps = Steps(x, 2 * expansion.channels * x.data.element_size(), 1, FORWARD_BUDGET)
    memory, convolved = Hidden(expansion, steps, 1), Buffer(steps, expansion.channels, 0, x.data.dtype)
    slots = slots_of(channels, expansion.channels, steps.images, steps.rows * width)
    sums = torch.zeros((slots, batch, channels, expansion.channels), dtype=torch.float32, device=x.data.device)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        v = convolved.view(images, rows)
        convolve(hidden.at(rows), expansion.taps, v)
        outer(dy.at(rows, images), v, sums[:, images])
    repack = Repack()
    d_combined = repack.add_up(sums.flatten(2), Axis.plain(batch), Axis.plain(channels * expansion.channels))
    repack.run()
    return d_combined.view(batch, channels, expansion.channels)


@triton.jit
def _attend_backward(
    gram,  # [images · heads][size][size], as d_gram
    q_norm,  # [images · heads][size], the lengths of q
    k_norm,
    temperature,  # [heads]
    d_attention,  # [images · heads][size][padded], as attention
    attention,
    d_gram,  # double
    d_temperature,  # [images][size][heads], double: the share of each row
    heads,
    size,
    padded,
    least,
    BI: tl.constexpr,
    BS: tl.constexpr,
):
    """attention, and the gradients of gram and of temperature, given that of attention. A program owns BI rows of a matrix."""
    matrix, row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI), tl.arange(0, BS)
    has, image, head = column < size, matrix // heads, matrix % heads
    there, own = (row < size)[:, None] & has[None, :], matrix * size
    q = tl.maximum(tl.load(q_norm + own + row, mask=row < size, other=1.0), least).to(tl.float64)
    k = tl.maximum(tl.load(k_norm + own + column, mask=has, other=1.0), least).to(tl.float64)
    scale = tl.load(temperature + head).to(tl.float64)
    lengths, at = q[:, None] * k[None, :], (own + row[:, None]) * size + column[None, :]
    cosine = tl.load(gram + at, mask=there, other=0.0).to(tl.float64) / lengths
    score = tl.where(has[None, :], cosine * scale, float("-inf"))
    score = tl.exp(score - tl.max(score, 1)[:, None])
    score /= tl.sum(score, 1)[:, None]
    at_padded = (own + row[:, None]) * padded + column[None, :]
    tl.store(attention + at_padded, score, mask=(row < size)[:, None] & (column < padded)[None, :])
    d = tl.load(d_attention + at_padded, mask=there, other=0.0).to(tl.float64)
    d_score = score * (d - tl.sum(d * score, 1)[:, None])
    tl.store(d_temperature + (image * size + row) * heads + head, tl.sum(d_score * cosine, 1), mask=row < size)
    tl.store(d_gram + at, d_score * scale / lengths, mask=there)


@triton.jit
def _through_length(
    gram,
    d_gram,
    norm,
    to,
    scale,
    matrix,
    row,
    row_pitch,
    column_pitch,
    size,
    padded,
    least,
    ONE_PIXEL: tl.constexpr,
    BS: tl.constexpr,
):
    """Rows of to, in its dtype and with largest elements of 1 for float16's sake; and of scale what their products are to be
    multiplied by, and what the vectors themselves. The second is of the rows as rounded: where the two terms nearly cancel the
    gradient stays orthogonal to the vector.

    A vector shorter than `least` is divided by a constant, and its gradient is not orthogonal to it. A longer one of one pixel
    becomes ±1, whatever it was. Its gradient is 0 then; the two terms would leave their rounding, divided by its length, as short
    as that may be.
    """
    column, own = tl.arange(0, BS), matrix * size
    length = tl.load(norm + own + row, mask=row < size, other=1.0).to(tl.float64)
    short = length < least
    there = (row < size)[:, None] & (column < size)[None, :]
    if ONE_PIXEL:
        there &= short[:, None]
    at = own * size + row[:, None] * row_pitch + column[None, :] * column_pitch
    d = tl.load(d_gram + at, mask=there, other=0.0)
    top = tl.maximum(tl.max(tl.abs(d), 1).to(tl.float32), 1e-30)
    wide = top.to(tl.float64)
    rounded = (d * (1.0 / wide)[:, None]).to(tl.float32).to(to.dtype.element_ty)
    has, to = row < padded, to + (matrix * padded + row[:, None]) * padded + column[None, :]
    tl.store(to, rounded, mask=has[:, None] & (column < padded)[None, :])
    along = tl.sum(rounded.to(tl.float32).to(tl.float64) * tl.load(gram + at, mask=there, other=0.0).to(tl.float64), 1) * wide
    scale += matrix * 2 * padded + row
    tl.store(scale, top, mask=has)
    tl.store(scale + padded, tl.where(short, 0.0, -along / (length * length)), mask=has)


@triton.jit
def _make_attention_grad(
    gram,  # [images · heads][size][size], as d_gram
    q_norm,  # [images · heads][size], the lengths of q
    k_norm,
    d_gram,
    to_q,  # [images · heads][padded][padded]
    q_scale,  # [images · heads][2][padded]
    to_k,
    k_scale,
    size,
    padded,
    least,
    ONE_PIXEL: tl.constexpr,
    BI: tl.constexpr,
    BS: tl.constexpr,
):
    """dq = to_q k times the first of q_scale, plus q times the second; dk alike. A program owns BI rows of to_q and of to_k."""
    matrix, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * BI + tl.arange(0, BI)
    _through_length(gram, d_gram, q_norm, to_q, q_scale, matrix, row, size, 1, size, padded, least, ONE_PIXEL, BS)
    _through_length(gram, d_gram, k_norm, to_k, k_scale, matrix, row, 1, size, size, padded, least, ONE_PIXEL, BS)


def _attention_grad(
    d_combined: Tensor,
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    dtype: torch.dtype,
    one_pixel: bool,
    repack: Repack,
) -> tuple[Tensor, ...]:
    """to_q and q_scale, to_k and k_scale, [batch, heads, padded, padded] and [batch, heads, 2, padded], as _make_attention_grad
    writes them; and the gradients of temperature and of project_out, which are there once repack has run. Between the products
    these small matrices are double: they are few, and the gradient takes differences of nearly equal ones."""
    (batch, heads, size, _), channels = gram.shape, project_out_weight.shape[0]
    padded, matrices, bs = d_combined.shape[2] // heads, batch * heads, tile(size, 1 << 20)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, *shape), dtype=dtype, device=gram.device)

    # The rows of these matrices are pixels, as the products take them.
    out, d_out = project_out_weight.view(1, 1, channels, channels).expand(batch, -1, -1, -1), d_combined[:, None]
    steps = Steps(View(d_out, 0, 1), 4 * d_out.shape[3], 0, FORWARD_BUDGET, heads)
    d_attention = torch.zeros((1, matrices, size, padded), dtype=torch.float32, device=gram.device)
    for images, _ in steps:
        own = slice(images.start * heads, images.stop * heads)
        outer(View(out[images], 0, 1), View(d_out[images], 0, 1), d_attention[:, own], heads=heads)
    attention, d_gram = empty(heads, size, padded), empty(heads, size, size, dtype=torch.float64)
    d_temperature, d_project_out = empty(size, heads, dtype=torch.float64), empty(1, channels, channels)
    bi = max(1024 // bs, 1)
    settings = {"BI": bi, "BS": bs, "enable_fp_fusion": True}
    lengths = gram, q_norm, k_norm
    more = heads, size, padded, LEAST_LENGTH
    _attend_backward[matrices, triton.cdiv(size, bi)](
        *lengths, temperature, d_attention, attention, d_gram, d_temperature, *more, **settings
    )
    for images, _ in steps:
        product(View(d_out[images], 0, 1), attention[images], View(d_project_out[images], 0, 1))
    to_q, to_k = empty(heads, padded, padded, dtype=dtype), empty(heads, padded, padded, dtype=dtype)
    q_scale, k_scale = empty(heads, 2, padded), empty(heads, 2, padded)
    _make_attention_grad[matrices, triton.cdiv(padded, bi)](
        *lengths, d_gram, to_q, q_scale, to_k, k_scale, size, padded, LEAST_LENGTH, ONE_PIXEL=one_pixel, **settings
    )
    d_temperature = repack.add_up(d_temperature.view(batch * size, 1, heads), Axis.plain(1), Axis.plain(heads))
    return to_q, q_scale, to_k, k_scale, d_temperature, repack.add_up(d_project_out[:, 0], *[Axis.plain(channels)] * 2)

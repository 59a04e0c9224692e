"""Matrix products between pixels and channels: product over the channels, outer over the pixels. An operand may be an image, or
what is computed of it on the way: its norm, or the product of its halves."""

import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image import view
from autohdr.kernels.image.norm import Norm
from autohdr.kernels.image.view import VARYING, Matrix, Place, View, tile

INTERPRETED = tl.constexpr(view.INTERPRETED)
_ROUND = tl.constexpr(256)  # pixels that the tensor cores sum up by themselves


@triton.jit
def dot(a, b, sums):
    """sums + a·b. float32 goes through the tensor cores as three products, which reach its precision but for two bits."""
    if INTERPRETED:  # it would multiply bfloat16's bits as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums, input_precision="tf32x3")


@triton.jit
def load_pixels(image, place, begin, channel, has, row, SIZE: tl.constexpr):
    """SIZE pixels of an image from `begin` on [SIZE, channel]; zeros where there are none."""
    pixel = begin + tl.arange(0, SIZE)
    there = (pixel < place.pixels)[:, None] & has[None, :]
    return tl.load(image + pixel.to(tl.int64)[:, None] * row + channel[None, :], mask=there, other=0.0)


@triton.jit
def halves(image, place, begin, channel, has, row, part, SIZE: tl.constexpr):
    """What a gate multiplies, float32 [SIZE, channel] twice, the second `part` channels on."""
    value = load_pixels(image, place, begin, channel, has, row, SIZE).to(tl.float32)
    return value, load_pixels(image + part, place, begin, channel, has, row, SIZE).to(tl.float32)


@triton.jit
def operand(a, norm, place, image, begin, channel, has, origin, part, KIND: tl.constexpr, SIZE: tl.constexpr):
    """SIZE pixels of an image from `begin` on, channels from `origin` on, as an operand of a product: a itself ("plain"), its
    layer norm ("norm"), or a itself times that `part` channels on ("simple gate")."""
    dtype: tl.constexpr = a.data.dtype.element_ty
    data = a.data + image * a.image + origin
    if KIND == "simple gate":
        value, gate = halves(data, place, begin, channel, has, a.row, part, SIZE)
        return (value * gate).to(dtype)
    else:
        value = load_pixels(data, place, begin, channel, has, a.row, SIZE)
        if KIND == "norm":
            pixel = begin + tl.arange(0, SIZE)
            inside = pixel < place.pixels
            at = image * norm.image + pixel
            shift, factor = tl.load(norm.shift + at, mask=inside, other=0.0), tl.load(norm.factor + at, mask=inside, other=0.0)
            weight = tl.load(norm.weight + channel, mask=has, other=0.0)
            value = (value.to(tl.float32) - shift[:, None]) * factor[:, None] * weight[None, :]
            if norm.bias is not None:
                value += tl.load(norm.bias + channel, mask=has, other=0.0)[None, :]
            value = value.to(dtype)
        return value


@triton.jit(do_not_specialize=VARYING)
def multiply(
    a,  # [images][pixels][a.row], of head h the channels from h · k on
    norm,  # of "norm"
    w,  # [images or 1][heads][n][w.row]
    bias,  # [images or 1][heads][n], or None
    added,  # [images][pixels][added.row]
    scale,  # [images][heads][2][n], of ADDED "scaled"
    out,  # [images][pixels][out.row]
    gated,  # [images][pixels][n], of ADDED "simple gate"
    k,
    n,
    heads,
    part,
    pixels,
    first,
    height,
    width,
    KIND: tl.constexpr,
    ADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[p][n] = Σ_k operand(a)[p][k] w[n][k] + bias[n], and what is ADDED, for every image and head. A program owns BM pixels ×
    BN.

    ADDED: "none", "plain", "scaled" (the sum and what is added, each times a scale), or "simple gate": the sum is the gradient of
    the product of added's halves; out gets the gradients of both, gated the product.
    """
    place = Place(pixels, first, height, width)
    image, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    begin, column = tl.program_id(0) * BM, tl.program_id(1) * BN + tl.arange(0, BN)
    wanted = column < n
    rows = w.data + image * w.image + head * n * w.row
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        channel = start + tl.arange(0, BK)
        has = channel < k
        left = operand(a, norm, place, image, begin, channel, has, head * k, part, KIND, BM)
        at, there = rows + column[None, :] * w.row + channel[:, None], has[:, None] & wanted[None, :]
        sums = dot(left, tl.load(at, mask=there, other=0.0), sums)
    if bias is not None:
        sums += tl.load(bias.data + image * bias.image + head * n + column, mask=wanted, other=0.0)[None, :]

    pixel = begin + tl.arange(0, BM)
    there, row = (pixel < pixels)[:, None] & wanted[None, :], pixel.to(tl.int64)[:, None]
    to = out.data + image * out.image + head * n + row * out.row + column[None, :]
    if ADDED != "none":
        more = added.data + image * added.image + head * n
    if ADDED == "plain" or ADDED == "scaled":
        value = tl.load(more + row * added.row + column[None, :], mask=there, other=0.0).to(tl.float32)
        if ADDED == "scaled":
            scale += (image * heads + head) * 2 * n + column
            sums *= tl.load(scale, mask=wanted, other=0.0)[None, :]
            value *= tl.load(scale + n, mask=wanted, other=0.0)[None, :]
        sums += value
    elif ADDED == "simple gate":
        value, gate = halves(more, place, begin, column, wanted, added.row, part, BM)
        tl.store(gated + (image * pixels + row) * n + column[None, :], value * gate, mask=there)
        tl.store(to + part, sums * value, mask=there)
        sums *= gate
    tl.store(to, sums, mask=there)


def product(
    a: View,
    w: Tensor,
    out: View,
    *,
    kind: str = "plain",
    norm: Norm | None = None,
    bias: Tensor | None = None,
    added: View | None = None,
    add: str = "none",
    scale: Tensor | None = None,
    gated: View | None = None,
) -> None:
    """Launches multiply. a, added, out and gated begin at the same row; w [images or 1, heads, n, at least k], bias [images or 1,
    heads, n]."""
    (images, *_, channels), (_, heads, n, _) = a.data.shape, w.shape
    pixels, *place = a.place
    through_gate = add == "simple gate"
    k, wide = channels // (2 * heads if kind == "simple gate" else heads), a.data.element_size() == 4
    # Tiles as large as the registers hold: a gate behind needs some too.
    broad = n >= 512 and add == "none" and not wide  # there are enough programs, and each loads fewer operands
    bn, bk = tile(n, 256 if broad else 64 if through_gate else 128), tile(k, 32)
    area = 32768 if broad else 2048 if wide and through_gate else 4096 if wide or through_gate else 16384
    bm = min(max(area // max(bn, bk), 64), 128 if bn > 32 else 256)
    multiply[triton.cdiv(pixels, bm), triton.cdiv(n, bn), images * heads](
        a.matrix,
        norm,
        Matrix(w, w.stride(0) if w.shape[0] > 1 else 0, w.stride(2)),
        None if bias is None else Matrix(bias, bias.stride(0) if bias.shape[0] > 1 else 0, 0),
        added and added.matrix,
        scale,
        out.matrix,
        gated and gated.data,
        k,
        n,
        heads,
        n if through_gate else k,
        pixels,
        *place,
        KIND=kind,
        ADDED=add,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=8 if bm * bn > (4096 if wide else 8192) or through_gate else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=VARYING)
def multiply_outer(
    a,  # [images][pixels][a.row], of head h the channels from h · m on
    b,  # [images][pixels][b.row], of head h the channels from h · n on
    norm,  # of "norm"
    sums,  # [slots, sums_slot apart][matrices][m][n]
    a_squares,  # [slots, squares_slot apart][matrices][m], or None
    b_squares,  # [slots, squares_slot apart][matrices][n]
    m,
    n,
    heads,
    sums_slot,
    squares_slot,
    images,  # that a matrix sums over
    pixels,
    first,
    height,
    width,
    A: tl.constexpr,
    B: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """sums[slot][matrix][m][n] += Σ_p operand(a)[p][m] operand(b)[p][n], and the sums of a's and b's squares. A matrix is a head
    of an image, or of all images together. A program owns BM × BN sums over its slot's share of the pixels, a range of them."""
    place = Place(pixels, first, height, width)
    head = tl.program_id(1) % heads
    tiles = tl.cdiv(n, BN)
    row, column = tl.program_id(0) // tiles * BM + tl.arange(0, BM), tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    has_row, has_column = row < m, column < n
    each = tl.cdiv(pixels, BP)
    chunks, slot, slots = each * images, tl.program_id(2), tl.num_programs(2)
    first_chunk = (chunks.to(tl.int64) * slot // slots).to(tl.int32)
    end_chunk = (chunks.to(tl.int64) * (slot + 1) // slots).to(tl.int32)
    total, a_total, b_total = tl.zeros([BM, BN], tl.float32), tl.zeros([BP, BM], tl.float32), tl.zeros([BP, BN], tl.float32)
    for start in range(first_chunk, end_chunk, _ROUND // BP):
        # The tensor cores' sums cut instead of rounding: a long one would drift.
        part = tl.zeros([BM, BN], tl.float32)
        for chunk in range(start, min(start + _ROUND // BP, end_chunk)):
            image, pixel = (tl.program_id(1) // heads + chunk // each).to(tl.int64), chunk % each * BP
            left = operand(a, norm, place, image, pixel, row, has_row, head * m, 0, A, BP)
            right = operand(b, norm, place, image, pixel, column, has_column, head * n, 0, B, BP)
            part = dot(tl.trans(left), right, part)
            if a_squares is not None:
                left, right = left.to(tl.float32), right.to(tl.float32)
                a_total += left * left
                b_total += right * right
        total += part
    matrix, slot = tl.program_id(1).to(tl.int64), slot.to(tl.int64)
    at = sums + slot * sums_slot + (matrix * m + row[:, None]) * n + column[None, :]
    there = has_row[:, None] & has_column[None, :]
    tl.store(at, total + tl.load(at, mask=there, other=0.0), mask=there)
    if a_squares is not None:
        of_a = a_squares + slot * squares_slot + matrix * m + row
        of_b = b_squares + slot * squares_slot + matrix * n + column
        if tl.program_id(0) % tiles == 0:
            tl.store(of_a, tl.sum(a_total, 0) + tl.load(of_a, mask=has_row, other=0.0), mask=has_row)
        if tl.program_id(0) < tiles:
            tl.store(of_b, tl.sum(b_total, 0) + tl.load(of_b, mask=has_column, other=0.0), mask=has_column)


def slots_of(m: int, n: int, matrices: int, pixels: int) -> int:
    """In how many parts a sum of m × n products over the pixels is taken: as many as fill a device, with at most 512 programs of
    64 × 64 sums, but of 256 pixels at least. The same on all devices, so that the results are."""
    programs = triton.cdiv(m, 64) * triton.cdiv(n, 64) * matrices
    return min(max(512 // programs, 1), max(1, min(256, pixels // 256)))


def outer(
    a: View,
    b: View,
    sums: Tensor,
    *,
    kinds: tuple[str, str] = ("plain", "plain"),
    norm: Norm | None = None,
    heads: int = 1,
    squares: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launches multiply_outer. a and b begin at the same row; sums [slots, matrices, m, n], where the matrices are those of every
    image and head, or one that sums over all images; squares [slots, matrices, m] and the same of n."""
    images, (slots, matrices, m, n) = a.data.shape[0], sums.shape
    wide = a.data.element_size() == 4
    bm, bn = tile(m, 64 if wide or squares else 128), tile(n, 64)
    bp = min((2048 if wide else 4096) // max(bm, bn), 128)
    multiply_outer[triton.cdiv(m, bm) * triton.cdiv(n, bn), matrices, slots](
        a.matrix,
        b.matrix,
        norm,
        sums,
        *(squares or (None, None)),
        m,
        n,
        heads,
        sums.stride(0),
        squares[0].stride(0) if squares else 0,
        1 if matrices == images * heads else images,
        *a.place,
        A=kinds[0],
        B=kinds[1],
        BP=bp,
        BM=bm,
        BN=bn,
        num_warps=8 if bm > 64 else 4,
        num_stages=2 if bm > 64 else 3,  # a third takes more registers than there are
        enable_fp_fusion=True,
    )

"""apply_edit in Triton, forward and backward.

A program owns PIXELS of an image, and of a pixel four lanes: its channels, and a 1, by which the last column of a 3×4 matrix is
multiplied; rows of matrices are lanes too. Curves and grid are small enough for the first-level cache. Backward, a program sums
over its pixels what curves and matrix get, knot by knot. What a point of the grid gets, at all of its bins, is summed by others
over the pixels around it. Either leaves its sums in a slot; the slots are added up in order, in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.apply_edit.reference import WHITE

PIXELS = 128  # of a program, or of a step of one
STEPS = 16  # of a program that sums up, where there are so many
MOST_SLOTS = 512  # of an image
SIZES = ["height", "width", "knots", "rows", "columns", "bins", "programs", "steps", "pieces"]
"""Arguments of kernels that are not worth a compilation for every kind of number."""


@triton.jit
def _between(place, last):
    """(the point before, the part of the way to the next), of the points 0 ... last, and beyond; a NaN is part of the first."""
    bounded = tl.where(place > 0.0, tl.minimum(place, tl.maximum(last - 1, 0).to(tl.float32)), 0.0)
    first = bounded.to(tl.int32)
    return first, place - first.to(tl.float32)


@triton.jit
def _between_clamped(place, last):
    """The same, but for what stays at the ends."""
    end = last.to(tl.float32)
    return _between(tl.where(place > 0.0, tl.where(place < end, place, end), 0.0), last)


@triton.jit
def _cell(pixel, pixels, cells):
    return _between_clamped((pixel.to(tl.float32) + 0.5) * cells / pixels - 0.5, cells - 1)


@triton.jit
def _weight(first, part, point):
    """That a point has in the value between two."""
    return tl.where(point == first, 1.0 - part, tl.where(point == first + 1, part, 0.0))


@triton.jit
def _luma(lane):
    """Rec. 709."""
    return tl.where(lane == 0, 0.2126, tl.where(lane == 1, 0.7152, tl.where(lane == 2, 0.0722, 0.0)))


@triton.jit
def _samples(data, pixel, inside):
    """[pixels, 4] in float32, the last lane 0."""
    lane = tl.arange(0, 4)[None, :]
    at = data + pixel[:, None].to(tl.int64) * 3 + lane
    return tl.load(at, mask=inside[:, None] & (lane < 3), other=0).to(tl.float32)


@triton.jit
def _store(data, pixel, inside, v):
    lane = tl.arange(0, 4)[None, :]
    at = data + pixel[:, None].to(tl.int64) * 3 + lane
    tl.store(at, v.to(data.dtype.element_ty), mask=inside[:, None] & (lane < 3))


@triton.jit
def _matrix(at):
    """[4, 4], rows × columns; the last row 0."""
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    return tl.load(at + row * 4 + column, mask=(row < 3) & (column < 4), other=0.0)


@triton.jit
def _tone(x, curves, matrix, knots):
    """What curves and matrix make of pixels: value [pixels, 4] and luma [pixels]; and where the pixels lie between knots, the
    slope there and the curves' values, [pixels, 4]. value and the curves' have a 1 in the last lane."""
    lane = tl.arange(0, 4)[None, :]
    first, part = _between(x * (knots - 1), knots - 1)
    at = curves + lane * knots + first
    lower, upper = tl.load(at, mask=lane < 3, other=0.0), tl.load(at + 1, mask=lane < 3, other=0.0)
    slope = upper - lower
    curved = tl.where(lane < 3, lower + part * slope, 1.0)
    value = tl.sum(matrix[None, :, :] * curved[:, None, :], 2)
    luma = tl.sum(value * _luma(lane), 1)
    return tl.where(lane < 3, value, 1.0), luma, first, part, slope, curved


@triton.jit
def _slice(grid, y, x, luma, height, width, rows, columns, bins):
    """The grid's matrices where pixels are, [pixels, 4, 4], the last row 0: of the bin below their luma and of the next; and the
    part of the way up."""
    down, down_part = _cell(y, height, rows)
    across, across_part = _cell(x, width, columns)
    level, level_part = _between_clamped(luma * (bins - 1), bins - 1)
    row, column = tl.arange(0, 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    low = tl.zeros([x.shape[0], 4, 4], tl.float32)
    high = low
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            weight = (down_part if i else 1.0 - down_part) * (across_part if j else 1.0 - across_part)
            point = tl.minimum(down + i, rows - 1) * columns + tl.minimum(across + j, columns - 1)
            for k in tl.static_range(2):
                at = (point * bins + tl.minimum(level + k, bins - 1)) * 12
                matrix = tl.load(grid + at[:, None, None] + row * 4 + column, mask=(row < 3) & (column < 4), other=0.0)
                if k:
                    high += weight[:, None, None] * matrix
                else:
                    low += weight[:, None, None] * matrix
    return low, high, level_part


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, curves, matrix, grid, y, height, width, knots, rows, columns, bins, programs, WHITE: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    image = (tl.program_id(0) // programs).to(tl.int64)
    pixel = tl.program_id(0) % programs * PIXELS + tl.arange(0, PIXELS)
    inside, start = pixel < height * width, image * height * width * 3
    samples = _samples(x + start, pixel, inside)
    if WHITE > 1:
        samples *= 1.0 / WHITE
    v, luma, _, _, _, _ = _tone(samples, curves + image * 3 * knots, _matrix(matrix + image * 12), knots)
    if grid is not None:
        of_image = grid + image * rows * columns * bins * 12
        low, high, part = _slice(of_image, pixel // width, pixel % width, luma, height, width, rows, columns, bins)
        v = tl.sum((low + part[:, None, None] * (high - low)) * v[:, None, :], 2)
    if WHITE > 1:  # a NaN becomes 0
        v *= WHITE
        v = tl.where(v > 0.0, tl.where(v < WHITE, v + 0.5, WHITE), 0.0)
    _store(y + start, pixel, inside, v)


@triton.jit(do_not_specialize=SIZES)
def _backward_pixels(
    dy, x, curves, matrix, grid, dx, d_curves, d_matrix, height, width, knots, rows, columns, bins, programs, steps,
    KNOTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx; d_curves [programs, batch, 3, knots] and d_matrix [programs, batch, 3, 4]: a program's sums."""
    image, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    start, lane, knot = image * height * width * 3, tl.arange(0, 4)[None, :], tl.arange(0, KNOTS)[:, None]
    of_image, affine = curves + image * 3 * knots, _matrix(matrix + image * 12)
    of_curves, of_matrix = tl.zeros([KNOTS, 4], tl.float32), tl.zeros([4, 4], tl.float32)
    for step in range(program * steps, min(program * steps + steps, tl.cdiv(height * width, PIXELS))):
        pixel = step * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < height * width
        d = _samples(dy + start, pixel, inside)
        value, luma, first, part, slope, curved = _tone(_samples(x + start, pixel, inside), of_image, affine, knots)
        if grid is not None:
            points = grid + image * rows * columns * bins * 12
            low, high, up = _slice(points, pixel // width, pixel % width, luma, height, width, rows, columns, bins)
            change = high - low
            d_luma = tl.sum(tl.sum(change * value[:, None, :], 2) * d, 1) * (bins - 1)
            d_luma = tl.where((luma >= 0.0) & (luma <= 1.0), d_luma, 0.0)
            d_value = tl.sum((low + up[:, None, None] * change) * d[:, :, None], 1)
            d = tl.where(lane < 3, d_value, 0.0) + d_luma[:, None] * _luma(lane)
        of_matrix += tl.sum(d[:, :, None] * curved[:, None, :], 0)
        d_curved = tl.sum(affine[None, :, :] * d[:, :, None], 1)
        for k in range(knots):
            of_curves += tl.where(knot == k, tl.sum(d_curved * _weight(first, part, k), 0)[None, :], 0.0)
        _store(dx + start, pixel, inside, d_curved * slope * (knots - 1))
    slot = program * (tl.num_programs(0) // programs) + image
    tl.store(d_curves + (slot * 3 + lane) * knots + knot, of_curves, mask=(knot < knots) & (lane < 3))
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    tl.store(d_matrix + slot * 12 + row * 4 + column, of_matrix, mask=(row < 3) & (column < 4))


@triton.jit
def _reach(point, cells, pixels):
    """The pixels [first, end) that a point of the grid may have a part in, between the points beside it."""
    cell = pixels / cells
    first = ((point - 0.5) * cell - 0.5).to(tl.int32) - 1
    end = ((point + 1.5) * cell - 0.5).to(tl.int32) + 2
    return tl.where(point == 0, 0, tl.maximum(first, 0)), tl.where(point == cells - 1, pixels, tl.minimum(end, pixels))


@triton.jit(do_not_specialize=SIZES)
def _backward_grid(
    dy, x, curves, matrix, slots, height, width, knots, rows, columns, bins, pieces, BINS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """slots [pieces, batch, rows, columns, bins, 3, 4]: a program sums up at one point, over its piece of the pixels around."""
    piece, point = tl.program_id(0) % pieces, tl.program_id(0) // pieces
    column, row, image = point % columns, point // columns % rows, (point // columns // rows).to(tl.int64)
    top, bottom = _reach(row, rows, height)
    left, right = _reach(column, columns, width)
    across, affine = right - left, _matrix(matrix + image * 12)
    steps = tl.cdiv((bottom - top) * across, PIXELS).to(tl.int64)
    first, end = (steps * piece // pieces).to(tl.int32), (steps * (piece + 1) // pieces).to(tl.int32)
    start, level = image * height * width * 3, tl.arange(0, BINS)
    total = tl.zeros([BINS, 4, 4], tl.float32)
    for step in range(first, end):
        place = step * PIXELS + tl.arange(0, PIXELS)
        down, beside = top + place // across, left + place % across
        inside, pixel = down < bottom, down * width + beside
        value, luma, _, _, _, _ = _tone(_samples(x + start, pixel, inside), curves + image * 3 * knots, affine, knots)
        row_of, row_part = _cell(down, height, rows)
        column_of, column_part = _cell(beside, width, columns)
        level_of, level_part = _between_clamped(luma * (bins - 1), bins - 1)
        weight = _weight(row_of, row_part, row) * _weight(column_of, column_part, column)
        d = _samples(dy + start, pixel, inside) * weight[:, None]
        products = d[:, :, None] * value[:, None, :]
        for k in range(bins):
            of_level = tl.sum(products * _weight(level_of, level_part, k)[:, None, None], 0)
            total += tl.where(level[:, None, None] == k, of_level[None, :, :], 0.0)
    r, c = tl.arange(0, 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    slot = piece.to(tl.int64) * (tl.num_programs(0) // pieces) + point
    at = slots + (slot * bins + level[:, None, None]) * 12 + r * 4 + c
    tl.store(at, total, mask=(level[:, None, None] < bins) & (r < 3) & (c < 4))


def _sizes(x: Tensor, curves: Tensor, grid: Tensor | None) -> tuple[int, ...]:
    """Height, width, knots; and the grid's rows, columns and bins."""
    return *x.shape[2:], curves.shape[2], *((0, 0, 0) if grid is None else grid.shape[1:4])


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def forward(x: Tensor, curves: Tensor, matrix: Tensor, grid: Tensor | None) -> Tensor:
    y = _like(x)
    programs = triton.cdiv(x.shape[2] * x.shape[3], PIXELS)
    if len(x):
        _forward[(len(x) * programs,)](
            x, curves, matrix, grid, y, *_sizes(x, curves, grid), programs, WHITE.get(x.dtype, 1), PIXELS, enable_fp_fusion=True
        )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, curves: Tensor, matrix: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, sizes, batch = _like(x), _sizes(x, curves, grid), len(x)
    all_steps = triton.cdiv(x.shape[2] * x.shape[3], PIXELS)
    steps = max(STEPS, triton.cdiv(all_steps, MOST_SLOTS))
    programs = triton.cdiv(all_steps, steps)
    d_curves, d_matrix = curves.new_empty((programs, *curves.shape)), matrix.new_empty((programs, *matrix.shape))
    if batch:
        _backward_pixels[(batch * programs,)](
            dy, x, curves, matrix, grid, dx, d_curves, d_matrix, *sizes, programs, steps,
            triton.next_power_of_2(curves.shape[2]), PIXELS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    sums = [t.sum(0, dtype=torch.float64).float() for t in (d_curves, d_matrix)]
    if grid is None:
        return dx, *sums, curves.new_empty((0,))
    around = 4 * x.shape[2] * x.shape[3] // (grid.shape[1] * grid.shape[2])  # pixels of a point, about
    pieces = min(max(around // (PIXELS * STEPS), 1), 64)
    slots = grid.new_empty((pieces, *grid.shape))
    if batch:
        _backward_grid[(slots.shape[:4].numel(),)](
            dy, x, curves, matrix, slots, *sizes, pieces, triton.next_power_of_2(grid.shape[3]), PIXELS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dx, *sums, slots.sum(0, dtype=torch.float64).float()

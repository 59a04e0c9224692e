import math

import pytest
import torch
from backend import BACKEND, DEVICE, DTYPES, INTERPRETED, OPCHECKS, SLOW, raw_op
from calls import threads
from gold import assert_as_good_as_reference, run
from torch import library

from autohdr.kernels import OPS, apply_edit

SHAPES = [  # batch, height, width, knots, and the grid's rows, columns and bins
    (2, 5, 7, 10),
    (1, 70, 33, 2),
    (2, 3, 5, 4, 4, 2, 3),
    (1, 41, 30, 3, 2, 3, 2),
    (1, 9, 4, 5, 1, 1, 1),
    (2, 3, 1, 4, 1, 5, 2),
    (1, 1, 1, 10, 2, 3, 1),
    (1, 4, 300, 40, 2, 3, 6),
]
SMALL, PLAIN, LARGE = (2, 4, 3, 5, 1, 2, 4), (2, 4, 3, 5), (2, 70, 90, 10, 8, 8, 4)
FEW = PLAIN if SLOW else SMALL  # where an op is called often
FLOATS = [name for name, dtype in DTYPES.items() if dtype in OPS["apply_edit"][BACKEND]]
CASES = [
    pytest.param(shape, DTYPES[name], id=f"{shape}-{name}")
    for i, shape in enumerate(SHAPES)
    for j, name in enumerate(FLOATS)
    if not INTERPRETED or j == i % 3 and shape[2] < 100  # every shape in one dtype
]


def arguments(shape, dtype=torch.float32):
    """(x, curves, matrix and grid, the gradient of y): an edit that is as far from none as a strong one, of an image that leaves
    [0, 1] here and there."""
    batch, height, width, knots, *cells = shape
    g = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.rand(*size, generator=g)

    x = (rand(batch, 3, height, width) * 1.3 - 0.1).to(dtype)
    curves = torch.linspace(0, 1, knots) ** 0.6 + 0.1 * rand(batch, 3, knots)
    affine = torch.eye(3, 4)
    matrix = affine + 0.3 * rand(batch, 3, 4) - 0.1
    grid = affine + 0.3 * rand(batch, *cells, 3, 4) - 0.1 if cells else None
    tensors = [x, curves, matrix, *([grid] if cells else [])]
    return [t.to(DEVICE) for t in tensors], (rand(batch, 3, height, width) - 0.5).to(dtype).to(DEVICE)


def call(shape):
    tensors, dy = arguments(shape)
    return lambda *t, backend=BACKEND: apply_edit(*t, backend=backend), tensors, dy


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_backward(shape, dtype, isa):
    tensors, dy = arguments(shape, dtype)
    reference, actual = (run(apply_edit, tensors, dy, backend=b) for b in ("reference", BACKEND))
    gold = run(apply_edit, [t.double() for t in tensors], dy.double(), backend="reference")
    assert_as_good_as_reference(actual, reference, gold, dtype, math.prod(shape[:3]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("shape", [SMALL, PLAIN, (1, 3, 300, 10, 3, 4, 2)], ids=str)
def test_integers_forward(shape, dtype, isa):
    """A photo's own samples: as its floats, rounded and clipped. A tie may go either way."""
    (x, *edit), _ = arguments(shape)
    white = torch.iinfo(dtype).max
    samples = (x.clamp(0, 1) * white).round().to(dtype)
    exact = apply_edit(samples.double() / white, *edit) * white
    for backend in ("reference", BACKEND):
        y = apply_edit(samples, *edit, backend=backend)
        assert y.dtype == dtype and y.shape == x.shape
        assert (y.double() - exact.clamp(0, white)).abs().max() <= 0.5 + white * 1e-6
    assert (exact > white).any() and (y == white).any()


def test_definition():
    """The reference against the formula, pixel by pixel."""
    (x, curves, matrix, grid), _ = arguments((1, 6, 5, 4, 2, 3, 2), torch.float64)
    y = apply_edit(x, curves, matrix, grid, backend="reference")

    def curve(knots, value):
        cell = min(max(int(value * 3 // 1), 0), 2)
        return knots[cell] + (value * 3 - cell) * (knots[cell + 1] - knots[cell])

    def weight(point, place, count):
        return max(0.0, 1 - abs(min(max(place, 0), count - 1) - point))

    for i in range(6):
        for j in range(5):
            toned = torch.tensor(
                [curve(curves[0, c].tolist(), x[0, c, i, j].item()) for c in range(3)] + [1], dtype=torch.float64
            )
            m = matrix[0].double() @ toned
            luma = 0.2126 * m[0] + 0.7152 * m[1] + 0.0722 * m[2]
            affine = torch.zeros(3, 4, dtype=torch.float64)
            for row in range(2):
                for column in range(3):
                    for level in range(2):
                        near = weight(row, (i + 0.5) / 6 * 2 - 0.5, 2) * weight(column, (j + 0.5) / 5 * 3 - 0.5, 3)
                        affine += near * weight(level, luma.item(), 2) * grid[0, row, column, level]
            torch.testing.assert_close(y[0, :, i, j], affine @ torch.cat([m, m.new_ones(1)]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_identity(dtype):
    samples = torch.arange(3 * 256).view(1, 3, 16, 16).to(torch.int32).remainder(256).to(dtype)
    x = samples if dtype != torch.float32 else samples / 255
    identity = torch.linspace(0, 1, 10).expand(1, 3, 10), torch.eye(3, 4)[None], torch.eye(3, 4).expand(1, 8, 8, 4, 3, 4)
    for backend in ("reference", BACKEND):
        torch.testing.assert_close(apply_edit(x, *identity, backend=backend).double(), x.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [SMALL, PLAIN], ids=str)
def test_a_pixel_that_is_not_finite_harms_no_other(shape, value):
    (x, *edit), _ = arguments(shape)
    expected = apply_edit(x, *edit, backend=BACKEND)
    x[0, 1, 2, 1] = value
    for backend in ("reference", BACKEND):
        y = apply_edit(x, *edit, backend=backend)
        assert not y[0, :, 2, 1].isfinite().any()
        y[0, :, 2, 1] = expected[0, :, 2, 1]
        torch.testing.assert_close(y, expected)


def test_gradcheck():
    tensors, _ = arguments((1, 3, 2, 4, 2, 2, 3), torch.float64)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: apply_edit(*t, backend="reference"), leaves)


@pytest.mark.parametrize("shape", [FEW, PLAIN][SLOW:], ids=str)
def test_opcheck(shape):
    tensors, _ = arguments(shape)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in tensors]
    library.opcheck(raw_op("apply_edit"), (*leaves, *[None] * (4 - len(leaves))), test_utils=OPCHECKS)


def test_compile_fullgraph():
    tensors, dy = arguments(FEW)
    compiled = torch.compile(apply_edit, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, tensors, dy), run(apply_edit, tensors, dy), strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(BACKEND != "cpu", reason="threads of the CPU")
def test_threads():
    """The same bits at any number of threads: each piece of rows has its own sums, which are added up in order."""
    tensors, dy = arguments(LARGE)
    results = []
    for n in (1, 2, 5):
        with threads(n):
            results.append(run(apply_edit, tensors, dy, backend=BACKEND))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_noncontiguous():
    """And where pixels do not lie on 16 bytes."""
    tensors, dy = arguments((2, 4, 19, *FEW[3:]))
    expected = run(apply_edit, tensors, dy, backend=BACKEND)
    x, *others = tensors
    lasts = x.movedim(1, -1)
    layouts = [lasts.contiguous(), torch.cat([x[:1, 0, 0, :1].flatten(), lasts.flatten()])[1:].view_as(lasts)]
    layouts = [torch.cat([x, x], 3)[..., : x.shape[3]], *(layout.movedim(-1, 1) for layout in layouts)]
    for layout in layouts:
        moved = [layout, *(torch.stack([t, t], -1)[..., 0] for t in others)]
        for a, e in zip(run(apply_edit, moved, dy, backend=BACKEND), expected, strict=True):
            assert torch.equal(a, e)


def test_autocast_casts_floating_x_alone():
    (x, *edit), _ = arguments(SMALL)
    for backend in (BACKEND, "reference"):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = apply_edit(x, *edit, backend=backend)
            assert apply_edit((x.clamp(0, 1) * 255).to(torch.uint8), *edit, backend=backend).dtype == torch.uint8
        assert torch.equal(y, apply_edit(x.bfloat16(), *edit, backend=backend)) and y.dtype == torch.bfloat16


@pytest.mark.skipif(BACKEND != "cuda", reason="the others take any size")
@pytest.mark.parametrize("shape", [(1, 1, 1, 40000), (1, 1, 1, 2, 1, 64, 32)], ids=str)
def test_an_edit_larger_than_shared_memory_raises(shape):
    tensors, _ = arguments(shape)
    with pytest.raises(RuntimeError, match="too large for the CUDA kernels, .* at most .*, got .* knots, .* bins"):
        apply_edit(*tensors, backend=BACKEND)


def test_empty_batch():
    tensors, _ = arguments(SMALL)
    leaves = [t[:0].requires_grad_() for t in tensors]
    y = apply_edit(*leaves, backend=BACKEND)
    assert y.shape == (0, *tensors[0].shape[1:])
    assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (
            0,
            torch.zeros(2, 4, 4, 3),
            r"x must be floating, uint8 or uint16 \[batch, 3, height, width\].*got torch.float32 \[2, 4, 4, 3\]",
        ),
        (0, torch.zeros(2, 3, 0, 3), "x must be .* no empty image"),
        (0, torch.zeros(2, 3, 4, 3, dtype=torch.int32), "x must be .* got torch.int32"),
        (0, [1.0], "x must be .* got list"),
        (1, torch.zeros(2, 3, 1), r"curves must be \[batch, 3, knots\] with at least 2 knots, got \[2, 3, 1\]"),
        (1, torch.zeros(1, 3, 5), r"curves must be \[2, 3, 5\], got \[1, 3, 5\]"),
        (2, None, r"matrix must be a tensor \[2, 3, 4\], got NoneType"),
        (2, torch.zeros(2, 3, 3), r"matrix must be \[2, 3, 4\], got \[2, 3, 3\]"),
        (3, torch.zeros(2, 0, 3, 4, 3, 4), "grid must have rows, columns and bins"),
        (3, torch.zeros(2, 2, 3, 4, 12), r"grid must be \[2, 0, 0, 0, 3, 4\], got \[2, 2, 3, 4, 12\]"),
        (3, torch.zeros(2, 2, 3, 4, 3, 4, dtype=torch.int32), "grid must be floating, got torch.int32"),
    ],
)
def test_rejects_arguments(index, value, message):
    tensors, _ = arguments(SMALL)
    tensors[index] = value
    with pytest.raises(ValueError, match=f"apply_edit: {message}"):
        apply_edit(*tensors)

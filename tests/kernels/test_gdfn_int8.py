import math

import pytest
import torch
import torch.nn.functional as F
from calls import image_call
from image_op import double
from int8_op import Int8OpTests
from torch import library

from autohdr.kernels import gdfn_int8
from autohdr.kernels.common import layer_norm

SHAPES = [  # batch, channels, hidden channels, height, width, norm bias
    (1, 48, 127, 12, 20, True),
    (2, 48, 127, 37, 29, False),
    (1, 96, 255, 9, 70, True),
    (1, 24, 63, 8, 200, True),
    (2, 10, 17, 5, 7, True),
    (1, 32, 85, 1, 1, True),
    (1, 6, 5, 1, 250, False),
    (1, 7, 33, 63, 2, True),
    (1, 192, 510, 6, 6, True),
]
SMALL, PLAIN = (2, 6, 5, 4, 3, True), (2, 6, 5, 4, 3, False)


def arguments(shape, dtype=torch.float32):
    """Of codes with a standard deviation of 40 behind the norm, some of which are cut off, and of about 20 behind the gate."""
    b, c, hidden, h, w, bias = shape
    g = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=g)

    def codes(*size):
        return torch.randint(-127, 128, (*size, 1, 1), generator=g, dtype=torch.int8)

    dwconv = randn(2 * hidden, 1, 3, 3) / 3
    dwconv[hidden:] *= 20
    return [
        (randn(b, c, h, w) + 0.5).to(dtype),
        40 * (1 + 0.2 * randn(c)),
        8 * randn(c) if bias else None,
        codes(2 * hidden, c),
        (1 + 0.2 * randn(2 * hidden)) / (40 * 73 * c**0.5),
        dwconv,
        codes(c, hidden),
        (1 + 0.2 * randn(c)) / (20 * 73 * hidden**0.5),
    ]


def call(shape):
    return image_call(TestGdfnInt8, shape)


class TestGdfnInt8(Int8OpTests):
    name, op = "gdfn_int8", staticmethod(gdfn_int8)
    small, second = SMALL, 21

    @staticmethod
    def arguments(shape, dtype):
        tensors = arguments(shape, dtype)
        return tensors, torch.randn_like(tensors[0]), {}


def undecided(tensors):
    """The pixels of y, [batch, height, width], of which a code, or one around them, is so near the middle between two that
    rounding in float32 can make it either."""
    x, weight, bias, project_in, scale, dwconv, *_ = double(tensors)
    normal = layer_norm(x, weight, bias, 1e-6)
    hidden = F.conv2d(normal.round().clamp(-127, 127), project_in.double()) * scale[:, None, None]
    a, b = F.conv2d(hidden, dwconv, padding=1, groups=len(dwconv)).chunk(2, 1)
    near, gate = (((v - v.floor() - 0.5).abs() < 2e-4).any(1, keepdim=True).double() for v in (normal, F.gelu(a) * b))
    return (F.max_pool2d(near, 3, 1, 1) + gate)[:, 0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_forward(shape, dtype, int8_isa):
    tensors = arguments(shape, dtype)
    x, gold = tensors[0], gdfn_int8(*double(tensors))
    decided = ~undecided(tensors)
    assert decided.sum() > 0.3 * decided.numel()
    for backend in ("cpu", "reference"):
        y = gdfn_int8(*tensors, backend=backend)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        error = (y.double() - gold).abs().movedim(1, -1)
        rounding = 16 * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
        assert error[decided].max() < rounding * gold.abs().max()
        assert error.max() < 0.2  # a code more or less


def test_definition():
    """The reference against the equations, written out."""
    x, weight, bias, project_in, scale_in, dw, project_out, scale_out = double(arguments((1, 4, 5, 3, 6, True)))

    def codes(values):
        return values.round().clamp(-127, 127)

    norm = (x[0] - x[0].mean(0)) / (x[0].var(0, unbiased=False) + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]
    hidden = torch.zeros(10, 5, 8, dtype=torch.float64)
    hidden[:, 1:-1, 1:-1] = torch.einsum("o,oc,chw->ohw", scale_in, project_in[:, :, 0, 0].double(), codes(norm))
    conv = sum(dw[:, 0, i, j, None, None] * hidden[:, i : i + 3, j : j + 6] for i in range(3) for j in range(3))
    a, b = conv.split(5)
    gate = codes(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))) * b)
    expected = x[0] + torch.einsum("o,oc,chw->ohw", scale_out, project_out[:, :, 0, 0].double(), gate)
    actual = gdfn_int8(x, weight, bias, project_in, scale_in, dw, project_out, scale_out)
    torch.testing.assert_close(actual[0], expected)


def test_largest_codes(int8_isa):
    """All of them 127 or -127: no sum of products is cut off on its way."""
    x, weight, bias, project_in, scale, dwconv, project_out, scale_out = arguments((1, 96, 255, 4, 5, True))
    project_in[:], project_out[::2], project_out[1::2] = 127, 127, -127
    weight[:], bias[:] = 1e-3, 1000
    dwconv[:], scale[:] = 1, 1e-6
    dwconv[255:] = 1000
    tensors = x, weight, bias, project_in, scale, dwconv, project_out, scale_out
    changed = gdfn_int8(*double(tensors)) - x
    torch.testing.assert_close(changed.abs().amax((0, 2, 3)).float(), 255 * 127 * 127 * scale_out)
    torch.testing.assert_close(gdfn_int8(*tensors, backend="cpu") - x, changed.float(), rtol=1e-5, atol=1e-4)


def test_opcheck():
    tensors = arguments(SMALL)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    library.opcheck(torch.ops.autohdr.gdfn_int8.default, (*tensors, 1e-6))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(8, 6, 5), "x must be a floating .*, got torch.float32"),
        (3, torch.zeros(10, 6, 1, 1), "project_in_weight must be int8, got torch.float32"),
        (4, torch.zeros(9), r"project_in_scale must be \[10\], got \[9\]"),
        (4, torch.zeros(10, dtype=torch.int8), "project_in_scale must be floating, got torch.int8"),
        (6, torch.zeros(6, 0, 1, 1, dtype=torch.int8), r"project_in_weight must be \[0, 6, 1, 1\]"),
        (7, torch.zeros(5), r"project_out_scale must be \[6\], got \[5\]"),
    ],
)
def test_rejects_arguments(index, value, message):
    tensors = arguments(SMALL)
    tensors[index] = value
    with pytest.raises(ValueError, match=f"gdfn_int8: {message}"):
        gdfn_int8(*tensors)

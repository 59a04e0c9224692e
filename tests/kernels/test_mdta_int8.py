import pytest
import torch
import torch.nn.functional as F
from calls import image_call
from image_op import double
from int8_op import Int8OpTests
from torch import library

from autohdr.kernels import mdta_int8, mdta_int8_apply, mdta_int8_statistics
from autohdr.kernels.common import layer_norm

SHAPES = [  # batch, channels, heads, height, width, norm bias
    (1, 48, 1, 12, 20, True),
    (2, 48, 1, 37, 29, False),
    (1, 96, 2, 9, 70, True),
    (1, 96, 1, 8, 200, True),
    (2, 10, 2, 5, 7, True),
    (1, 24, 1, 1, 1, True),
    (1, 6, 3, 1, 250, False),
    (1, 7, 1, 63, 2, True),
    (1, 192, 4, 6, 6, True),
    (1, 112, 1, 4, 9, False),
    (1, 48, 4, 6, 13, True),
    (2, 40, 2, 9, 11, False),
]
SMALL, PLAIN = (2, 6, 2, 4, 3, True), (2, 6, 2, 4, 3, False)


def near_the_middle(values, margin):
    """Whether rounding in float32 can make either of two codes of it."""
    return (values - values.floor() - 0.5).abs() < margin


def arguments(shape, dtype=torch.float32):
    """Of codes with a standard deviation of 40, some of which are cut off, behind the norm and of v. Behind the norm none is near
    the middle between two: those of all pixels are in q kᵀ."""
    b, c, heads, h, w, bias = shape
    g = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=g)

    x, weight, shift = (randn(b, c, h, w) + 0.5).to(dtype), 40 * (1 + 0.2 * randn(c)), 8 * randn(c) if bias else None
    while (undecided := near_the_middle(normal(x, weight, shift), 2e-4).any(1, keepdim=True)).any():
        x = torch.where(undecided, (randn(b, c, h, w) + 0.5).to(dtype), x)
    dwconv = randn(3 * c, 1, 3, 3) / 3
    dwconv[2 * c :] *= 40
    return [
        x,
        weight,
        shift,
        torch.randint(-127, 128, (3 * c, c, 1, 1), generator=g, dtype=torch.int8),
        (1 + 0.2 * randn(3 * c)) / (40 * 73 * c**0.5),
        dwconv,
        1 + 0.3 * randn(heads, 1, 1),
        randn(c, c, 1, 1) / c**0.5,
        (1 + 0.2 * randn(c)) / 40,
    ]


def normal(x, weight, bias):
    return layer_norm(x.double(), *(None if t is None else t.double() for t in (weight, bias)), 1e-6)


def call(shape):
    return image_call(TestMdtaInt8, shape)


class TestMdtaInt8(Int8OpTests):
    name, op = "mdta_int8", staticmethod(mdta_int8)
    small, second = SMALL, 2

    @staticmethod
    def arguments(shape, dtype):
        tensors = arguments(shape, dtype)
        return tensors, torch.randn_like(tensors[0]), {"num_heads": shape[2]}


def definition(tensors, heads):
    """The equations, written out: v and M of each image before they become codes, and y."""
    x, weight, bias, qkv, scale, dwconv, temperature, out, v_scale = double(tensors)
    hidden = F.conv2d(normal(x, weight, bias).round().clamp(-127, 127), qkv.double()) * scale[:, None, None]
    q, k, v = F.conv2d(hidden, dwconv, padding=1, groups=len(dwconv)).flatten(2).chunk(3, 1)
    size, rows, combined, y = len(out) // heads, [], [], []
    for b in range(len(x)):
        blocks = []
        for h in range(heads):
            mine = slice(h * size, (h + 1) * size)
            cosine = F.normalize(q[b, mine], dim=1, eps=1e-12) @ F.normalize(k[b, mine], dim=1, eps=1e-12).T
            blocks.append(torch.softmax(temperature[h, 0, 0] * cosine, 1))
        combined.append(out[:, :, 0, 0] @ torch.block_diag(*blocks) * v_scale)
        rows.append(combined[-1].abs().amax(1, keepdim=True) / 127)
        codes = (combined[-1] / rows[-1]).round()
        y.append(x[b] + (rows[-1] * (codes @ v[b].round().clamp(-127, 127))).view_as(x[b]))
    return v.view_as(x), torch.stack(combined) / torch.stack(rows), torch.stack(y)


def test_definition():
    tensors = double(arguments((2, 8, 2, 3, 6, True)))
    torch.testing.assert_close(mdta_int8(*tensors, 2), definition(tensors, 2)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_forward(shape, dtype, int8_isa):
    tensors, heads = arguments(shape, dtype), shape[2]
    x, (v, combined, gold) = tensors[0], definition(tensors, heads)
    decided = ~(near_the_middle(v, 2e-4).any(1, keepdim=True) | near_the_middle(combined, 5e-4).any(2)[:, :, None, None])
    assert decided.sum() > 0.3 * decided.numel()
    for backend in ("cpu", "reference"):
        y = mdta_int8(*tensors, heads, backend=backend)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        error = (y.double() - gold).abs()
        rounding = 16 * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
        assert error[decided].max() < rounding * gold.abs().max()
        assert error.max() < 0.2  # a code more or less


@pytest.mark.parametrize("shape", [(2, 10, 2, 12, 7, True), (1, 48, 1, 17, 21, False)], ids=str)
def test_passes(shape, int8_isa):
    """Sums of strips are the image's, and what is made of these strip by strip is the whole."""
    (x, *parameters), heads, height = arguments(shape), shape[2], shape[3]
    gold = mdta_int8_statistics(x.double(), double(parameters), heads, 0, height)
    whole = mdta_int8(x, *parameters, heads, backend="cpu")
    for rows in (1, 5, 64):
        strips = [(y, min(y + rows, height), max(y - 1, 0), min(y + rows + 1, height)) for y in range(0, height, rows)]
        sums = [
            mdta_int8_statistics(x[:, :, above:below], parameters, heads, y - above, end - above, backend="cpu")
            for y, end, above, below in strips
        ]
        for actual, expected in zip(map(sum, zip(*sums, strict=True)), gold, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        statistics = mdta_int8_statistics(x, parameters, heads, 0, height, backend="cpu")
        for y, end, above, below in strips:
            out = mdta_int8_apply(x[:, :, above:below], parameters, heads, statistics, backend="cpu")
            assert torch.equal(out[:, :, y - above : end - above], whole[:, :, y:end])


def test_largest_codes(int8_isa):
    """All of them 127 or -127: no sum of products is cut off on its way."""
    tensors = arguments((1, 96, 2, 4, 5, True))
    x, weight, bias, qkv, scale, dwconv, _, out, v_scale = tensors
    qkv[:], out[::2], out[1::2] = 127, 1, -1
    weight[:], bias[:] = 1e-3, 1000
    dwconv[:], scale[:], v_scale[:] = 1, 1e-6, 1e-3
    dwconv[192:] = 1000
    changed = mdta_int8(*double(tensors), 2) - x
    torch.testing.assert_close(changed.abs().float(), torch.full_like(x, 96 * 127 * 1e-3))
    torch.testing.assert_close(mdta_int8(*tensors, 2, backend="cpu") - x, changed.float(), rtol=1e-5, atol=1e-4)


def test_nothing_to_attend_to():
    """A row of zeros has a scale too."""
    tensors = arguments(SMALL)
    tensors[7][1] = 0
    for backend in ("cpu", "reference"):
        y = mdta_int8(*tensors, 2, backend=backend)
        assert torch.equal(y[:, 1], tensors[0][:, 1]) and y.isfinite().all()


def test_opcheck():
    x, *parameters = arguments(SMALL)
    x = x.contiguous(memory_format=torch.channels_last)
    gram, q_square, k_square = mdta_int8_statistics(x, parameters, 2, 0, 4)
    ops, last = torch.ops.autohdr, (2, 1e-6)
    library.opcheck(ops.mdta_int8.default, (x, *parameters, *last))
    library.opcheck(ops.mdta_int8_statistics.default, (x, *parameters, *last, 1, 3))
    library.opcheck(ops.mdta_int8_apply.default, (x, *parameters, gram.float(), q_square.float(), k_square.float(), *last))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(8, 6, 5), "x must be a floating .*, got torch.float32"),
        (3, torch.zeros(18, 6, 1, 1), "qkv_weight must be int8, got torch.float32"),
        (4, torch.zeros(9), r"qkv_scale must be \[18\], got \[9\]"),
        (4, torch.zeros(18, dtype=torch.int8), "qkv_scale must be floating, got torch.int8"),
        (7, torch.zeros(6, 6, 1, 1, dtype=torch.int8), "project_out_weight must be floating, got torch.int8"),
        (8, torch.zeros(5), r"v_scale must be \[6\], got \[5\]"),
        (6, torch.zeros(4, 1, 1), r"temperature must be \[2, 1, 1\], got \[4, 1, 1\]"),
    ],
)
def test_rejects_arguments(index, value, message):
    tensors = arguments(SMALL)
    tensors[index] = value
    with pytest.raises(ValueError, match=f"mdta_int8: {message}"):
        mdta_int8(*tensors, 2)


def test_passes_reject_arguments():
    x, *parameters = arguments(SMALL)
    statistics = mdta_int8_statistics(x, parameters, 2, 0, 4)
    with pytest.raises(ValueError, match=r"mdta_int8_statistics: parameters must be norm_weight, .*, v_scale, got 7 of them"):
        mdta_int8_statistics(x, parameters[:7], 2, 0, 4)
    with pytest.raises(ValueError, match="mdta_int8_statistics: first and end .* has 4, got 3 and 3"):
        mdta_int8_statistics(x, parameters, 2, 3, 3)
    with pytest.raises(ValueError, match="mdta_int8_apply: statistics must be the three tensors of mdta_int8_statistics, got 2"):
        mdta_int8_apply(x, parameters, 2, statistics[:2])

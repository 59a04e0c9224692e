"""Padding, and the half-precision convolutions that a CPU computes in float32."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from autohdr.kernels.backends import as_on_a_gpu
from autohdr.measure import _reset_high_water_mark, measure
from autohdr.models import layers
from autohdr.models.layers import Conv2d, ConvTranspose2d, Linear, add_pointwise, crop, pad_to_multiple, pointwise


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_padding_is_the_same_when_compiled(monkeypatch, multiple):
    """By index where it may not branch on the size, by PyTorch's own padding elsewhere."""
    for height in range(1, 20):
        for width in range(1, 20):
            image = torch.rand(2, 3, height, width)
            expected = pad_to_multiple(image, multiple)
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                assert torch.equal(pad_to_multiple(image, multiple), expected)
                assert torch.equal(crop(expected, height, width), image)


CONVOLUTIONS = {
    "3x3": lambda: Conv2d(6, 10, 3, padding=1, bias=False),
    "bias": lambda: Conv2d(3, 8, 3, padding=1),
    "1x1": lambda: Conv2d(6, 4, 1),
    "depthwise": lambda: Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "down": lambda: Conv2d(6, 12, 4, stride=2, padding=1),
    "up": lambda: ConvTranspose2d(6, 4, 4, stride=2, padding=1),
    "grouped up": lambda: ConvTranspose2d(6, 4, 4, stride=2, padding=1, groups=2),
}


@pytest.fixture(params=CONVOLUTIONS)
def conv(request):
    torch.manual_seed(0)
    return CONVOLUTIONS[request.param]()


def results(conv, x, factor):
    """The output, and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    y = conv(x)
    return y, *torch.autograd.grad((y.float() * factor).sum(), [x, *conv.parameters()])


@pytest.mark.parametrize("rows", [1, 3, 100], ids=lambda n: f"{n} rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("size", [(12, 10), (2, 4), (14, 2)], ids=str)
def test_half_precision_is_float32_rounded_once(monkeypatch, conv, dtype, rows, size):
    """Where it is cut into strips of so many rows, too."""
    monkeypatch.setattr(layers, "_strips", lambda a, b, w: [(y, min(y + rows, a.shape[2])) for y in range(0, a.shape[2], rows)])
    conv = conv.to(dtype)
    x = torch.rand(2, conv.in_channels, *size).to(dtype)
    wide = copy.deepcopy(conv).float()
    factor = torch.rand(wide(x.float()).shape).to(dtype).float()
    for actual, exact in zip(results(conv, x, factor), results(wide, x.float(), factor), strict=True):
        assert actual.dtype == dtype
        error, rounding = ((t.float() - exact).square().mean().sqrt() for t in (actual, exact.to(dtype)))
        assert error <= 1.05 * rounding + 1e-6 * exact.abs().max()


def test_a_pointwise_convolution_is_conv2d():
    torch.manual_seed(0)
    x, weight, bias = torch.rand(2, 6, 5, 7), torch.rand(4, 6, 1, 1), torch.rand(4)
    assert torch.equal(pointwise(x, weight, bias), F.conv2d(x, weight, bias))
    half = [t.bfloat16() for t in (x, weight, bias)]
    assert torch.equal(pointwise(*half), F.conv2d(*(t.float() for t in half)).bfloat16())


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_pointwise_convolution_is_added_in_place(on_a_gpu, layout):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 7, generator=g).contiguous(memory_format=layout).requires_grad_()
    skip = torch.randn(2, 4, 5, 7, generator=g).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(6, 4, 1, 1, generator=g).requires_grad_()
    expected = 2 * x + F.conv2d(skip, weight)
    with as_on_a_gpu() if on_a_gpu else nullcontext():
        there = 2 * x
        actual = add_pointwise(there, skip, weight)
    assert actual.data_ptr() == there.data_ptr() and actual.stride() == x.stride()
    torch.testing.assert_close(actual, expected)
    dy = torch.randn(expected.shape, generator=g)
    grads = (torch.autograd.grad(y, (x, skip, weight), dy) for y in (actual, expected))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4, 3, 5), (0, 5)], ids=str)
def test_a_linear_layer_in_half_precision_is_float32_rounded_once(shape):
    torch.manual_seed(0)
    layer, x = Linear(5, 7).bfloat16(), torch.rand(shape).bfloat16()
    wide = copy.deepcopy(layer).float()
    factor = torch.rand(*shape[:-1], 7).bfloat16().float()
    for actual, exact in zip(results(layer, x, factor), results(wide, x.float(), factor), strict=True):
        assert actual.dtype == torch.bfloat16 and actual.shape == exact.shape
        torch.testing.assert_close(actual.float(), exact, rtol=2**-8, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.float()).dtype == torch.bfloat16


def test_autocast_rounds_the_output_alone(conv):
    x = torch.rand(2, conv.in_channels, 6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, conv.forward(x))
        y.sum().backward()
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(y, conv(x).bfloat16())
    assert x.grad.dtype == torch.float32 and conv.weight.grad.dtype == torch.float32


def test_second_derivatives_are_right():
    torch.manual_seed(0)
    conv, x = Conv2d(2, 3, 3, padding=1).bfloat16(), torch.rand(1, 2, 5, 4).bfloat16()
    found = []
    for layer, image in ((conv, x), (copy.deepcopy(conv).float(), x.float())):
        image.requires_grad_()
        (first,) = torch.autograd.grad(layer(image).float().square().sum(), image, create_graph=True)
        found.append(torch.autograd.grad(first.float().square().sum(), layer.weight)[0].float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)], ids=str)
def test_one_row_and_one_column(size):
    conv, x = Conv2d(3, 4, 3, padding=1).bfloat16(), torch.rand(1, 3, *size).bfloat16()
    assert torch.equal(conv(x), copy.deepcopy(conv).float()(x.float()).bfloat16())


@pytest.mark.skipif(not _reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
def test_half_precision_takes_strips_beside_its_images():
    conv, x = Conv2d(16, 16, 3, padding=1), torch.rand(1, 16, 1024, 1024, dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        conv(x[..., :64, :64])
        with measure() as measured:
            y = conv(x)
    assert measured.growth_bytes < y.nbytes + 12 * layers.STRIP_BYTES < 2 * y.nbytes

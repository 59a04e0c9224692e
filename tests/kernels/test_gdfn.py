import math

import pytest
import torch
import torch.nn.functional as F
from backend import BACKEND, DEVICE, INTERPRETED, SLOW
from calls import image_call
from image_op import IN_TF32, KeepingOpTests, case, cases, draws, fused_in_tf32

from autohdr.kernels import gdfn
from autohdr.kernels.common import WIDE, layer_norm

SHAPES = {  # batch, channels, hidden channels, height, width, norm bias
    "cpu": [
        (1, 48, 127, 12, 20, True),
        (2, 48, 127, 37, 29, False),
        (1, 96, 255, 9, 70, True),
        (1, 24, 63, 8, 200, True),
        (2, 10, 17, 5, 7, True),
        (1, 32, 85, 1, 1, True),
        (1, 6, 5, 1, 250, False),
        (1, 7, 33, 63, 2, True),
        (1, 192, 510, 6, 6, True),
        (1, 32, 208, 5, 7, True),  # ten panels: a product's depth goes in pieces, the last of which is short
        (1, 256, 90, 3, 200, True),
        (2, 264, 130, 6, 3, False),
    ],
    "slow": [
        (1, 48, 127, 11, 13, True),
        (2, 27, 37, 5, 7, True),
        (1, 16, 32, 17, 30, True),  # neither is padded
        (1, 32, 85, 1, 1, True),
        (1, 30, 21, 1, 250, False),
        (1, 23, 33, 63, 2, True),
        (2, 96, 37, 9, 17, False),
        (1, 400, 9, 2, 3, True),  # a layer norm reads a pixel more than once: in half precision from 776 channels on
        (1, 776, 9, 2, 2, True),
    ],
    "gpu": [
        (1, 48, 127, 150, 201, True),
        (2, 96, 255, 64, 64, False),
        (1, 192, 510, 40, 70, True),
        (1, 384, 1021, 29, 31, True),
        (2, 27, 37, 5, 7, True),
        (1, 48, 96, 15, 17, True),  # neither is padded
        (1, 32, 85, 1, 1, True),
        (1, 30, 21, 1, 1250, False),
        (1, 23, 33, 630, 2, True),
    ],
}
# One kernel makes these in TF32, by tiles of 16 × 12 or 16 × 8 pixels: one and several, rounds that the last is short of.
FUSED = [(2, 96, 37, 13, 17, False), (1, 52, 65, 12, 33, True), (1, 48, 32, 17, 16, True), (2, 20, 9, 1, 18, False)]
CASES = cases(SHAPES["slow" if SLOW else "cpu" if BACKEND == "cpu" else "gpu"], ("B", "C", "hidden", "H", "W"))


SMALL, PLAIN, LARGE = (2, 6, 5, 4, 3, True), (2, 6, 5, 4, 3, False), (2, 96, 255, 37, 29, True)


def call(shape):
    return image_call(TestGdfn, shape)


class TestGdfn(KeepingOpTests):
    name = "gdfn"
    op = staticmethod(gdfn)
    small = (2, 8, 21, 6, 5, True)
    middle = (1, 48, 127, 11, 13, True)
    wide = (2, WIDE, 90, 9, 7, True)
    channels = (10, 21)

    @staticmethod
    def arguments(shape, dtype):
        b, c, hidden, h, w, bias = shape
        g = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(*size, generator=g).to(DEVICE)

        tensors = [
            (randn(b, c, h, w) + 0.5).to(dtype),
            1 + 0.2 * randn(c),
            0.2 * randn(c) if bias else None,
            randn(2 * hidden, c, 1, 1) / c**0.5,
            randn(2 * hidden, 1, 3, 3) / 3,
            randn(c, hidden, 1, 1) / hidden**0.5,
        ]
        return tensors, randn(b, c, h, w).to(dtype), {}

    @staticmethod
    def saved_bytes(shape):
        b, c, hidden, h, w, _ = shape
        return 4 * b * (c + (2 * hidden if DEVICE == "cpu" and c >= WIDE else 0)) * h * w  # x, and what is kept of it

    @pytest.mark.parametrize(("shape", "dtype"), CASES)
    def test_forward_and_backward(self, shape, dtype, isa):
        self.check(*case(type(self), shape, None, dtype))

    def test_definition(self):
        """The reference against the equations, written out with the exact gelu."""
        (x, weight, bias, project_in, dw, project_out), _, _ = self.arguments((1, 4, 5, 3, 6, True), torch.float64)
        weight, bias = weight.double(), bias.double()
        project_in, dw, project_out = project_in[:, :, 0, 0].double(), dw[:, 0].double(), project_out[:, :, 0, 0].double()
        norm = (x[0] - x[0].mean(0)) / (x[0].var(0, unbiased=False) + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]
        hidden = torch.zeros(10, 5, 8, dtype=torch.float64, device=DEVICE)
        hidden[:, 1:-1, 1:-1] = torch.einsum("oc,chw->ohw", project_in, norm)
        conv = sum(dw[:, i, j, None, None] * hidden[:, i : i + 3, j : j + 6] for i in range(3) for j in range(3))
        a, b = conv.split(5)
        gate = a * 0.5 * (1 + torch.erf(a / math.sqrt(2))) * b
        expected = x[0] + torch.einsum("oc,chw->ohw", project_out, gate)
        actual = gdfn(x, weight, bias, project_in[:, :, None, None], dw[:, None], project_out[:, :, None, None])
        torch.testing.assert_close(actual[0], expected)

    @pytest.mark.parametrize("most", [0.5, 3, 9])
    def test_gate_all_over_its_range(self, most, isa):
        """Where a is from -most to most and b is 1: what few values reach of a table or a polynomial may be wrong as well."""
        c = 16 if SLOW else 256
        x = torch.randn(1, c, 3, 3, generator=torch.Generator().manual_seed(0)).double().to(DEVICE) / 1000
        normal = layer_norm(x.float().double(), torch.ones(c, device=DEVICE).double(), None, 0)[0, :, 1, 1]
        a = torch.linspace(-most, most, c, device=DEVICE, dtype=torch.float64)
        project_in = torch.cat([(a / normal).diag(), (1 / normal).diag()])[:, :, None, None]
        dwconv = torch.zeros(2 * c, 1, 3, 3, device=DEVICE)
        dwconv[:, :, 1, 1] = 1
        project_out = torch.eye(c, device=DEVICE)[:, :, None, None]
        y = gdfn(x.float(), torch.ones(c, device=DEVICE), None, project_in.float(), dwconv, project_out, eps=0.0, backend=BACKEND)
        gate = (y.double() - x.float())[0, :, 1, 1]
        assert ((gate - F.gelu(a)).abs() <= 4e-7 * (1 + a.abs())).all()

    def test_long_sums(self):
        """Large and far from zero in every pixel: a running sum in float32 would go astray by percents."""
        side = 32 if SLOW else 640
        tensors, dy, keywords = self.arguments((1, 4, 5, side, side, True), torch.float32)
        tensors[0], dy = 3 + 0.01 * tensors[0], 1 + 0.01 * dy
        self.check((tensors, dy, keywords), draws(self.op, tensors, dy, keywords))

    def test_many_channels(self):
        """Whose sums over the pixels do not fit the shared memory that a GPU gives a block."""
        tensors, dy, keywords = self.arguments((1, 1600, 3, 1, 2, True), torch.float32)
        self.check((tensors, dy, keywords), draws(self.op, tensors, dy, keywords))

    def test_nan_stays_in_its_neighbourhood(self):
        tensors, _, _ = self.arguments((1, 8, 21, 7, 9, True), torch.float32)
        tensors[0].view(torch.int32)[0, 3, 2, 4] = 0x7FFFFFFF  # as a GPU computes it
        nan = gdfn(*tensors, backend=BACKEND).isnan()[0]
        assert nan[:, 1:4, 3:6].all() and nan.sum() == 8 * 9

    @pytest.mark.skipif(not INTERPRETED, reason="of the interpreter, which conftest.py has look at addresses")
    @pytest.mark.parametrize("stores", [False, True])
    def test_what_lies_beyond_a_tensor_is_not_touched(self, stores):
        """None of the other tests touches it, or it would fail as this kernel does."""
        import triton
        import triton.language as tl

        @triton.jit
        def touch(x, COUNT: tl.constexpr, STORES: tl.constexpr):
            at = x + tl.arange(0, 16)
            inside = tl.arange(0, 16) < COUNT
            if STORES:
                tl.store(at, 1.0, mask=inside)
            else:
                tl.load(at, mask=inside)

        x = torch.zeros(9)
        touch[(1,)](x[1:], 8, stores)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="not within a tensor of the launch"):
            touch[(1,)](x[1:], 9, stores)

    test_fused_in_tf32 = fused_in_tf32(FUSED)

    @IN_TF32
    def test_nan_in_tf32(self, tf32):
        self.test_nan_stays_in_its_neighbourhood()

    @pytest.mark.parametrize(
        ("index", "value", "message"),
        [
            (3, torch.zeros(42, 8), r"project_in_weight must be \[42, 8, 1, 1\], got \[42, 8\]"),
            (4, torch.zeros(42, 1, 5, 5), r"dwconv_weight must be \[42, 1, 3, 3\], got \[42, 1, 5, 5\]"),
            (5, torch.zeros(8, 20, 1, 1), r"project_in_weight must be \[40, 8, 1, 1\], got \[42, 8, 1, 1\]"),
            (5, torch.zeros(8, 0, 1, 1), r"project_in_weight must be \[0, 8, 1, 1\]"),
        ],
    )
    def test_rejects_weights(self, index, value, message):
        tensors, _, _ = self.arguments(self.small, torch.float32)
        tensors[index] = value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        with pytest.raises(ValueError, match=f"gdfn: {message}"):
            gdfn(*tensors)

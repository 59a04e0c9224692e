import pytest
import torch
from backend import BACKEND, DEVICE, SLOW
from calls import image_call
from image_op import CONTENTS, IMAGE_DTYPES, SIDES, KeepingOpTests, case, cases, draws

from autohdr.kernels import nafblock, nafblock_apply, nafblock_statistics, set_backend
from autohdr.kernels.backends import as_on_a_gpu
from autohdr.kernels.common import WIDE
from autohdr.kernels.nafblock.declaration import KEPT_IMAGES

SHAPES = {  # batch, channels, height, width, and that the norms have a bias
    "cpu": [
        (1, 48, 12, 20, True),
        (2, 32, 17, 29, True),
        (1, 24, 8, 200, True),
        (2, 10, 5, 7, True),
        (1, 7, 63, 2, True),
        (1, 112, 4, 9, True),
        (1, 256, 3, 200, True),
        (2, 264, 6, 3, True),
    ],
    "slow": [
        (1, 48, 5, 17, True),
        (2, 32, 15, 16, True),
        (1, 64, 1, 31, True),
        (2, 10, 5, 7, True),
        (1, 39, 17, 2, True),
        (1, 112, 2, 3, True),
        (1, 24, 1, 47, True),
        (2, 12, 3, 17, True),  # whole pieces of float32, not of its padded halves
        (1, 7, 17, 2, True),
    ],
    "gpu": [
        (1, 32, 150, 201, True),
        (2, 64, 64, 67, True),
        (1, 128, 40, 70, True),
        (1, 512, 29, 31, True),
        (2, 10, 5, 7, True),
        (1, 24, 1, 1250, True),
        (1, 7, 630, 2, True),
    ],
}
CASES = cases(SHAPES["slow" if SLOW else "cpu" if BACKEND == "cpu" else "gpu"], ("B", "C", "H", "W"))
SMALL, PLAIN, LARGE = (2, 6, 4, 3, True), (1, 5, 3, 4, True), (2, 96, 37, 29, True)


def call(shape):
    return image_call(TestNafblock, shape)


class TestNafblock(KeepingOpTests):
    name = "nafblock"
    op = staticmethod(nafblock)
    small = (2, 8, 6, 5, True)
    middle = (1, 48, 5, 17, True)
    wide = (2, WIDE, 9, 7, True)

    @staticmethod
    def arguments(shape, dtype):
        b, c, *_, h, w, _ = shape
        g = torch.Generator().manual_seed(0)

        def randn(*size, mean=0.0, std=1.0):
            return (mean + std * torch.randn(*size, generator=g)).to(DEVICE)

        def convolution(channels, *shape):
            fan_in = shape[0] * shape[1] * shape[2]
            return randn(channels, *shape, std=fan_in**-0.5), randn(channels, std=0.2)

        tensors = [
            randn(b, c, h, w, mean=0.5).to(dtype),
            *(randn(c, mean=1.0, std=0.2), randn(c, std=0.2)),
            *convolution(2 * c, c, 1, 1),
            *convolution(2 * c, 1, 3, 3),
            *convolution(c, c, 1, 1),
            *(*convolution(c, c, 1, 1), randn(1, c, 1, 1)),
            *(randn(c, mean=1.0, std=0.2), randn(c, std=0.2)),
            *convolution(2 * c, c, 1, 1),
            *(*convolution(c, c, 1, 1), randn(1, c, 1, 1)),
        ]
        return tensors, randn(b, c, h, w).to(dtype), {}

    @staticmethod
    def saved_bytes(shape):
        b, c, h, w, _ = shape
        images = 1 + KEPT_IMAGES if DEVICE == "cpu" and c >= WIDE else 1
        return 4 * b * c * (images * h * w + 1)  # x, what is kept of it, and the means

    @pytest.mark.parametrize(("shape", "dtype"), CASES)
    def test_forward_and_backward(self, shape, dtype, isa):
        self.check(*case(type(self), shape, None, dtype))

    @pytest.mark.parametrize("dtype", IMAGE_DTYPES.values(), ids=IMAGE_DTYPES)
    @pytest.mark.parametrize("contents", CONTENTS, ids="-".join)
    def test_few_pixels(self, contents, dtype, isa):
        for height, width in SIDES:
            self.check(*case(type(self), (len(contents), 10, height, width, True), contents, dtype))

    def test_long_sums(self):
        """Large and far from zero in every pixel: a running sum in float32 would go astray by percents."""
        side = 32 if SLOW else 256
        tensors, dy, keywords = self.arguments((1, 4, side, side, True), torch.float32)
        tensors[0], dy = 3 + 0.01 * tensors[0], 1 + 0.01 * dy
        self.check((tensors, dy, keywords), draws(self.op, tensors, dy, keywords))

    def test_nan_reaches_the_whole_image(self):
        tensors, _, _ = self.arguments(self.small, torch.float32)
        tensors[0][0, 3, 2, 2] = torch.nan
        y = nafblock(*tensors, backend=BACKEND)
        assert y[0].isnan().all() and y[1].isfinite().all()

    @pytest.mark.parametrize(
        ("index", "value", "message"),
        [
            (3, torch.zeros(16, 8), r"conv1_weight must be \[16, 8, 1, 1\], got \[16, 8\]"),
            (5, torch.zeros(16, 1, 5, 5), r"conv2_weight must be \[16, 1, 3, 3\], got \[16, 1, 5, 5\]"),
            (11, torch.zeros(8), r"beta must be \[1, 8, 1, 1\], got \[8\]"),
            (17, None, r"conv5_bias must be a tensor \[8\], got NoneType"),
        ],
    )
    def test_rejects_weights(self, index, value, message):
        tensors, _, _ = self.arguments(self.small, torch.float32)
        tensors[index] = value if value is None else value.to(DEVICE)
        with pytest.raises(ValueError, match=f"nafblock: {message}"):
            nafblock(*tensors)

    @pytest.mark.parametrize(("channels", "dtype"), [(10, "float32"), (16, "bfloat16")])
    @pytest.mark.parametrize("rows", [5] if SLOW else [1, 5])
    @pytest.mark.parametrize("backend", [BACKEND, "reference"])
    def test_strips_make_the_whole(self, backend, rows, channels, dtype, isa):
        """Statistics summed over strips, applied strip by strip: nafblock of the whole image, which is tested against gold."""
        shape, error = (2, channels, 12, 17, True), 1e-5 if dtype == "float32" else 2e-2
        (x, *parameters), _, _ = self.arguments(shape, getattr(torch, dtype))
        height, whole = shape[2], nafblock(x, *parameters, backend=backend)
        strips = [(y, min(y + rows, height), max(y - 1, 0), min(y + rows + 1, height)) for y in range(0, height, rows)]
        sums = [
            nafblock_statistics(x[:, :, above:below], parameters, y - above, end - above, backend=backend)
            for y, end, above, below in strips
        ]
        means = torch.stack(sums).sum(0) / (height * shape[3])
        for y, end, above, below in strips:
            out = nafblock_apply(x[:, :, above:below], parameters, means, backend=backend)[:, :, y - above : end - above]
            torch.testing.assert_close(out, whole[:, :, y:end], atol=error, rtol=error)

    def test_passes_reject_what_does_not_fit(self):
        (x, *parameters), _, _ = self.arguments(self.small, torch.float32)
        with pytest.raises(ValueError, match="nafblock_statistics: parameters must be norm1_weight, .*, got 6 of them"):
            nafblock_statistics(x, parameters[:6], 0, 6)
        with pytest.raises(ValueError, match="nafblock_statistics: first and end .* has 6, got 3 and 3"):
            nafblock_statistics(x, parameters, 3, 3)
        with pytest.raises(ValueError, match=r"nafblock_apply: means must be \[2, 8\], got \[1, 8\]"):
            nafblock_apply(x, parameters, torch.zeros(1, 8, device=DEVICE))

    def test_many_channels_are_trained_by_the_reference_on_a_gpu(self, monkeypatch):
        """And evaluated by the kernels, as they are trained where set_backend says so."""
        if SLOW:  # 256 channels would take minutes
            monkeypatch.setitem(nafblock.__globals__, "WIDE", 16)
        tensors, _, _ = self.arguments((1, 16 if SLOW else 256, 3, 4, True), torch.float32)
        compiled, reference = (nafblock(*tensors, backend=backend) for backend in (BACKEND, "reference"))
        assert not torch.equal(compiled, reference) and torch.equal(nafblock(*tensors), compiled)
        tensors[-1].requires_grad_()
        with as_on_a_gpu():
            assert torch.equal(nafblock(*tensors), reference)
        if BACKEND == "cpu":
            assert torch.equal(nafblock(*tensors), compiled)
        set_backend(BACKEND)
        try:
            with as_on_a_gpu():
                assert torch.equal(nafblock(*tensors), compiled)
        finally:
            set_backend("auto")

from itertools import pairwise

import pytest
import torch
from backend import BACKEND, DEVICE, PLACE, SLOW
from calls import image_call
from gold import neighbours, run
from image_op import (
    CONTENTS,
    IMAGE_DTYPES,
    IN_TF32,
    SHARED,
    SIDES,
    ImageOpTests,
    case,
    cases,
    double,
    draws,
    draws_of,
    fill,
    fused_in_tf32,
    reference_and_gold,
)

from autohdr.kernels import mdta, mdta_apply, mdta_statistics

SHAPES = {  # batch, channels, heads, height, width, norm bias
    "cpu": [
        (1, 48, 1, 12, 20, True),
        (2, 48, 1, 37, 29, False),
        (1, 96, 2, 9, 70, True),
        (1, 96, 1, 8, 200, True),  # the official decoder: 96 channels in one head
        (2, 10, 2, 5, 7, True),
        (1, 24, 1, 1, 1, True),
        (1, 6, 3, 1, 250, False),
        (1, 7, 1, 63, 2, True),
        (1, 192, 4, 6, 6, True),
        (1, 64, 1, 5, 6, True),
        (1, 112, 1, 4, 9, False),
        (1, 48, 4, 6, 13, True),  # q and k of several heads in a panel
        (2, 40, 2, 9, 11, False),  # they begin within a vector, and go on in others
    ],
    # d_temperature has one value a head. In half precision it is partly chance whose error of so few is smaller: these are sizes
    # where the reference is not lucky.
    "slow": [
        (1, 48, 1, 7, 8, True),
        (1, 96, 2, 4, 5, True),
        (1, 96, 1, 3, 8, False),
        (3, 28, 7, 9, 6, True),
        (2, 27, 3, 6, 5, True),
        (1, 32, 1, 1, 1, True),
        (1, 30, 3, 1, 250, False),
        (1, 33, 3, 63, 2, True),
        (1, 104, 2, 3, 3, True),  # more channels than they take
    ],
}
SHAPES["gpu"] = SHAPES["slow"] + [
    (1, 48, 1, 51, 64, True),
    (1, 192, 4, 20, 35, True),
    (1, 384, 8, 10, 31, True),
]
CASES = cases(SHAPES["slow" if SLOW else "cpu" if BACKEND == "cpu" else "gpu"], ("B", "C", "heads", "H", "W"))
if BACKEND == "cuda":  # several tiles of the fused kernels, which half precision alone has
    CASES += [pytest.param((2, 80, 2, 9, 18, False), dtype, id=f"B2-C80-{dtype}") for dtype in (torch.bfloat16, torch.float16)]
# One kernel makes each pass of these in TF32, by tiles of 16 × 12 or 16 × 8 pixels; of the last, for several images at once.
FUSED = [(1, 80, 2, 13, 17, False), (2, 48, 1, 9, 33, True), (1, 20, 1, 17, 16, True), (3, 52, 2, 3, 5, True)]
STRIPS = [(2, 10, 2, 12, 7, True), (1, 48, 1, 9, 11, False) if SLOW else (1, 48, 1, 17, 21, False)]


SMALL, PLAIN, LARGE = (2, 6, 2, 4, 3, True), (2, 6, 2, 4, 3, False), (2, 96, 2, 37, 29, True)


def call(shape):
    return image_call(TestMdta, shape)


class TestMdta(ImageOpTests):
    name = "mdta"
    op = staticmethod(mdta)
    small = (2, 8, 2, 6, 5, True)
    middle = (1, 96, 2, 7, 8, True)
    channels = (10, 2)

    @staticmethod
    def arguments(shape, dtype):
        b, c, heads, h, w, bias = shape
        g = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(*size, generator=g).to(DEVICE)

        tensors = [
            (randn(b, c, h, w) + 0.5).to(dtype),
            1 + 0.2 * randn(c),
            0.2 * randn(c) if bias else None,
            randn(3 * c, c, 1, 1) / c**0.5,
            randn(3 * c, 1, 3, 3) / 3,
            1 + 0.3 * randn(heads, 1, 1),
            randn(c, c, 1, 1) / c**0.5,
        ]
        return tensors, randn(b, c, h, w).to(dtype), {"num_heads": heads}

    @staticmethod
    def saved_bytes(shape):
        b, c, heads, h, w, _ = shape
        return 4 * b * (c * h * w + c * c // heads + 2 * c)  # x, the Gram matrix, the norms of q and k

    @pytest.mark.parametrize(("shape", "dtype"), CASES)
    def test_forward_and_backward(self, shape, dtype, isa):
        self.check(*case(type(self), shape, None, dtype))

    # Not float16, beyond whose range the gradient of so short a q lies.
    @pytest.mark.parametrize("dtype", [torch.float32] if SLOW else [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["no temperature", "no q", "no q, no k", "short"])
    def test_degenerate_attention(self, kind, dtype, isa):
        """q and k that are zero, or shorter than the 1e-12 that they are divided by at least, or not much longer."""
        for height, width in ((1, 1), (3, 4)):
            tensors, dy, keywords = self.arguments((1, 8, 2, height, width, True), dtype)
            if kind == "no temperature":
                tensors[5].zero_()
            elif kind == "short":
                exponents = torch.arange(16, device=DEVICE) * 5 % 16  # of lengths around the least one, in no order
                tensors[3][:16] *= 10.0 ** (-9 - 6 / 15 * exponents[:, None, None, None])
            else:
                tensors[3][: 8 if kind == "no q" else 16] = 0
            self.check((tensors, dy, keywords), draws(self.op, tensors, dy, keywords))

    @pytest.mark.parametrize("dtype", IMAGE_DTYPES.values(), ids=IMAGE_DTYPES)
    def test_one_pixel_leaves_q_and_k_alone(self, dtype, isa):
        """They are ±1 once they have their length, whatever they were."""
        tensors, dy, keywords = self.arguments((3, 10, 2, 1, 1, True), dtype)
        d_qkv, d_dwconv = run(mdta, tensors, dy, **keywords, backend=BACKEND)[4:6]
        assert not d_qkv[:20].any() and not d_dwconv[:20].any() and d_qkv[20:].any() and d_dwconv[20:].any()

    @pytest.mark.parametrize("dtype", IMAGE_DTYPES.values(), ids=IMAGE_DTYPES)
    def test_parallel_q_and_k_are_left_alone(self, dtype, isa):
        """All cosines are ±1: the two terms of their gradients cancel but for float32's rounding, in any dtype."""
        tensors, dy, keywords = self.arguments((3, 10, 2, 3, 4, True), dtype)
        fill(tensors[0], ["flat"] * 3)
        tensors[4].zero_()[:, :, 1, 1] = 1
        d_qkv = run(mdta, tensors, dy, **keywords, backend=BACKEND)[4]
        assert d_qkv[:20].abs().max() < 2e-5 * d_qkv[20:].abs().max()

    @pytest.mark.parametrize("contents", CONTENTS, ids="-".join)
    def test_passes_over_few_pixels(self, contents, isa):
        for height, width in SIDES:
            (x, *parameters), _, keywords = self.arguments((len(contents), *self.channels, height, width, True), torch.float32)
            fill(x, contents)
            heads = keywords["num_heads"]
            statistics = mdta_statistics(x, parameters, heads, 0, height, backend=BACKEND)
            for actual, gold in zip(statistics, mdta_statistics(x.double(), double(parameters), heads, 0, height), strict=True):
                torch.testing.assert_close(actual, gold, rtol=1e-5, atol=1e-5 * gold.abs().max().item())
            y = mdta_apply(x, parameters, heads, statistics, backend=BACKEND)
            assert torch.equal(y, mdta(x, *parameters, **keywords, backend=BACKEND))

    @pytest.mark.skipif(BACKEND != "cpu", reason="it is about the reference")
    def test_draws_of_two_pixels_are_no_matter_of_luck(self):
        """Any that a case takes have at least half of the largest error that four times as many have."""
        shape = (len(CONTENTS[0]), *self.channels, 1, 2, True)
        tensors, dy, keywords = self.arguments(shape, torch.float32)
        count, errors = draws_of(2, torch.float32), []
        for t in neighbours(tensors, 4 * count):
            fill(t[0], CONTENTS[0])
            reference, gold = reference_and_gold(self.op, t, dy, keywords)
            errors.append((reference[5] - gold[5]).abs().max())  # of d_dwconv
        largest = torch.stack(errors).view(-1, count).amax(1)
        assert largest.max() <= 2 * largest.min(), largest

    def test_definition(self):
        """The reference against the equations, written out for one head."""
        (x, weight, _, qkv, dw, temperature, out), _, _ = self.arguments((1, 4, 1, 3, 5, False), torch.float64)
        weight, temperature = weight.double(), temperature.double()
        qkv, dw, out = qkv[:, :, 0, 0].double(), dw[:, 0].double(), out[:, :, 0, 0].double()
        norm = x[0] / (x[0].var(0, unbiased=False) + 1e-6).sqrt() * weight[:, None, None]
        hidden = torch.zeros(12, 5, 7, dtype=torch.float64, device=DEVICE)
        hidden[:, 1:-1, 1:-1] = torch.einsum("oc,chw->ohw", qkv, norm)
        conv = sum(dw[:, i, j, None, None] * hidden[:, i : i + 3, j : j + 5] for i in range(3) for j in range(3))
        q, k, v = conv.flatten(1).split(4)
        cosine = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in k]) for a in q])
        expected = x[0] + (out @ torch.softmax(cosine * temperature.item(), -1) @ v).view(4, 3, 5)
        actual = mdta(x, weight, None, qkv[:, :, None, None], dw[:, None], temperature, out[:, :, None, None], 1)
        torch.testing.assert_close(actual[0], expected)

    def test_long_sums(self):
        """Large and far from zero in every pixel: a running sum in float32 would go astray by percents."""
        side = 32 if SLOW else 640
        tensors, dy, keywords = self.arguments((1, 4, 1, side, side, True), torch.float32)
        tensors[0], dy = 3 + 0.01 * tensors[0], 1 + 0.01 * dy
        self.check((tensors, dy, keywords), draws(self.op, tensors, dy, keywords))

    def test_nan_reaches_the_whole_image(self):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        tensors[0][0, 3, 2, 2] = torch.nan
        y = mdta(*tensors, **keywords, backend=BACKEND)
        assert y[0].isnan().all() and y[1].isfinite().all()

    @pytest.mark.parametrize(
        ("index", "value", "message"),
        [
            (3, torch.zeros(24, 8), r"qkv_weight must be \[24, 8, 1, 1\], got \[24, 8\]"),
            (4, torch.zeros(24, 1, 5, 5), r"dwconv_weight must be \[24, 1, 3, 3\], got \[24, 1, 5, 5\]"),
            (5, torch.zeros(3, 1, 1), r"temperature must be \[2, 1, 1\], got \[3, 1, 1\]"),
            (6, torch.zeros(8, 7, 1, 1), r"project_out_weight must be \[8, 8, 1, 1\], got \[8, 7, 1, 1\]"),
        ],
    )
    def test_rejects_weights(self, index, value, message):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        tensors[index] = value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        with pytest.raises(ValueError, match=f"mdta: {message}"):
            mdta(*tensors, **keywords)

    def test_rejects_heads_that_do_not_divide(self):
        tensors, _, _ = self.arguments(self.small, torch.float32)
        tensors[5] = torch.ones(3, 1, 1, device=DEVICE)
        with pytest.raises(ValueError, match="num_heads must divide the 8 channels, got 3"):
            mdta(*tensors, 3)

    @pytest.mark.parametrize("rows", [1, 5, 64])
    @pytest.mark.parametrize("backend", dict.fromkeys([BACKEND, "reference"]))
    @pytest.mark.parametrize("shape", STRIPS, ids=str)
    def test_strips_make_the_whole(self, shape, backend, rows, isa):
        """Statistics summed over strips, applied strip by strip: mdta of the whole image, which is tested against gold."""
        (x, *parameters), _, keywords = self.arguments(shape, torch.float32)
        heads, height, whole = keywords["num_heads"], shape[3], mdta(x, *parameters, **keywords, backend=backend)
        strips = [(y, min(y + rows, height), max(y - 1, 0), min(y + rows + 1, height)) for y in range(0, height, rows)]
        sums = [
            mdta_statistics(x[:, :, above:below], parameters, heads, y - above, end - above, backend=backend)
            for y, end, above, below in strips
        ]
        total = tuple(sum(s) for s in zip(*sums, strict=True))
        for y, end, above, below in strips:
            out = mdta_apply(x[:, :, above:below], parameters, heads, total, backend=backend)[:, :, y - above : end - above]
            torch.testing.assert_close(out, whole[:, :, y:end], atol=1e-5, rtol=1e-5)

    test_fused_in_tf32 = fused_in_tf32(FUSED)

    @IN_TF32
    def test_many_tiles_in_tf32(self, tf32):
        """So many that a block of the emulation's two adds to what it has written after its eighth."""
        (x, *parameters), _, _ = self.arguments((1, 8, 1, 141, 16, True), torch.float32)
        statistics = mdta_statistics(x, parameters, 1, 0, 141, backend=BACKEND)
        for a, g in zip(statistics, mdta_statistics(x.double(), double(parameters), 1, 0, 141), strict=True):
            assert (a - g).norm() < 2**-10 * g.norm()

    @IN_TF32
    def test_operands_are_rounded_to_tf32(self, tf32):
        """One that is cut instead makes sums of positive numbers a third of an eps smaller, or more."""
        (x, *parameters), _, _ = self.arguments((1, 8, 1, 16, 24, True), torch.float32)
        _, norm_bias, qkv, dwconv, _, project_out = parameters
        eps = 2**-10
        norm_bias += 6
        dwconv.copy_(torch.linspace(1, 1.9, dwconv.numel()).view_as(dwconv))
        for weight in qkv, project_out:  # q and k are all parallel: project_out · attention is what project_out is
            weight.fill_(1 + 0.25 * eps)[::2] = 1 + 0.75 * eps
        statistics = mdta_statistics(x, parameters, 1, 0, 16, backend=BACKEND)
        change = mdta_apply(x, parameters, 1, statistics, backend=BACKEND) - x
        x, parameters = x.double(), double(parameters)
        gold = mdta_statistics(x, parameters, 1, 0, 16)[0], mdta_apply(x, parameters, 1, statistics) - x
        for a, g in zip((statistics[0], change), gold, strict=True):
            assert abs((a / g - 1).mean()) < 0.15 * eps

    @IN_TF32
    @pytest.mark.parametrize("shape", [(1, 96, 2, 21, 18, True), (1, 48, 1, 13, 20, False)], ids=str)
    def test_fused_strips_in_tf32(self, shape, tf32, monkeypatch):
        """The same operands are rounded, whichever rows are summed."""
        monkeypatch.setenv("AUTOHDR_SHARED", SHARED[-1])
        (x, *parameters), _, keywords = self.arguments(shape, torch.float32)
        heads, height = keywords["num_heads"], shape[3]
        whole = mdta_statistics(x, parameters, heads, 0, height, backend=BACKEND)
        applied = mdta_apply(x, parameters, heads, whole, backend=BACKEND)
        cuts = [0, 5, 14, height] if height > 14 else [0, 5, height]
        strips = [(y, end, max(y - 1, 0), min(end + 1, height)) for y, end in pairwise(cuts)]
        sums = [mdta_statistics(x[:, :, a:b], parameters, heads, y - a, end - a, backend=BACKEND) for y, end, a, b in strips]
        for total, expected in zip((sum(s) for s in zip(*sums, strict=True)), whole, strict=True):
            torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
        for y, end, above, below in strips:
            out = mdta_apply(x[:, :, above:below], parameters, heads, whole, backend=BACKEND)[:, :, y - above : end - above]
            assert torch.equal(out, applied[:, :, y:end])

    @pytest.mark.parametrize(
        ("index", "value", "message"),
        [
            (0, torch.zeros(2, 2, 4, 3), r"statistics\[0\] must be \[2, 2, 4, 4\], got \[2, 2, 4, 3\]"),
            (0, torch.zeros(1, 2, 4, 4), r"statistics\[0\] must be \[2, 2, 4, 4\], got \[1, 2, 4, 4\]"),
            (1, torch.zeros(2, 2, 4), r"statistics\[1\] must be \[2, 8\], got \[2, 2, 4\]"),
            (2, torch.zeros(2, 8, device="meta"), rf"statistics\[2\] must be on {PLACE} as x is, got meta"),
            (2, torch.zeros(2, 8, dtype=torch.int64), r"statistics\[2\] must be floating, got torch.int64"),
            (1, None, r"statistics\[1\] must be a tensor \[2, 8\], got NoneType"),
            (slice(1, 3), [], "statistics must be the three tensors of mdta_statistics, got 1"),
        ],
    )
    @pytest.mark.parametrize("backend", dict.fromkeys([BACKEND, "reference"]))
    def test_apply_rejects_statistics(self, index, value, message, backend):
        (x, *parameters), _, keywords = self.arguments(self.small, torch.float32)
        statistics = list(mdta_statistics(x, parameters, keywords["num_heads"], 0, 6))
        statistics[index] = value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        with pytest.raises(ValueError, match=f"mdta_apply: {message}"):
            mdta_apply(x, parameters, keywords["num_heads"], statistics, backend=backend)

    def test_passes_reject_parameters(self):
        (x, *parameters), _, keywords = self.arguments(self.small, torch.float32)
        with pytest.raises(ValueError, match="mdta_statistics: parameters must be norm_weight, .*, got 5 of them"):
            mdta_statistics(x, parameters[:5], keywords["num_heads"], 0, 6)

    @pytest.mark.parametrize(("first", "end"), [(0, 7), (3, 3), (-1, 2)])
    def test_statistics_reject_rows(self, first, end):
        (x, *parameters), _, keywords = self.arguments(self.small, torch.float32)
        with pytest.raises(ValueError, match=f"mdta_statistics: first and end .* has 6, got {first} and {end}"):
            mdta_statistics(x, parameters, keywords["num_heads"], first, end)

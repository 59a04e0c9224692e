"""The tests that every image op passes, as a base class; an op's own test file adds its arguments, definition and refusals."""

import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from backend import BACKEND, COMPILED, DEVICE, DTYPES, INTERPRETED, OPCHECKS, PLACE, SLOW, raw_op
from calls import threads
from gold import InTF32, assert_as_good_as_reference, neighbours, run
from torch import library

from autohdr.kernels.backends import as_on_a_gpu

IMAGE_DTYPES = {name: dtype for name, dtype in DTYPES.items() if BACKEND != "cpu" or dtype != torch.float16}


SIDES = ((1, 2),) if SLOW else ((1, 1), (1, 2), (2, 1), (2, 2), (1, 9), (9, 1))  # of images of few pixels
CONTENTS = [("random", "flat"), ("grey", "grey", "grey", "black")]  # of the images of a batch; see fill
SHARED = [str(kib << 10) for kib in (99, 163, 227)]  # bytes of a block's, as the GPUs have them; the emulation reads it
IN_TF32 = pytest.mark.skipif(BACKEND != "cuda", reason="only the CUDA kernels multiply as TF32")
FEW = 2048  # pixels of which neighbours are drawn at most; see gold.py


def double(tensors):
    """Those in floats become float64."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def fill(x, contents):
    """Makes images of x the same in every pixel (flat), in every channel too (grey), or zero (black). The norm without a bias
    multiplies a grey image by a thousand, which leaves float16's range if it is not dark."""
    for image, content in zip(x, contents, strict=True):
        if content == "flat":
            image.copy_(image[:, :1, :1].clone().expand_as(image))
        elif content == "grey":
            image.fill_(image[0, 0, 0].item() / (64 if x.dtype == torch.float16 else 1))
        elif content == "black":
            image.zero_()


def reference_and_gold(op, tensors, dy, keywords):
    with as_on_a_gpu() if SLOW else nullcontext():  # where it rounds weights too
        return run(op, tensors, dy, **keywords, backend="reference"), run(op, double(tensors), dy.double(), **keywords)


def tf32_and_gold(op, tensors, dy, keywords):
    arguments = double(tensors), dy.double()
    with InTF32():
        rounded = run(op, *arguments, **keywords, backend="reference")
    return [r.float() for r in rounded], run(op, *arguments, **keywords)


def draws_of(pixels, dtype):
    """How many neighbours. Of two pixels in float32 many: mdta's q may be a hundredth as long as elsewhere, which multiplies what
    was rounded on its way. Over 264 draws of d_dwconv, of 3.8, the reference's errors have a median of 5e-6 and a maximum of
    1.9e-5, and the largest of nine is anything from 7e-6 to that. The CUDA kernel's RMS is 1.7e-5: 9e-6 were its float32 products
    exact, and 1.0e-5 were its norm."""
    return 0 if pixels > FEW else 32 if pixels == 2 and dtype == torch.float32 else 8


def draws(op, tensors, dy, keywords, contents=None):
    """Pairs of reference and gold: of these arguments, and of neighbours whose images have the same contents."""
    inputs = [tensors, *neighbours(tensors, draws_of(dy[0, 0].numel(), dy.dtype))]
    for x, *_ in inputs if contents else []:
        fill(x, contents)
    return [reference_and_gold(op, t, dy, keywords) for t in inputs]


def shifted(image):
    """The image in channels_last, in memory that does not begin on a whole vector."""
    b, c, h, w = image.shape
    return image.new_empty(image.numel() + 1)[1:].view(b, h, w, c).permute(0, 3, 1, 2).copy_(image)


def few_pixels():
    """(contents, norm's bias, sides, dtype): all of them, or where a launch takes a second some that have each."""
    some = [(True, ((1, 1),), "f32"), (False, ((1, 2),), "f32"), (True, ((1, 2),), "bf16"), (False, ((9, 1),), "f16")]
    every = [(bias, SIDES, dtype) for bias in (True, False) for dtype in IMAGE_DTYPES]
    for contents in CONTENTS:
        for bias, sides, dtype in some if SLOW else every:
            name = "-".join([*contents, "bias" if bias else "biasfree", dtype])
            yield pytest.param(contents, bias, sides, IMAGE_DTYPES[dtype], id=name)


@functools.cache
def case(test, shape, contents, dtype):
    """(arguments, draws), the same for every instruction set."""
    arguments = test.arguments(shape, dtype)
    return arguments, draws(test.op, *arguments, contents)


def cases(shapes, names):
    """Shapes, each a tuple with the norm's bias last, as test parameters in every dtype that the backend takes; where a launch
    takes a second, in float32 and in the narrow dtypes in turn, and in Triton's interpreter in all dtypes in turn."""

    def name(shape, dtype):
        sizes = "-".join(f"{n}{s}" for n, s in zip(names, shape, strict=False))
        return f"{sizes}-{'bias' if shape[-1] else 'biasfree'}-{dtype}"

    return [
        pytest.param(shape, IMAGE_DTYPES[dtype], id=name(shape, dtype))
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(IMAGE_DTYPES)
        if not SLOW or j in ((i % 3,) if INTERPRETED else (0, 1 + i % 2))
    ]


def fused_in_tf32(shapes):
    """A test of what one kernel makes of these in TF32, on each GPU's shared memory."""

    @IN_TF32
    @pytest.mark.parametrize("shared", SHARED)
    @pytest.mark.parametrize("shape", shapes, ids=str)
    def test(self, shape, shared, tf32, monkeypatch):
        monkeypatch.setenv("AUTOHDR_SHARED", shared)
        self.check_in_tf32(shape)

    return test


class ImageOpTests:
    """A subclass sets ``name``, ``op``, ``small`` and ``middle`` (shapes) and ``channels`` (of a shape, what stands between batch
    and height), and has ``arguments(shape, dtype) -> (tensors, dy, keywords)`` and ``saved_bytes(shape)``, what the backward pass
    may keep beside the parameters."""

    options = (1e-6,)  # of the raw op, behind its tensors and the keywords

    def check(self, arguments, draws):
        tensors, dy, keywords = arguments
        (reference, gold), *others = draws
        actual = run(self.op, tensors, dy, **keywords, backend=BACKEND)
        assert_as_good_as_reference(actual, reference, gold, dy.dtype, dy[:, 0].numel(), others)

    @pytest.mark.parametrize(("contents", "bias", "sides", "dtype"), list(few_pixels()))
    def test_few_pixels(self, contents, bias, sides, dtype, isa):
        """One and two pixels, a row, a column; images without contrast."""
        for height, width in sides:
            self.check(*case(type(self), (len(contents), *self.channels, height, width, bias), contents, dtype))

    def test_gradcheck(self):
        tensors, _, keywords = self.arguments((1, 4, 2, 3, 4, True), torch.float32)
        leaves = [t.double().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(lambda *t: self.op(*t, **keywords, backend="reference"), leaves)

    def test_opcheck(self):
        self.check_raw_op(self.small)

    def check_raw_op(self, shape):
        tensors, _, keywords = self.arguments(shape, torch.float32)
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        arguments = *[t.requires_grad_() for t in tensors], *keywords.values(), *self.options
        library.opcheck(raw_op(self.name), arguments, test_utils=OPCHECKS)

    @pytest.mark.parametrize("backend", COMPILED)
    def test_compile_fullgraph(self, backend):
        tensors, dy, keywords = self.arguments(self.small, torch.float32)

        def function(*t):
            return self.op(*t, **keywords, backend=backend).relu()

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, e in zip(run(compiled, tensors, dy), run(function, tensors, dy), strict=True):
            assert torch.equal(a, e)

    @IN_TF32
    def test_tf32(self, tf32):
        self.check_in_tf32(self.middle)

    def check_in_tf32(self, shape):
        """The reference is float64 with operands of 11 bits, as many as float16's. An error that is not much smaller shows that
        such were multiplied."""
        tensors, dy, keywords = self.arguments(shape, torch.float32)
        inputs = [tensors, *neighbours(tensors, 8, torch.float16)]
        (reference, gold), *others = [tf32_and_gold(self.op, t, dy, keywords) for t in inputs]
        actual = run(self.op, tensors, dy, **keywords, backend=BACKEND)
        assert_as_good_as_reference(actual, reference, gold, torch.float16, dy[:, 0].numel(), others)
        for a, r, g in zip(actual, reference, gold, strict=True):
            assert a.dim() < 4 or (a - g).norm() > 0.5 * (r - g).norm()  # the others may be sums without products

    @pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "shifted"])
    def test_noncontiguous(self, layout):
        tensors, dy, keywords = self.arguments(self.small, torch.float32)
        expected = run(self.op, tensors, dy, **keywords, backend=BACKEND)
        x = tensors[0]
        if layout == "channels_last":
            tensors[0], dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        elif layout == "sliced":
            tensors[0], dy = torch.cat([x, x], 3)[..., : x.shape[3]], torch.stack([dy, dy], -1)[..., 0]
        elif layout == "shifted":
            tensors[0], dy = shifted(x), shifted(dy)
        else:
            tensors[0] = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        for a, e in zip(run(self.op, tensors, dy, **keywords, backend=BACKEND), expected, strict=True):
            assert torch.equal(a, e)

    def test_saves_no_image_beside_x(self):
        self.check_saved(self.small)

    def check_saved(self, shape):
        (x, *parameters), _, keywords = self.arguments(shape, torch.float32)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        parameters = [p.requires_grad_() for p in parameters]
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            self.op(x, *parameters, **keywords, backend=BACKEND)
        pointers = {t.data_ptr() for t in parameters}
        kept = sum(t.numel() * t.element_size() for pointer, t in saved.items() if pointer not in pointers)
        assert kept == self.saved_bytes(shape)

    def test_double_backward_raises(self):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        tensors[0].requires_grad_()
        y = self.op(*tensors, **keywords, backend=BACKEND)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match=f"{self.name}: a second derivative is not implemented"):
            dx.sum().backward()

    @pytest.mark.skipif(BACKEND == "triton" and DEVICE == "cpu", reason="Triton's interpreter keeps global state")
    def test_called_from_several_threads_at_once(self):
        height, width = (5, 6) if SLOW else (20, 33)
        calls = [self.arguments((1, 8, 2, height + i, width, True), torch.float32) for i in range(4)]
        expected = [run(self.op, t, dy, **keywords, backend=BACKEND) for t, dy, keywords in calls]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda c: run(self.op, c[0], c[1], **c[2], backend=BACKEND), calls * (1 if SLOW else 5)))
        for i, results in enumerate(together):
            torch.testing.assert_close(results, expected[i % 4], rtol=1e-4, atol=1e-4)

    def test_threads(self):
        """The same bits from run to run at any number of threads, and rounding apart between them."""
        self.check_threads((1, 8, 2, 9, 11, True) if SLOW else (1, 8, 2, 33, 40, True))

    def check_threads(self, shape):
        tensors, dy, keywords = self.arguments(shape, torch.float32)
        results = []
        for n in (1, 2, 5) if BACKEND == "cpu" else (1,):
            with threads(n):
                results.append(run(self.op, tensors, dy, **keywords, backend=BACKEND))
                again = run(self.op, tensors, dy, **keywords, backend=BACKEND)
                assert all(torch.equal(a, b) for a, b in zip(results[-1], again, strict=True))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)

    def test_autocast_casts_x_alone(self):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        for backend in (BACKEND, "reference"):
            with torch.autocast(DEVICE, torch.bfloat16):
                y = self.op(*tensors, **keywords, backend=backend)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, self.op(tensors[0].bfloat16(), *tensors[1:], **keywords, backend=backend))

    def test_autocast_decides_the_backend(self):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        with torch.autocast(DEVICE, torch.float16):
            assert self.op(*tensors, **keywords).dtype == torch.float16  # which the CPU kernels do not take
        with torch.autocast(DEVICE, torch.bfloat16):
            assert self.op(tensors[0].half(), *tensors[1:], **keywords, backend=BACKEND).dtype == torch.bfloat16
            assert self.op(tensors[0].double(), *tensors[1:], **keywords).dtype == torch.float64

    def test_parameters_in_bfloat16(self):
        tensors, dy, keywords = self.arguments(self.small, torch.float32)
        halves = [tensors[0], *(t.bfloat16() for t in tensors[1:])]
        actual = run(self.op, halves, dy, **keywords, backend=BACKEND)
        expected = run(self.op, [t.float() for t in halves], dy, **keywords, backend=BACKEND)
        for a, e, t in zip(actual[1:], expected[1:], halves, strict=True):
            assert torch.equal(a, e.to(t.dtype))

    def test_empty_batch(self):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        leaves = [t.requires_grad_() for t in [tensors[0][:0], *tensors[1:]]]
        y = self.op(*leaves, **keywords, backend=BACKEND)
        assert y.shape == (0, *tensors[0].shape[1:])
        grads = torch.autograd.grad(y.sum(), leaves)
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves, strict=True))

    @pytest.mark.parametrize(
        ("index", "value", "message"),
        [
            (0, torch.zeros(8, 6, 5), r"x must be a floating \[batch, channels, height, width\].*got torch.float32 \[8, 6, 5\]"),
            (0, torch.zeros(1, 8, 0, 5), "x must be a floating.*no empty image"),
            (0, [1.0], "x must be a floating.* got list"),
            (1, None, r"norm1?_weight must be a tensor \[8\], got NoneType"),
            (1, torch.zeros(7), r"norm1?_weight must be \[8\], got \[7\]"),
            (2, torch.zeros(8, dtype=torch.int32), "norm1?_bias must be floating, got torch.int32"),
            (2, torch.zeros(8, device="meta"), f"norm1?_bias must be on {PLACE} as x is, got meta"),
        ],
    )
    def test_rejects_arguments(self, index, value, message):
        tensors, _, keywords = self.arguments(self.small, torch.float32)
        tensors[index] = value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        with pytest.raises(ValueError, match=f"{self.name}: {message}"):
            self.op(*tensors, **keywords)


class KeepingOpTests(ImageOpTests):
    """Of an op that keeps hidden channels for the backward pass where there are many. A subclass also sets ``wide``, a shape of
    as many."""

    options = (1e-6, False)

    @pytest.mark.skipif(BACKEND != "cpu", reason="only the CPU's kernels keep hidden channels")
    def test_many_channels_are_kept(self):
        self.check_saved(self.wide)
        self.check_raw_op(self.wide)
        self.check_threads(self.wide)

    @pytest.mark.skipif(BACKEND != "cpu", reason="only the CPU's kernels keep hidden channels")
    @pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
    def test_what_is_kept_is_what_is_computed_again(self, dtype, error, isa):
        (x, *parameters), dy, _ = self.arguments(self.wide, dtype)
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        _, *outputs, kept = raw_op(self.name)(x, *parameters, 1e-6, True)

        def backward(kept):
            return raw_op(f"{self.name}_backward")(dy, x, *parameters, *outputs, kept, 1e-6)

        for a, e in zip(backward(kept), backward(kept[:0]), strict=True):
            assert (a.float() - e.float()).norm() <= error * e.float().norm()
        with pytest.raises(RuntimeError, match=rf"kept must be .* {kept.numel()} elements or none, got shape \[7\]"):
            backward(kept[:7])

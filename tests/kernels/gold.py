"""How a backend is judged: against the reference in float64, by what the reference itself reaches in the same dtype."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# The largest error may be this many times the reference's (values, gradients), its RMS this many. The RMS of few numbers is
# chance: two of n independent errors each differ by a factor of about 1 ± 1/√n, of which SPREADS are allowed. test_gold.py shows
# what that lets through and what it finds.
LARGEST = (2.0, 3.0)
RMS = {torch.float32: (2.0, 3.0), torch.bfloat16: (1.1, 1.1), torch.float16: (1.1, 1.1)}
SPREADS = 2.0


def run(op, tensors, dy, **keywords):
    """[y, gradients of all tensors that are not None]."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = op(*leaves, **keywords)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


class InTF32(TorchDispatchMode):
    """Rounds the operands of every product, forward and backward, to TF32's 11 bits; not those of depthwise convolutions."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        convolution = function.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
        groups = args[8 if function.overloadpacket == torch.ops.aten.convolution else 9] if convolution else 1
        if groups == 1 and (convolution or function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)):
            args = tree_map(self._rounded, args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(value):
        if not isinstance(value, torch.Tensor):
            return value
        return ((value.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(value.dtype)


def neighbours(tensors, count, dtype=None):
    """Yields tensors whose values differ from these by one eps or not at all: that of the dtype which the reference rounds all of
    them to, by default the first one's."""
    g, eps = torch.Generator().manual_seed(1), torch.finfo(dtype or tensors[0].dtype).eps
    for _ in range(count):
        moves = [None if t is None else torch.randint(-1, 2, t.shape, generator=g).to(t.device) for t in tensors]
        pairs = zip(tensors, moves, strict=True)
        yield [t if t is None else (t * (1 + m * eps)).to(t.dtype) for t, m in pairs]


def rms_factor(count, dtype, kind):
    """How many times the reference's RMS error that of so many numbers may be; kind: 0 values, 1 gradients."""
    return max(RMS[dtype][kind], 1 + SPREADS / math.sqrt(count))


def assert_as_good_as_reference(actual, reference, gold, dtype, pixels, others=()):
    """Each a list [y, dx, gradients of the parameters], which are sums over so many pixels and may round once a pixel: hence the
    root.

    others: further pairs (reference, gold), of neighbours of the same inputs. Where a single rounding decides, as that of one
    short q does about all of mdta's gradients, or where the output is a single number, as d_temperature, the reference's error is
    chance: it may be a hundredth of what it is for inputs that differ by one eps, or on the next processor. So the largest of all
    draws counts. Where many roundings decide, the draws are alike.
    """
    for i, (a, r, g) in enumerate(zip(actual, reference, gold, strict=True)):
        rounding = torch.finfo(torch.float32).eps * (8 + (math.sqrt(pixels) if i > 1 else 0))
        assert a.shape == r.shape and a.dtype == r.dtype, f"output {i}"
        kind = min(i, 1)
        a_error, r_errors = (a.double() - g).abs(), [(r.double() - g).abs(), *((o[i].double() - og[i]).abs() for o, og in others)]
        r_largest = max(e.max() for e in r_errors)
        term = rounding * g.abs().max()
        if a.dtype != torch.float32:
            term = term + torch.finfo(dtype).eps * g.abs().max()
        assert a_error.max() <= LARGEST[kind] * r_largest + term, (
            f"output {i}: largest error {a_error.max():.2e}, the reference's {r_largest:.2e}, of {g.abs().max():.2e}"
        )
        r_rms = max(e.square().mean().sqrt() for e in r_errors)
        rms, rms_limit = a_error.square().mean().sqrt(), r_rms * rms_factor(a.numel(), dtype, kind)
        assert rms <= rms_limit + rounding * g.abs().max(), f"output {i}: RMS error {rms:.2e}, allowed {rms_limit:.2e}"

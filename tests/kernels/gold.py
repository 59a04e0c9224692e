"""How a backend is judged: against the reference in float64, by what the reference itself reaches in the same dtype."""

import math

import torch

# The largest error may be this many times the reference's (values, gradients), its RMS this many.
LARGEST = (2.0, 3.0)
RMS = {torch.float32: (2.0, 3.0), torch.bfloat16: (1.1, 1.1), torch.float16: (1.1, 1.1)}


def run(op, tensors, dy, **keywords):
    """[y, gradients of all tensors that are not None]."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = op(*leaves, **keywords)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def assert_as_good_as_reference(actual, reference, gold, dtype, pixels):
    """Each a list [y, dx, gradients of the parameters], which are sums over so many pixels and may round once a pixel: hence the
    root."""
    for i, (a, r, g) in enumerate(zip(actual, reference, gold, strict=True)):
        rounding = torch.finfo(torch.float32).eps * (8 + (math.sqrt(pixels) if i > 1 else 0))
        assert a.shape == r.shape and a.dtype == r.dtype, f"output {i}"
        kind = min(i, 1)
        a_error, r_error = (a.double() - g).abs(), (r.double() - g).abs()
        term = rounding * g.abs().max()
        if a.dtype != torch.float32:
            term = term + torch.finfo(dtype).eps * g.abs().max()
        assert a_error.max() <= LARGEST[kind] * r_error.max() + term, (
            f"output {i}: largest error {a_error.max():.2e}, the reference's {r_error.max():.2e}, of {g.abs().max():.2e}"
        )
        rms, rms_limit = a_error.square().mean().sqrt(), r_error.square().mean().sqrt() * RMS[dtype][kind]
        assert rms <= rms_limit + rounding * g.abs().max(), f"output {i}: RMS error {rms:.2e}, allowed {rms_limit:.2e}"

"""torch.func over every op: gradients, Jacobians and vmap as plain autograd and loops give them; what has no formula raises,
where PyTorch would hand out zeros."""

from functools import partial

import pytest
import torch
from calls import DIFFERENTIABLE, call
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from autohdr import create_model
from autohdr.kernels import mdta_apply, mdta_statistics

CALLS = [(op, size) for op in DIFFERENTIABLE for size in ("SMALL", "PLAIN")]
REFUSED = "a (second|forward-mode) derivative is not implemented; use backend='reference' for it"


@pytest.fixture(params=CALLS, ids="-".join)
def problem(request):
    """(function, tensors, gradient), with every optional tensor and without any."""
    return call(*request.param)


def loss_of(function, dy):
    return lambda *tensors: (function(*tensors) * dy).sum()


def usual(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_computes_the_same_again(problem):
    function, tensors, dy = problem
    again = partial(checkpoint, loss_of(function, dy), use_reentrant=False)
    assert_equal(usual(again, tensors), usual(loss_of(function, dy), tensors))


def test_grad_and_vjp_of_every_argument(problem):
    function, tensors, dy = problem
    expected = usual(loss_of(function, dy), tensors)
    every = tuple(range(len(tensors)))
    assert_equal(grad(loss_of(function, dy), every)(*tensors), expected)
    y, pull = vjp(function, *tensors)
    assert torch.equal(y, function(*tensors))
    assert_equal(pull(dy), expected)
    for i, e in enumerate(expected):
        assert torch.equal(grad(loss_of(function, dy), i)(*tensors), e)


def test_jacrev(problem):
    function, tensors, _ = problem

    def some(*tensors):
        return function(*tensors).flatten()[::37]

    rows = [usual(lambda *t, k=k: some(*t)[k], tensors) for k in range(len(some(*tensors)))]
    for actual, *expected in zip(jacrev(some, tuple(range(len(tensors))))(*tensors), *rows, strict=True):
        close(actual, torch.stack(expected))


def varied(t, dim, n=3):
    return torch.stack([t * (1 + 0.1 * i) for i in range(n)], dim)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_each_argument(problem, dim):
    function, tensors, _ = problem
    for i, t in enumerate(tensors):
        batched = [varied(t, dim) if i == j else other for j, other in enumerate(tensors)]
        in_dims = tuple(dim if i == j else None for j in range(len(tensors)))
        expected = [function(*(b.select(dim, k) if i == j else b for j, b in enumerate(batched))) for k in range(3)]
        assert torch.equal(vmap(function, in_dims)(*batched), torch.stack(expected))


def test_vmap_over_nothing_raises(problem):
    function, (x, *rest), _ = problem
    with pytest.raises(ValueError, match="torch.vmap must have at least one entry"):
        vmap(lambda x: function(x, *rest))(x[None][:0])


def test_vmap_over_all_arguments_nested_and_with_out_dims(problem):
    function, tensors, _ = problem
    batched = [varied(varied(t, 0, 2), -1) for t in tensors]  # [2, ..., 3]
    expected = torch.stack([torch.stack([function(*(b[i, ..., k] for b in batched)) for k in range(3)]) for i in range(2)])
    assert torch.equal(vmap(vmap(function, -1), 0)(*batched), expected)
    assert torch.equal(vmap(vmap(function, 0, out_dims=1), -1)(*batched), expected.permute(1, 2, 0, *range(3, expected.dim())))


def test_gradients_of_every_sample(problem):
    """vmap of grad, where all arguments vary and where the first alone does; and grad of vmap."""
    function, tensors, dy = problem
    every = tuple(range(len(tensors)))
    for moved in (every, (0,)):
        batched = [varied(t, -1) if i in moved else t for i, t in enumerate(tensors)]
        in_dims = tuple(-1 if i in moved else None for i in every)
        samples = [[b[..., k] if i in moved else b for i, b in enumerate(batched)] for k in range(3)]
        expected = [usual(loss_of(function, dy), s) for s in samples]
        for a, *e in zip(vmap(grad(loss_of(function, dy), every), in_dims)(*batched), *expected, strict=True):
            close(a, torch.stack(e))
        whole = grad(lambda *b, in_dims=in_dims: vmap(loss_of(function, dy), in_dims)(*b).sum(), every)(*batched)
        for i, (a, *e) in enumerate(zip(whole, *expected, strict=True)):
            close(a, torch.stack(e, -1) if i in moved else sum(e))


def test_compiled_grad(problem):
    function, tensors, dy = problem
    torch.compiler.reset()  # it would count all problems as one function compiled again and again, of which it takes eight
    compiled = torch.compile(lambda *t: grad(loss_of(function, dy))(*t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), grad(loss_of(function, dy))(*tensors))


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def dual_without_grad(function, x):
    with torch.no_grad():
        return dual(function, x)


def twice(function, x):
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.sum(), x)


def loss(function):
    return lambda x: function(x).square().sum()


REFUSALS = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "dual": dual,
    "dual under no_grad": dual_without_grad,
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(loss(f))(x),
    "twice": twice,
    "grad of grad": lambda f, x: grad(lambda x: grad(loss(f))(x).sum())(x),
    "jacrev of grad": lambda f, x: jacrev(grad(loss(f)))(x),
    "jvp of grad": lambda f, x: jvp(grad(loss(f)), (x,), (x,)),
    "grad of jvp": lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1].sum())(x),
    "jvp of vmap": lambda f, x: jvp(vmap(f), (x[None],), (x[None],)),
    "vmap of jvp": lambda f, x: vmap(lambda x: jvp(f, (x,), (x,)))(x[None]),
    "vmap of grad of grad": lambda f, x: vmap(grad(lambda x: grad(loss(f))(x).sum()))(x[None]),
    "autograd's jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),
    "autograd's hessian": lambda f, x: torch.autograd.functional.hessian(loss(f), x, vectorize=True),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_what_has_no_formula_raises(problem, refused):
    function, tensors, _ = problem
    for i, x in enumerate(tensors):
        with pytest.raises(RuntimeError, match=REFUSED):
            REFUSALS[refused](lambda x, i=i: function(*tensors[:i], x, *tensors[i + 1 :]), x)


def test_the_reference_has_what_is_refused(problem):
    function, tensors, dy = problem
    tensors, dy = [t.double() for t in tensors], dy.double()
    tangents = tuple(torch.randn_like(t) for t in tensors)

    def reference(*tensors):
        return function(*tensors, backend="reference")

    _, forward = jvp(reference, tuple(tensors), tangents)
    backward = usual(loss_of(reference, dy), tensors)
    torch.testing.assert_close((forward * dy).sum(), sum((g * t).sum() for g, t in zip(backward, tangents, strict=True)))


def passes():
    """Each pass of mdta as a function of x and the parameters."""
    _, tensors, _ = call("mdta", "SMALL")
    sums = mdta_statistics(tensors[0], tensors[1:], 2, 0, 4)
    statistics = lambda x, *parameters: mdta_statistics(x, parameters, 2, 1, 3)[0]  # noqa: E731
    return tensors, {"statistics": statistics, "apply": lambda x, *parameters: mdta_apply(x, parameters, 2, sums)}


@pytest.mark.parametrize("name", ["statistics", "apply"])
def test_passes_have_no_derivative_and_are_mapped(name):
    tensors, functions = passes()
    function = functions[name]
    for i, x in enumerate(tensors):
        alone = lambda x, i=i: function(*tensors[:i], x, *tensors[i + 1 :])  # noqa: E731
        for refused in (dual, lambda f, x: jvp(f, (x,), (x,)), lambda f, x: grad(lambda x: f(x).sum())(x)):
            with pytest.raises(RuntimeError, match=f"mdta_{name}: a derivative is not implemented; use backend='reference'"):
                refused(alone, x)
        batched = varied(x, -1)
        assert torch.equal(vmap(alone, -1)(batched), torch.stack([alone(batched[..., k]) for k in range(3)]))


def test_apply_mapped_over_statistics():
    _, (x, *parameters), _ = call("mdta", "SMALL")
    several = [mdta_statistics(x * s, parameters, 2, 0, 4) for s in (1, 2)]
    actual = vmap(lambda *sums: mdta_apply(x, parameters, 2, sums))(*map(torch.stack, zip(*several, strict=True)))
    assert torch.equal(actual, torch.stack([mdta_apply(x, parameters, 2, s) for s in several]))


@pytest.mark.parametrize("name", ["restormer_nano", "mamba_small"])
def test_networks(name):
    """As one op: gradients of all parameters by torch.func, and no forward-mode derivative."""
    network = create_model(name).eval()
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(RuntimeError, match=REFUSED):
        jvp(network, (x,), (x,))
    parameters = dict(network.named_parameters())
    actual = grad(lambda p: functional_call(network, p, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(network(x).square().sum(), list(parameters.values()))
    for a, e in zip(actual.values(), expected, strict=True):
        close(a, e)

import pytest
import torch
import torch.nn.functional as F
from backend import BACKEND, COMPILED, DEVICE, DTYPES, INTERPRETED, OPCHECKS, PLACE, raw_op
from calls import sequence_call, threads
from gold import assert_as_good_as_reference
from torch import library

from autohdr.kernels import add_norm

SHAPES = [(3, 5, 16), (7, 1), (260, 48), (2, 9, 33), (4, 256), (3, 260), (2, 1536), (1, 1999)]  # [..., channels]
SMALL, PLAIN, LARGE = (2, 7, 24), (5, 7), (2, 300, 96)
MIXED = [("f32", "f32"), ("f32", "bf16"), ("f32", "f16"), ("bf16", "bf16"), ("f16", "f16")]  # stream and branch


def arguments(shape, x=torch.float32, branch=torch.float32):
    """(tensors by name, the gradients of y and of its norm)."""
    g = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    t = {"x": 3 * randn(*shape).to(x) + 2, "branch": randn(*shape).to(branch)}
    t |= {"scale": randn(shape[-1]) / 2, "norm_weight": 1 + randn(shape[-1]) / 3, "norm_bias": randn(shape[-1]) / 3}
    return t, (randn(*shape).to(x), randn(*shape).to(branch))


def call(shape):
    """As one result: the tests of all ops take one."""

    def both(*args, **keywords):
        return torch.cat(add_norm(*args, **keywords), -1)

    tensors, grads = arguments(shape)
    return sequence_call(both, tensors, {}, torch.cat(grads, -1))


def run(tensors, grads, **more):
    """[y, its norm, the gradient of every tensor]; of an output whose gradient is None nobody asks for one."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    outputs = add_norm(**leaves, **more)
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    found = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [g for _, g in used], materialize_grads=True)
    return [*(o.detach() for o in outputs), *found]


CASES = [
    pytest.param(shape, DTYPES[x], DTYPES[branch], id="-".join(["x".join(map(str, shape)), x, branch]))
    for i, shape in enumerate(SHAPES)
    for j, (x, branch) in enumerate(MIXED)
    if not INTERPRETED or j == i % len(MIXED)  # it is slow: every shape in one pair of dtypes
]


def assert_good(tensors, grads):
    """What has the stream's dtype, then what has the branch's, with the parameters' gradients."""
    gold = run({k: v.double() for k, v in tensors.items()}, grads, backend="reference")
    results = [run(tensors, grads, backend=BACKEND), run(tensors, grads, backend="reference"), gold]
    rows = tensors["x"].numel() // tensors["x"].shape[-1]
    for name, picked in (("x", (0, 2)), ("branch", (1, 3, 4, 5, 6))):
        assert_as_good_as_reference(*([r[i] for i in picked] for r in results), tensors[name].dtype, rows)


@pytest.mark.parametrize(("shape", "x", "branch"), CASES)
def test_forward_and_backward(shape, x, branch, isa):
    assert_good(*arguments(shape, x, branch))


@pytest.mark.parametrize("missing", [0, 1], ids=["y", "norm"])
def test_an_output_without_a_gradient(missing, isa):
    tensors, grads = arguments((9, 40), branch=torch.bfloat16)
    assert_good(tensors, [None if i == missing else g for i, g in enumerate(grads)])


def test_constant_rows(isa):
    """Whose variance is 0: the mean must be exact, or 1 / √eps multiplies its error."""
    tensors, grads = arguments((4, 48))
    tensors |= {"x": torch.full((4, 48), 1000.1, device=DEVICE), "branch": torch.zeros(4, 48, device=DEVICE)}
    y, normed, *_ = run(tensors, grads, backend=BACKEND)
    assert torch.equal(y, tensors["x"]) and torch.equal(normed, tensors["norm_bias"].expand(4, 48))


def test_definition():
    tensors, _ = arguments((3, 6))
    x, branch, scale, weight, bias = (t.double() for t in tensors.values())
    y, normed = add_norm(x, branch, scale, weight, bias, eps=0.3, backend="reference")
    torch.testing.assert_close(y, x + scale * branch)
    centred = y - y.mean(-1, keepdim=True)
    torch.testing.assert_close(normed, centred / (centred.square().mean(-1, keepdim=True) + 0.3).sqrt() * weight + bias)


def test_the_norm_is_of_the_sum_before_it_is_rounded():
    tensors, _ = arguments((6, 64), torch.bfloat16, torch.bfloat16)
    _, normed = add_norm(**tensors, backend=BACKEND)
    wide = {k: v.double() for k, v in tensors.items()}
    y, exact = add_norm(**wide, backend="reference")
    late = F.layer_norm(y.bfloat16().double(), (64,), wide["norm_weight"], wide["norm_bias"])
    assert (normed - exact).square().mean() < (late.bfloat16() - exact).square().mean()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "unaligned"])
def test_layouts(layout):
    tensors, grads = arguments((6, 8))
    expected = run(tensors, grads, backend=BACKEND)
    change = {
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
        "transposed": lambda t: t.mT.contiguous().mT,
        "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }[layout]
    moved = {k: change(v) if v.dim() == 2 else v for k, v in tensors.items()}
    torch.testing.assert_close(run(moved, [change(g) for g in grads], backend=BACKEND), expected, rtol=1e-6, atol=1e-6)


def test_gradcheck():
    leaves = [t.double().requires_grad_() for t in arguments((3, 5))[0].values()]
    assert torch.autograd.gradcheck(lambda *t: add_norm(*t, backend="reference"), leaves)


def test_opcheck():
    tensors = [t.requires_grad_() for t in arguments(SMALL)[0].values()]
    library.opcheck(raw_op("add_norm"), (*tensors, 1e-5), test_utils=OPCHECKS)


@pytest.mark.parametrize("backend", COMPILED)
def test_compile_fullgraph(backend):
    tensors, grads = arguments(SMALL)
    results = []
    for f in (torch.compile(add_norm, fullgraph=True, backend="aot_eager"), add_norm):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        outputs = f(*leaves, backend=backend)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_saves_the_inputs_alone():
    leaves = {k: v.requires_grad_() for k, v in arguments(SMALL)[0].items()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        add_norm(**leaves, backend=BACKEND)
    assert saved.keys() == {t.data_ptr() for t in leaves.values()}


def test_double_backward_raises():
    tensors, _ = arguments(SMALL)
    x = tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(add_norm(**tensors, backend=BACKEND)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="add_norm: a second derivative is not implemented"):
        dx.sum().backward()


def test_the_same_bits_at_any_number_of_threads():
    case = arguments((300, 20), branch=torch.bfloat16)
    results = []
    for n in (1, 2, 7, 7) if BACKEND == "cpu" else (1, 1):
        with threads(n):
            results.append(run(*case, backend=BACKEND))
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, results[0], strict=True))


def test_autocast_casts_the_branch_alone():
    tensors, _ = arguments(SMALL)
    for backend in (BACKEND, "reference"):
        with torch.autocast(DEVICE, torch.bfloat16):
            y, normed = add_norm(**tensors, backend=backend)
        assert y.dtype == torch.float32 and normed.dtype == torch.bfloat16
        expected = add_norm(**tensors | {"branch": tensors["branch"].bfloat16()}, backend=backend)
        assert torch.equal(y, expected[0]) and torch.equal(normed, expected[1])


def test_parameters_in_bfloat16():
    tensors, grads = arguments(SMALL)
    narrow = {k: v if k in ("x", "branch") else v.bfloat16() for k, v in tensors.items()}
    actual = run(narrow, grads, backend=BACKEND)
    expected = run({k: v.float() for k, v in narrow.items()}, grads, backend=BACKEND)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


def test_nan_stays_in_its_row():
    tensors, _ = arguments(SMALL)
    tensors["branch"][1, 3, 20] = torch.nan
    y, normed = add_norm(**tensors, backend=BACKEND)
    assert y.isnan().sum() == 1 and normed[1, 3].isnan().all()
    normed[1, 3] = 0
    assert normed.isfinite().all()


def test_no_rows():
    tensors, _ = arguments(SMALL)
    leaves = {k: (v[:0] if v.dim() == 3 else v).requires_grad_() for k, v in tensors.items()}
    outputs = add_norm(**leaves, backend=BACKEND)
    assert [o.shape for o in outputs] == [leaves["x"].shape] * 2
    grads = torch.autograd.grad(sum(o.sum() for o in outputs), list(leaves.values()))
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves.values(), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x", None, r"x must be a floating \[..., channels\] of 1 to 4096 channels, got NoneType"),
        ("x", torch.zeros(6), r"x must be a floating .*got torch.float32 \[6\]"),
        ("x", torch.zeros(2, 0), "x must be a floating .*of 1 to 4096 channels"),
        ("x", torch.zeros(1, 4097), r"x must be .*of 1 to 4096 channels, got torch.float32 \[1, 4097\]"),
        ("x", torch.zeros(2, 7, 24, dtype=torch.int32), "x must be a floating .* got torch.int32"),
        ("branch", torch.zeros(7, 24), r"branch must be \[2, 7, 24\], got \[7, 24\]"),
        ("branch", torch.zeros(2, 7, 24, dtype=torch.float64), "branch must be torch.float32 as x is.* got torch.float64"),
        ("scale", torch.zeros(23), r"scale must be \[24\], got \[23\]"),
        ("norm_weight", 0.5, r"norm_weight must be a tensor \[24\], got float"),
        ("norm_bias", torch.zeros(24, device="meta"), f"norm_bias must be on {PLACE} as x is, got meta"),
    ],
)
def test_rejects_arguments(key, value, message):
    tensors, _ = arguments(SMALL)
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        value = value.to(DEVICE)
    with pytest.raises(ValueError, match=f"add_norm: {message}"):
        add_norm(**{**tensors, key: value})


def test_rejects_a_dtype_that_the_backend_does_not_take():
    tensors = {k: v.double() for k, v in arguments(SMALL)[0].items()}
    with pytest.raises(RuntimeError, match="it takes float32, bfloat16 or float16, x is torch.float64"):
        add_norm(**tensors, backend=BACKEND)


@pytest.mark.skipif(BACKEND == "triton", reason="its functions are not registered by C++")
def test_the_compiled_kernels_refuse_dtypes_that_do_not_go_together():
    tensors, _ = arguments(SMALL, torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError, match="add_norm: branch must have the dtype of x, or x be float32"):
        raw_op("add_norm")(*tensors.values(), 1e-5)
    tensors, (dy, d_normed) = arguments(SMALL)
    for name, grads in (("dy", (dy.bfloat16(), d_normed)), ("d_normed", (dy, d_normed.bfloat16()))):
        with pytest.raises(RuntimeError, match=f"add_norm: {name} must have the dtype of its output"):
            raw_op("add_norm_backward")(*grads, *tensors.values(), 1e-5)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backend import BACKEND, COMPILED, DEVICE, DTYPES, INTERPRETED, OPCHECKS, PLACE, SLOW, raw_op
from calls import sequence_call, threads
from gold import assert_as_good_as_reference
from torch import library

from autohdr.kernels import causal_conv1d

SHAPES = [  # batch, dim, seqlen, width, what else
    (2, 64, 129, 4, "bias"),
    (1, 5, 1, 4, "bias bld reverse"),
    (2, 3, 2, 3, "reverse"),
    (2, 130, 63, 4, "bld bias reverse"),
    (1, 33, 600, 4, "bias reverse"),
    (1, 3, 1160, 3, "bias"),
    (2, 40, 530, 2, "bld bias"),
    (1, 7, 60, 16, "bld"),
    (3, 2, 40, 1, "bias"),
]
SMALL, PLAIN, LARGE = (2, 6, 150, 4, "bias"), (2, 6, 9, 4, "bld"), (2, 64, 700, 4, "bias")


def name(shape, dtype):
    *sizes, features = shape
    return "-".join([*(f"{n}{s}" for n, s in zip("BDLK", sizes, strict=True)), *features.split(), dtype])


def arguments(shape, dtype=torch.float32):
    """(tensors by name, keywords, the gradient of y)."""
    batch, dim, seqlen, width, features = shape
    g = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    sequence = (batch, seqlen, dim) if "bld" in features else (batch, dim, seqlen)
    t = {"x": randn(*sequence).to(dtype), "weight": randn(dim, width)}
    if "bias" in features:
        t["bias"] = randn(dim)
    keywords = {"reverse": "reverse" in features, "layout": "bld" if "bld" in features else "bdl"}
    return t, keywords, randn(*sequence).to(dtype)


def call(shape):
    return sequence_call(causal_conv1d, *arguments(shape))


def run(tensors, keywords, dy, **more):
    """[y, the gradient of every tensor]."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    y = causal_conv1d(**leaves, **keywords, **more)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]


def raw_arguments(tensors, keywords):
    return tensors["x"], tensors["weight"], tensors.get("bias"), keywords["reverse"], keywords["layout"] == "bld"


CASES = [
    pytest.param(s, DTYPES[d], id=name(s, d))
    for i, s in enumerate(SHAPES)
    for j, d in enumerate(DTYPES)
    if not INTERPRETED or j == i % 3  # it is slow: every shape in one dtype
]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_backward(shape, dtype, isa):
    tensors, keywords, dy = arguments(shape, dtype)
    gold = run({k: v.double() for k, v in tensors.items()}, keywords, dy, backend="reference")
    reference, actual = (run(tensors, keywords, dy, backend=b) for b in ("reference", BACKEND))
    assert_as_good_as_reference(actual, reference, gold, dtype, shape[0] * shape[2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("features", ["bias", "bld reverse"])
def test_short_and_constant_sequences(features, dtype, isa):
    """Random sequences, constant ones and zeros, of one token, two and some."""
    for length in (1, 2, 19):
        tensors, keywords, dy = arguments((3, 5, length, 4, features), dtype)
        x = tensors["x"]
        x[1] = x[1, :1].clone() if "bld" in features else x[1, :, :1].clone()
        x[2] = 0
        gold = run({k: v.double() for k, v in tensors.items()}, keywords, dy, backend="reference")
        reference, actual = (run(tensors, keywords, dy, backend=b) for b in ("reference", BACKEND))
        assert_as_good_as_reference(actual, reference, gold, dtype, 3 * length)


@pytest.mark.parametrize("reverse", [False, True])
def test_definition(reverse):
    """The reference against the formula, token by token."""
    tensors, keywords, _ = arguments((1, 3, 7, 4, "bias"))
    x, weight, bias = (tensors[k].double() for k in ("x", "weight", "bias"))
    expected = torch.zeros_like(x)
    for t in range(7):
        total = bias.clone()
        for k in range(4):
            s = t + 3 - k if reverse else t - 3 + k
            if 0 <= s < 7:
                total += weight[:, k] * x[0, :, s]
        expected[0, :, t] = F.silu(total)
    torch.testing.assert_close(causal_conv1d(x, weight, bias, reverse=reverse, backend="reference"), expected)


def test_reverse_is_flipped():
    tensors, keywords, dy = arguments(SMALL)
    expected = run({**tensors, "x": tensors["x"].flip(2)}, keywords, dy.flip(2), backend=BACKEND)
    actual = run(tensors, {**keywords, "reverse": True}, dy, backend=BACKEND)
    torch.testing.assert_close(actual, [e.flip(2) if e.dim() == 3 else e for e in expected], rtol=1e-5, atol=1e-5)


def test_layouts_agree():
    tensors, keywords, dy = arguments(SMALL)
    moved = {**tensors, "x": tensors["x"].mT.contiguous()}
    expected = run(tensors, keywords, dy, backend=BACKEND)
    actual = run(moved, {**keywords, "layout": "bld"}, dy.mT, backend=BACKEND)
    torch.testing.assert_close([a.mT if a.dim() == 3 else a for a in actual], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize("features", ["bias", "bld bias"])
def test_noncontiguous(layout, features):
    tensors, keywords, dy = arguments((*SMALL[:4], features))
    expected = run(tensors, keywords, dy, backend=BACKEND)
    if layout == "sliced":
        x, dy = torch.cat([tensors["x"]] * 2, 2)[..., : dy.shape[2]], torch.stack([dy, dy], -1)[..., 0]
    else:
        x, dy = tensors["x"].mT.contiguous().mT, dy.mT.contiguous().mT
    for a, e in zip(run({**tensors, "x": x}, keywords, dy, backend=BACKEND), expected, strict=True):
        assert torch.equal(a, e)


def test_gradcheck():
    tensors, keywords, _ = arguments((2, 3, 5, 4, "bias reverse"))
    leaves = [t.double().requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, **keywords, backend="reference"), leaves)


@pytest.mark.parametrize("features", ["bias", "bld reverse"])
def test_opcheck(features):
    tensors, keywords, _ = arguments((2, 6, 20, 4, features))
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    library.opcheck(raw_op("causal_conv1d"), raw_arguments(tensors, keywords), test_utils=OPCHECKS)


@pytest.mark.skipif(BACKEND == "triton", reason="its functions are not registered by C++")
def test_the_compiled_kernels_refuse_a_gradient_of_another_dtype():
    tensors, keywords, dy = arguments(SMALL)
    with pytest.raises(RuntimeError, match="causal_conv1d: dy must have the dtype of x"):
        raw_op("causal_conv1d_backward")(dy.bfloat16(), *raw_arguments(tensors, keywords))


@pytest.mark.parametrize("backend", COMPILED)
def test_compile_fullgraph(backend):
    tensors, keywords, dy = arguments(SMALL)

    def function(x, weight, bias):
        return causal_conv1d(x, weight, bias, **keywords, backend=backend).relu()

    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        results.append([f(*leaves), *torch.autograd.grad(f(*leaves), leaves, dy)])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_saves_the_inputs_alone():
    tensors, keywords, _ = arguments(SMALL)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        causal_conv1d(**leaves, **keywords, backend=BACKEND)
    assert saved.keys() == {t.data_ptr() for t in leaves.values()}


def test_double_backward_raises():
    tensors, keywords, _ = arguments(SMALL)
    x = tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(causal_conv1d(**tensors, **keywords, backend=BACKEND).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d: a second derivative is not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize("features", ["bias", "bld bias"])
def test_the_same_bits_at_any_number_of_threads(features):
    case = arguments((1, 70, 140, 4, features) if SLOW else (2, 150, 300, 4, features))
    results = []
    for n in (1, 2, 7, 7) if BACKEND == "cpu" else (1, 1):
        with threads(n):
            results.append(run(*case, backend=BACKEND))
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, results[0], strict=True))


def test_autocast_casts_x_alone():
    tensors, keywords, _ = arguments(SMALL)
    for backend in (BACKEND, "reference"):
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = causal_conv1d(**tensors, **keywords, backend=backend)
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, causal_conv1d(**{**tensors, "x": tensors["x"].bfloat16()}, **keywords, backend=backend))


def test_parameters_in_bfloat16():
    tensors, keywords, dy = arguments(SMALL)
    narrow = {k: v if k == "x" else v.bfloat16() for k, v in tensors.items()}
    actual = run(narrow, keywords, dy, backend=BACKEND)
    expected = run({k: v.float() for k, v in narrow.items()}, keywords, dy, backend=BACKEND)
    for a, e, t in zip(actual[1:], expected[1:], narrow.values(), strict=True):
        assert torch.equal(a, e.to(t.dtype))


def test_nan_reaches_the_tokens_behind_it():
    tensors, keywords, _ = arguments(SMALL)
    tensors["x"][1, 3, 20] = torch.nan
    y = causal_conv1d(**tensors, **keywords, backend=BACKEND)
    assert y[1, 3, 20:24].isnan().all()
    y[1, 3, 20:24] = 0
    assert y.isfinite().all()


def test_elements_beyond_2_to_the_31():
    """Strides that no int32 holds, over memory that is never touched."""
    try:
        memory = torch.from_numpy(np.zeros(2**31 + 8000, np.int16)).view(torch.bfloat16).to(DEVICE)
    except (MemoryError, torch.OutOfMemoryError):
        pytest.skip("no room for the address range")
    tensors, keywords, dy = arguments((2, 40, 150, 4, "bias"), torch.bfloat16)
    far = memory.as_strided((2, 40, 150), (2**31, 150, 1))
    far.copy_(tensors["x"])
    expected = run(tensors, keywords, dy, backend=BACKEND)
    for a, e in zip(run({**tensors, "x": far}, keywords, dy, backend=BACKEND), expected, strict=True):
        assert torch.equal(a, e)


def test_empty_batch():
    tensors, keywords, _ = arguments(SMALL)
    leaves = {k: (v[:0] if k == "x" else v).requires_grad_() for k, v in tensors.items()}
    y = causal_conv1d(**leaves, **keywords, backend=BACKEND)
    assert y.shape == leaves["x"].shape
    grads = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves.values(), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", None, "weight must be a tensor, got NoneType"),
        ("x", torch.zeros(6, 150), r"x must be a floating \[batch, dim, seqlen\].*got torch.float32 \[6, 150\]"),
        ("x", torch.zeros(2, 6, 0), "x must be a floating .* with no empty sequence"),
        ("x", torch.zeros(2, 6, 150, dtype=torch.int32), "x must be a floating .* got torch.int32"),
        ("weight", torch.zeros(5, 4), r"weight must be \[6, width\] with width from 1 to 16, got \[5, 4\]"),
        ("weight", torch.zeros(6, 17), r"weight must be \[6, width\].*got \[6, 17\]"),
        ("weight", torch.zeros(6, 1, 4), r"weight must be \[6, width\].*got \[6, 1, 4\]"),
        ("bias", 0.5, r"bias must be a tensor \[6\], got float"),
        ("bias", torch.zeros(5), r"bias must be \[6\], got \[5\]"),
        ("bias", torch.zeros(6, dtype=torch.int64), "bias must be floating, got torch.int64"),
        ("bias", torch.zeros(6, device="meta"), f"bias must be on {PLACE} as x is, got meta"),
        ("layout", "lbd", "layout must be 'bdl' or 'bld', got 'lbd'"),
    ],
)
def test_rejects_arguments(key, value, message):
    tensors, keywords, _ = arguments(SMALL)
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        value = value.to(DEVICE)
    with pytest.raises(ValueError, match=f"causal_conv1d: {message}"):
        causal_conv1d(**{**tensors, **keywords, key: value})


def test_rejects_a_dtype_that_the_backend_does_not_take():
    tensors, keywords, _ = arguments(SMALL)
    tensors["x"] = tensors["x"].double()
    with pytest.raises(RuntimeError, match="it takes float32, bfloat16 or float16, x is torch.float64"):
        causal_conv1d(**tensors, **keywords, backend=BACKEND)

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from backend import BACKEND, COMPILED, DEVICE, DTYPES, INTERPRETED, OPCHECKS, PLACE, SLOW, raw_op
from calls import sequence_call, threads
from gold import assert_as_good_as_reference
from torch import library

from autohdr.kernels import selective_scan
from autohdr.kernels.selective_scan.declaration import CHUNK

SEQUENCES = ("u", "delta", "B", "C", "z")


def tokens(n):
    """As many chunks of CHUNK tokens as n have of 128; Triton's interpreter makes chunks shorter."""
    return math.ceil(n * CHUNK / 128)


# In the emulation of CUDA a backward pass takes two rounds of a chunk, in launches of 2 entries and 1 (the first shape), rounds
# of 2 chunks and 1 (40 channels), and rounds in segments of 2 chunks and 1 (130 channels); on a GPU these shapes take one.
SHAPES = [  # batch, dim, seqlen, dstate, groups, what else
    (3, 64, tokens(145), 16, 1, "D z bias softplus"),
    (1, 5, 1, 16, 1, "D z bias softplus initial"),
    (2, 3, 2, 1, 1, "bld reverse z initial"),
    (1, 33, tokens(63), 7, 3, "bld D bias softplus"),
    (1, 39, tokens(1000), 5, 1, "reverse D z bias softplus initial"),
    (2, 40, tokens(300), 8, 2, "bld reverse rank1 D z bias softplus initial"),
    (1, 20, tokens(257), 16, 1, "rank1 D bias softplus"),
    (1, 21, tokens(140), 20, 1, "D z bias softplus"),
    (2, 3, 20, 64, 1, "bld D z"),
    (1, 5, tokens(130), 128, 1, "reverse z bias softplus initial"),
    (1, 2, 10, 256, 1, "bias"),
    (3, 8, tokens(40), 2, 8, "softplus D"),
    (1, 130, tokens(260), 3, 1, "bld"),
    # Rows of whole 16 bytes, so that CUDA copies whole windows by vectors; beside them a last one of some tokens and channels.
    (2, 48, tokens(168), 16, 1, "D z bias softplus"),
    (1, 40, tokens(136), 16, 1, "bld reverse D z bias softplus initial"),
]


def name(shape, dtype):
    *sizes, features = shape
    sizes = "-".join(f"{n}{s}" for n, s in zip("BDLNG", sizes, strict=True))
    return "-".join([sizes, *features.split(), dtype])


CASES = [
    pytest.param(s, DTYPES[d], id=name(s, d))
    for i, s in enumerate(SHAPES)
    for j, d in enumerate(DTYPES)
    if not INTERPRETED or j == i % 3  # it is slow: every shape in one dtype
]
BATCH = 1 if INTERPRETED else 2
SMALL, PLAIN = (BATCH, 6, tokens(150), 4, 2, "D z bias softplus initial"), (2, 6, 9, 3, 2, "bld")
LARGE = (2, 64, 700, 16, 1, "D z bias softplus")


def arguments(shape, dtype=torch.float32):
    """(tensors by name, keywords, gradients of out and last_state)."""
    batch, dim, seqlen, dstate, groups, features = shape
    features = features.split()
    g = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=g).to(DEVICE)

    t = {"u": randn(batch, dim, seqlen), "delta": 0.7 * randn(batch, 1 if "rank1" in features else dim, seqlen) - 1}
    if "softplus" not in features:
        t["delta"] = t["delta"].abs() / 2
    t["A"] = -(0.5 + 2 * torch.rand(dim, dstate, generator=g).to(DEVICE))
    t["B"], t["C"] = randn(batch, groups, dstate, seqlen), randn(batch, groups, dstate, seqlen)
    t["z"] = randn(batch, dim, seqlen)
    optional = {
        "D": ("D", randn(dim)),
        "bias": ("delta_bias", 0.3 * torch.rand(dim, generator=g).to(DEVICE)),
        "rank1": ("delta_weight", 0.5 + torch.rand(dim, generator=g).to(DEVICE)),
        "initial": ("initial_state", randn(batch, dim, dstate)),
    }
    for feature, (key, value) in optional.items():
        if feature in features:
            t[key] = value
    if "z" not in features:
        del t["z"]
    for key in SEQUENCES:
        if key in t:
            t[key] = t[key].to(dtype)
            if "bld" in features:
                t[key] = t[key].movedim(-1, 1).contiguous()
    keywords = {
        "delta_softplus": "softplus" in features,
        "reverse": "reverse" in features,
        "layout": "bld" if "bld" in features else "bdl",
        "return_last_state": True,
    }
    return t, keywords, (randn(*t["u"].shape).to(dtype), randn(batch, dim, dstate))


def call(shape):
    tensors, keywords, (d_out, _) = arguments(shape)
    return sequence_call(selective_scan, tensors, keywords | {"return_last_state": False}, d_out)


def run(tensors, keywords, grads, **more):
    """[out, last_state, the gradient of every tensor]."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    outputs = selective_scan(**leaves, **keywords, **more)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, list(leaves.values()), grads))


@functools.cache
def expected(shape, dtype):
    """The gold, and the reference in the same dtype."""
    tensors, keywords, grads = arguments(shape, dtype)
    gold = run({k: v.double() for k, v in tensors.items()}, keywords, grads, backend="reference")
    return gold, run(tensors, keywords, grads, backend="reference")


def assert_good(outputs, dtype, tokens):
    """Each output as (actual, reference, gold), in the order of assert_as_good_as_reference."""
    actual, reference, gold = zip(*outputs, strict=True)
    assert [a.dtype for a in actual] == [r.dtype for r in reference]
    if dtype == torch.float16:  # judged in float32: the reference's error has the rounding of its output in it
        actual, reference, dtype = [a.float() for a in actual], [r.float() for r in reference], torch.float32
    assert_as_good_as_reference(actual, reference, gold, dtype, tokens)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_backward(shape, dtype, isa):
    gold, reference = expected(shape, dtype)
    actual = run(*arguments(shape, dtype), backend=BACKEND)
    out, last_state, *grads = zip(actual, reference, gold, strict=True)
    for output in (out, last_state):
        assert_good([output], dtype, shape[2])
    grads = dict(zip(arguments(shape, dtype)[0], grads, strict=True))
    parameters = [grads.pop(k) for k in ("A", "D", "delta_bias", "delta_weight") if k in grads]
    assert_good([out, grads.pop("u"), *parameters], dtype, shape[0] * shape[2])
    for grad in grads.values():
        assert_good([out, grad], dtype, shape[0] * shape[2])


SHORT = [(f, d) for f in ("D z bias softplus initial", "bld reverse rank1 bias softplus") for d in DTYPES.values()]


@pytest.mark.parametrize(("features", "dtype"), SHORT[::2] if SLOW else SHORT, ids=str)
def test_short_and_constant_sequences(features, dtype, isa):
    """Random sequences, constant ones and zeros, of one token, two and some."""
    for length in (1, 2, 19):
        tensors, keywords, grads = arguments((3, 5, length, 4, 1, features), dtype)
        for t in (tensors[k] for k in SEQUENCES if k in tensors):
            t[1] = t[1, :1].clone() if "bld" in features else t[1, ..., :1].clone()
            t[2] = 0
        gold = run({k: v.double() for k, v in tensors.items()}, keywords, grads, backend="reference")
        reference, actual = (run(tensors, keywords, grads, backend=b) for b in ("reference", BACKEND))
        for output in zip(actual, reference, gold, strict=True):
            assert_good([output], dtype, 3 * length)


def test_definition():
    """The reference against the equations, one channel, state and token at a time."""
    t, keywords, _ = arguments((1, 4, 5, 2, 2, "D z bias softplus initial"))
    t = {k: v.double() for k, v in t.items()}
    out, last = selective_scan(**t, **keywords)
    for d in range(4):
        h, group = t["initial_state"][0, d], d // 2
        for i in range(5):
            step = math.log1p(math.exp(t["delta"][0, d, i] + t["delta_bias"][d]))
            h = torch.exp(step * t["A"][d]) * h + step * t["u"][0, d, i] * t["B"][0, group, :, i]
            y = h @ t["C"][0, group, :, i] + t["D"][d] * t["u"][0, d, i]
            z = t["z"][0, d, i]
            torch.testing.assert_close(out[0, d, i], y * z / (1 + torch.exp(-z)))
        torch.testing.assert_close(last[0, d], h)


@pytest.mark.parametrize("features", ["D z bias softplus initial", "bld reverse rank1 D z bias softplus initial", ""])
def test_gradcheck(features):
    tensors, keywords, _ = arguments((1, 2, 3, 2, 1, features))
    leaves = [t.double().requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(**dict(zip(tensors, t, strict=True)), **keywords), leaves)


@pytest.mark.parametrize("features", ["D z bias softplus initial", "bld reverse rank1 bias softplus", ""])
def test_opcheck(features):
    t, keywords, _ = arguments((BATCH, 6, tokens(150), 4, 2, features))
    t = {k: v.requires_grad_() for k, v in t.items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_weight", "initial_state")
    flags = (keywords["delta_softplus"], keywords["reverse"], keywords["layout"] == "bld", False, False)
    library.opcheck(raw_op("selective_scan"), (*(t.get(n) for n in names), *flags), test_utils=OPCHECKS)


@pytest.mark.parametrize("shape", [SMALL, (BATCH, 6, tokens(150), 4, 2, "bld reverse rank1 softplus")])
@pytest.mark.parametrize("backend", COMPILED)
def test_compile_fullgraph(shape, backend):
    tensors, keywords, grads = arguments(shape)

    def function(*values):
        out, last_state = selective_scan(**dict(zip(tensors, values, strict=True)), **keywords, backend=backend)
        return out.relu(), last_state

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, function):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        outputs = f(*leaves)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_export_with_dynamic_seqlen(layout):
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, layout=layout, return_last_state=True, backend=BACKEND)

    def inputs(seqlen):
        return tuple(arguments((BATCH, 6, seqlen, 4, 2, layout if layout == "bld" else ""))[0].values())

    seqlen = torch.export.Dim("seqlen", min=2, max=100000)
    axes = {"bdl": (2, 2, None, 3, 3), "bld": (1, 1, None, 1, 1)}[layout]
    shapes = tuple({} if axis is None else {axis: seqlen} for axis in axes)
    exported = torch.export.export(Scan(), inputs(tokens(300)), dynamic_shapes=shapes).module()
    for length in (2, CHUNK, tokens(517)):
        for a, e in zip(exported(*inputs(length)), Scan()(*inputs(length)), strict=True):
            assert torch.equal(a, e)


def assert_same(actual, expected):
    """The same bits, but for Triton on a GPU: its compiler lays a tile out, and so orders its sums, by the sequences' strides."""
    if BACKEND == "triton" and DEVICE == "cuda":
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(actual, expected)


RESTRIDED = [(s, f) for s in ("sliced", "other order", "every second", "expanded") for f in ("", "bld")]
if SLOW:  # each layout with every second one
    RESTRIDED = [pair for i, pair in enumerate(RESTRIDED) if i % 4 in (0, 3)]


@pytest.mark.parametrize(("strides", "features"), RESTRIDED)
def test_noncontiguous(strides, features):
    """The same bits whatever the strides; a copy is made only where neither channels nor tokens are one apart."""
    tensors, keywords, grads = arguments((2, 6, tokens(150), 4, 2, features + " D z bias softplus initial"))

    def restride(t):
        if strides == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if strides == "other order":
            inner = -2 if features == "" else 1
            return t.movedim(inner, -1).contiguous().movedim(-1, inner)
        if strides == "every second":
            return torch.stack([t, t], -1)[..., 0]
        return t[:1].expand_as(t)

    others = {k: restride(v) if k in SEQUENCES else v for k, v in tensors.items()}
    expected = run({k: v.contiguous() for k, v in others.items()}, keywords, grads, backend=BACKEND)
    leaves = {k: v.detach().requires_grad_() for k, v in others.items()}
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        outputs = selective_scan(**leaves, **keywords, backend=BACKEND)
    assert all((leaves[k].data_ptr() in saved) == (strides != "every second") for k in SEQUENCES)
    grads = [restride(grads[0]), grads[1]] if strides != "expanded" else grads
    actual = [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


def test_reverse_is_the_flip():
    for features in ("D z bias softplus initial", "bld D z bias softplus initial"):
        tensors, keywords, grads = arguments((BATCH, 6, tokens(150), 4, 2, features))
        axis = 1 if "bld" in features else -1
        flipped = {k: v.flip(axis) if k in SEQUENCES else v for k, v in tensors.items()}
        expected = run(flipped, keywords, (grads[0].flip(axis), grads[1]), backend=BACKEND)
        actual = run(tensors, {**keywords, "reverse": True}, grads, backend=BACKEND)
        expected[0] = expected[0].flip(axis)
        expected[2:] = [e.flip(axis) if k in SEQUENCES else e for k, e in zip(tensors, expected[2:], strict=True)]
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_layouts_agree():
    tensors, keywords, grads = arguments(SMALL)
    moved = {k: v.movedim(-1, 1).contiguous() if k in SEQUENCES else v for k, v in tensors.items()}
    expected = run(tensors, keywords, grads, backend=BACKEND)
    actual = run(moved, {**keywords, "layout": "bld"}, (grads[0].transpose(1, 2), grads[1]), backend=BACKEND)
    for k, a, e in zip(["u", "last_state", *tensors], actual, expected, strict=True):
        assert_same(a.movedim(1, -1) if k in SEQUENCES else a, e)


@pytest.mark.parametrize("reverse", [False, True])
def test_state_is_handed_on(reverse):
    """Two scans of half a sequence, the state passed between them, give the whole scan and its gradients."""
    tensors, keywords, grads = arguments(SMALL)
    keywords["reverse"] = reverse
    whole = run(tensors, keywords, grads, backend=BACKEND)
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    halves = [
        {k: v[..., s] if k in SEQUENCES else v for k, v in leaves.items()}
        for s in (slice(0, tokens(70)), slice(tokens(70), None))
    ]
    state, outputs = leaves["initial_state"], []
    for half in reversed(halves) if reverse else halves:
        out, state = selective_scan(**{**half, "initial_state": state}, **keywords, backend=BACKEND)
        outputs.append(out)
    out = torch.cat(outputs[::-1] if reverse else outputs, -1)
    actual = [out, state, *torch.autograd.grad([out, state], list(leaves.values()), grads)]
    for a, e in zip(actual, whole, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_rank_one_delta_is_the_product():
    tensors, keywords, grads = arguments((2, 20, tokens(140), 4, 2, "rank1 D z bias softplus"))
    actual = run(tensors, keywords, grads, backend=BACKEND)
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    delta = leaves["delta_weight"][:, None] * leaves["delta"]
    rest = {k: v for k, v in leaves.items() if k not in ("delta", "delta_weight")}
    outputs = selective_scan(**rest, delta=delta, **keywords, backend=BACKEND)
    expected = [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_one_group_needs_no_axis():
    for layout, axis in (("bdl", 1), ("bld", 2)):
        tensors, keywords, grads = arguments((2, 6, tokens(30), 4, 1, "bld" if layout == "bld" else ""))
        expected = run(tensors, keywords, grads, backend=BACKEND)
        actual = run({k: v.squeeze(axis) if k in "BC" else v for k, v in tensors.items()}, keywords, grads, backend=BACKEND)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e.reshape(a.shape))


def test_gates_are_accurate(isa):
    """With no input and one token the last state is exp(Δ A)."""
    x = torch.cat(
        [
            torch.linspace(-87, 88, 401 if INTERPRETED else 4001),
            -torch.logspace(-8, 0, 500),
            torch.tensor([-1e4, -1e30, -math.inf, 0, 1e4]),
        ]
    )
    x = x.to(DEVICE)
    one = torch.ones(1, len(x), 1, device=DEVICE)
    zero, nothing = torch.zeros_like(one), torch.zeros(2, 1, 1, 1, device=DEVICE)
    _, gates = selective_scan(zero, one, x[:, None], *nothing, initial_state=one, return_last_state=True, backend=BACKEND)
    gates, expected = gates.flatten().double(), torch.exp(x.double())
    assert gates[-5:].tolist() == [0, 0, 0, 1, math.inf]
    error = (gates / expected - 1).abs()[:-5]
    rounding = torch.finfo(torch.float32).eps / 2
    assert (error <= rounding * (3 + 2 * x.abs()[:-5])).all()  # a half unit, and the rounding of x log2(e)
    assert (1 - gates[-505:-5] - (1 - expected[-505:-5])).abs().max() <= 2 * rounding


def test_softplus_and_silu_are_accurate(isa):
    """With A = 0 and B = C = 1 the only token gives Δ u silu(z)."""
    x = torch.linspace(-60, 40, 501 if INTERPRETED else 5001).view(1, -1, 1).to(DEVICE)
    one, ones, zero = torch.ones(1, 1, 1, device=DEVICE), torch.ones_like(x), torch.zeros(x.shape[1], 1, device=DEVICE)
    step = selective_scan(ones, x, zero, one, one, delta_softplus=True, backend=BACKEND).double()
    expected = torch.where(x > 20, x, x.double().exp().log1p())
    assert ((step / expected) - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps
    silu = selective_scan(ones, ones, zero, one, one, z=x, backend=BACKEND).double()
    expected = torch.nn.functional.silu(x.double())
    assert (silu - expected).abs().max() <= 3e-7 * 40 and (silu / expected - 1)[x != 0].abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_saved_for_backward(dtype):
    """The inputs, and a float32 state before every chunk."""
    tensors, keywords, _ = arguments((2, 24, tokens(300), 16, 1, "D z bias softplus initial"), dtype)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        selective_scan(**leaves, **keywords, backend=BACKEND)
    inputs = {t.data_ptr() for t in leaves.values()}
    beside = sum(t.numel() * t.element_size() for pointer, t in saved.items() if pointer not in inputs)
    assert beside == 4 * 2 * 24 * 16 * math.ceil(tokens(300) / CHUNK)


@pytest.mark.parametrize("features", ["D z bias softplus initial", "bld rank1"])
def test_nothing_is_kept_without_a_backward_pass(features):
    """No states where nothing has a gradient, under no_grad, and in inference mode; the outputs are the same."""
    tensors, keywords, _ = arguments((BATCH, 6, tokens(150), 4, 2, features))
    op, names = raw_op("selective_scan"), ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_weight", "initial_state")
    flags = (keywords["delta_softplus"], keywords["reverse"], keywords["layout"] == "bld", False, False)

    def run(**given):
        return op(*({**tensors, **given}.get(n) for n in names), *flags)

    A = tensors["A"].clone().requires_grad_()
    *expected, states = run(A=A)
    assert states.shape == (BATCH * 6 * 4 * math.ceil(tokens(150) / CHUNK),)
    with torch.no_grad():
        results = [run(A=A)]
    with torch.inference_mode():
        results.append(run())
    for *outputs, states in (run(), *results):
        assert states.shape == (0,)
        for a, e in zip(outputs, expected, strict=True):
            assert torch.equal(a, e)


def test_gradient_through_one_output_alone():
    tensors, keywords, grads = arguments(SMALL)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    for i in range(2):
        results = []
        for backend in (BACKEND, "reference"):
            output = selective_scan(**leaves, **keywords, backend=backend)[i]
            results.append(torch.autograd.grad(output, list(leaves.values()), grads[i], materialize_grads=True))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_double_backward_raises():
    tensors, keywords, _ = arguments(SMALL)
    u = tensors["u"].requires_grad_()
    out, _ = selective_scan(**tensors, **keywords, backend=BACKEND)
    (du,) = torch.autograd.grad(out.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan: a second derivative is not implemented"):
        du.sum().backward()


@pytest.mark.parametrize("features", ["D z bias softplus", "bld reverse rank1 softplus"])
def test_threads(features):
    """The same bits from run to run at any number of threads, and rounding apart between them."""
    case = arguments((BATCH, 18 if INTERPRETED else 150, tokens(140), 5, 3, features))
    results = []
    for n in (1, 2, 7) if BACKEND == "cpu" else (1,):
        with threads(n):
            results.append(run(*case, backend=BACKEND))
            for a, b in zip(results[-1], run(*case, backend=BACKEND), strict=True):
                assert torch.equal(a, b)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_autocast_casts_u_and_z_alone():
    tensors, keywords, _ = arguments(SMALL)
    narrow = {k: v.bfloat16() if k in ("u", "z") else v for k, v in tensors.items()}
    for backend in (BACKEND, "reference"):
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = selective_scan(**tensors, **keywords, backend=backend)
        assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
        for a, e in zip(actual, selective_scan(**narrow, **keywords, backend=backend), strict=True):
            assert torch.equal(a, e)


def test_autocast_leaves_float64():
    tensors, keywords, _ = arguments(SMALL)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, _ = selective_scan(**{k: v.double() for k, v in tensors.items()}, **keywords)
        assert out.dtype == torch.float64
        assert selective_scan(**{**tensors, "u": tensors["u"].half()}, **keywords, backend=BACKEND)[0].dtype == torch.bfloat16


@pytest.mark.skipif(BACKEND == "triton" and DEVICE == "cpu", reason="Triton's interpreter keeps global state")
def test_called_from_several_threads_at_once():
    calls = [arguments((1, 30, 100 + i, 4, 1, "D z bias softplus")) for i in range(4)]
    expected = [run(*call, backend=BACKEND) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: run(*call, backend=BACKEND), calls * (1 if SLOW else 5)))
    for i, results in enumerate(together):
        torch.testing.assert_close(results, expected[i % 4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_in_another_dtype(dtype):
    tensors, keywords, grads = arguments(SMALL)
    others = {k: v if k in SEQUENCES else v.to(dtype) for k, v in tensors.items()}
    actual = run(others, keywords, grads, backend=BACKEND)
    expected = run({k: v.float() for k, v in others.items()}, keywords, grads, backend=BACKEND)
    for a, e, t in zip(actual[2:], expected[2:], others.values(), strict=True):
        assert torch.equal(a, e.to(t.dtype))


def test_every_sequence_may_have_its_own_dtype():
    tensors, keywords, grads = arguments(SMALL)
    dtypes = dict(zip(SEQUENCES, (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float16), strict=True))
    tensors = {k: v.to(dtypes.get(k, v.dtype)) for k, v in tensors.items()}
    actual, expected = (run(tensors, keywords, grads, backend=b) for b in (BACKEND, "reference"))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_float32_output(backend):
    """Beyond float16's range the narrow output overflows, the wide one does not; its gradient is taken in float32."""
    tensors, keywords, grads = arguments(SMALL, torch.float16)
    tensors["u"], tensors["C"] = tensors["u"] * 8, tensors["C"] * 15000
    narrow, _ = selective_scan(**tensors, **keywords, backend=backend)
    out, last_state, *rest = run(tensors, keywords, grads, out_dtype=torch.float32, backend=backend)
    assert narrow.dtype == torch.float16 and narrow.isinf().any()
    assert out.dtype == last_state.dtype == torch.float32 and out.isfinite().all()
    assert [g.dtype for g in rest] == [t.dtype for t in tensors.values()]
    torch.testing.assert_close(narrow, out.half(), rtol=0, atol=0)


def test_float64():
    tensors, keywords, _ = arguments(SMALL)
    doubles = {k: v.double() for k, v in tensors.items()}
    for output in selective_scan(**doubles, **keywords):
        assert output.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["u", "delta"])
def test_nan_stays_in_its_channel(name, dtype, isa):
    tensors, keywords, _ = arguments((2, *SMALL[1:]), dtype)
    at = tokens(20)
    tensors[name][1, 3, at] = torch.nan
    out, last_state = selective_scan(**tensors, **keywords, backend=BACKEND)
    assert out[1, 3, at:].isnan().all() and last_state[1, 3].isnan().all()
    assert out[1, 3, :at].isfinite().all() and out[0].isfinite().all() and out[1, :3].isfinite().all()


def test_elements_beyond_2_to_the_31():
    """Strides that no int32 holds, over memory that is never touched."""
    try:
        memory = torch.from_numpy(np.zeros(2**31 + 8000, np.int16)).view(torch.bfloat16).to(DEVICE)
    except (MemoryError, torch.OutOfMemoryError):
        pytest.skip("no room for the address range")
    tensors, keywords, grads = arguments((2, 40, tokens(150), 4, 1, "D z bias softplus"), torch.bfloat16)
    far = memory.as_strided(tensors["u"].shape, (2**31, 150, 1))
    far.copy_(tensors["u"])
    expected = run(tensors, keywords, grads, backend=BACKEND)
    for a, e in zip(run({**tensors, "u": far}, keywords, grads, backend=BACKEND), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("features", ["D z bias softplus initial", "bld rank1"])
def test_empty_batch(features):
    tensors, keywords, _ = arguments((1, 6, 9, 4, 2, features))
    empty = {k: (v[:0] if k in (*SEQUENCES, "initial_state") else v).requires_grad_() for k, v in tensors.items()}
    out, last_state = selective_scan(**empty, **keywords, backend=BACKEND)
    assert out.shape == empty["u"].shape and last_state.shape == (0, 6, 4)
    grads = torch.autograd.grad(out.sum() + last_state.sum(), list(empty.values()))
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, empty.values(), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("C", None, "C must be a tensor, got NoneType"),
        ("u", torch.zeros(6, 150), r"u must be a floating \[batch, dim, seqlen\].*got torch.float32 \[6, 150\]"),
        ("u", torch.zeros(2, 6, 0), "u must be a floating .* with no empty sequence"),
        ("u", torch.zeros(2, 6, 150, dtype=torch.int32), "u must be a floating .* got torch.int32"),
        ("A", torch.zeros(6, 257), r"A must be \[6, dstate\] with dstate from 1 to 256, got \[6, 257\]"),
        ("A", torch.zeros(5, 4), r"A must be \[6, dstate\].*got \[5, 4\]"),
        ("B", torch.zeros(2, 16), r"B must be \[batch, n_groups, dstate, seqlen\], got \[2, 16\]"),
        ("B", torch.zeros(2, 2, 3, 150), r"B must be .* with \[2, 2, 4, 150\] here, got \[2, 2, 3, 150\]"),
        ("B", torch.zeros(2, 4, 4, 150), "the groups of B must divide the 6 channels, got 4"),
        ("C", torch.zeros(2, 1, 4, 150), r"C must have the groups of B, \[2, 2, 4, 150\], got \[2, 1, 4, 150\]"),
        ("C", torch.zeros(2, 2, 4, 150).double(), "C must be float32, bfloat16 or float16 beside a torch.float32 u"),
        ("delta", torch.zeros(2, 1, 150), r"delta must be \[2, 6, 150\], got \[2, 1, 150\]"),
        ("delta_weight", torch.zeros(6), r"delta must be \[2, 1, 150\], got \[2, 6, 150\]"),
        ("D", 1.0, r"D must be a tensor \[6\], got float"),
        ("A", torch.zeros(6, 4, device="meta"), f"A must be on {PLACE} as u is, got meta"),
        ("delta_weight", torch.zeros(1), r"delta must be \[2, 1, 150\]"),
        ("initial_state", torch.zeros(2, 6, 4, device="meta"), f"initial_state must be on {PLACE} as u is, got meta"),
        ("D", torch.zeros(5), r"D must be \[6\], got \[5\]"),
        ("z", torch.zeros(2, 150, 6), r"z must be \[2, 6, 150\], got \[2, 150, 6\]"),
        ("delta_bias", torch.zeros(6, dtype=torch.int64), "delta_bias must be floating, got torch.int64"),
        ("delta_bias", torch.zeros(6, device="meta"), f"delta_bias must be on {PLACE} as u is, got meta"),
        ("initial_state", torch.zeros(2, 4, 6), r"initial_state must be \[2, 6, 4\], got \[2, 4, 6\]"),
        ("layout", "lbd", "layout must be 'bdl' or 'bld', got 'lbd'"),
        ("out_dtype", torch.float16, "out_dtype must be None, torch.float32 as u is, or torch.float32, got torch.float16"),
    ],
)
def test_rejects_arguments(key, value, message):
    tensors, keywords, _ = arguments((2, 6, 150, 4, 2, "D z bias softplus initial"))
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        value = value.to(DEVICE)
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        selective_scan(**{**tensors, **keywords, key: value})


def test_rejects_a_dtype_that_the_backend_does_not_take():
    tensors, keywords, _ = arguments(SMALL)
    tensors["u"] = tensors["u"].double()
    with pytest.raises(RuntimeError, match="it takes float32, bfloat16 or float16, x is torch.float64"):
        selective_scan(**tensors, **keywords, backend=BACKEND)

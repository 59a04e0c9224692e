"""autohdr.kernels.compat against plain formulas, one token at a time, and under transformers' Mamba."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from autohdr.kernels import causal_conv1d, compat, selective_scan

BATCH, DIM, TOKENS, STATES, WIDTH = 2, 6, 11, 4, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """(out, last state) by the definition; B and C [dim, dstate], [batch, dstate, tokens] or [batch, groups, dstate, tokens]."""

    def of_token(t, i):
        if t.dim() == 2:
            return t[None]
        t = t[:, None] if t.dim() == 3 else t
        return t[..., i].repeat_interleave(u.shape[1] // t.shape[1], 1)

    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, outputs = torch.zeros(u.shape[0], *A.shape), []
    for i in range(u.shape[2]):
        state = (delta[..., i, None] * A).exp() * state + (delta * u)[..., i, None] * of_token(B, i)
        outputs.append((state * of_token(C, i)).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def convolve(x, weight, bias, activation):
    """x with all that stands before it: the outputs of its last tokens are those that have a whole window."""
    y = F.conv1d(x, weight[:, None], bias, groups=len(weight))
    return y if activation is None else F.silu(y)


SHAPES = {
    "constant": (DIM, STATES),
    "one group": (BATCH, STATES, TOKENS),
    "two groups": (BATCH, 2, STATES, TOKENS),
}


@pytest.mark.parametrize("of_C", SHAPES)
@pytest.mark.parametrize("of_B", SHAPES)
def test_selective_scan_fn(of_B, of_C):
    shapes = {
        "u": (BATCH, DIM, TOKENS), "delta": (BATCH, DIM, TOKENS), "A": (DIM, STATES), "B": SHAPES[of_B], "C": SHAPES[of_C],
        "D": (DIM,), "z": (BATCH, DIM, TOKENS), "delta_bias": (DIM,),
    }  # fmt: skip
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()} | {"A": -torch.rand(DIM, STATES)}
    results = []
    for function in (lambda *t: compat.selective_scan_fn(*t, True, True), lambda *t: scan(*t, True)):
        leaves = [t.requires_grad_() for t in tensors.values()]
        out, last = function(*leaves)
        results.append([out, last, *torch.autograd.grad(out.sin().sum() + last.cos().sum(), leaves)])
    for a, e in zip(*results, strict=True):
        close(a, e)
    plain = list(tensors.values())[:5]
    plain[1] = plain[1].abs()
    close(compat.selective_scan_fn(*plain), scan(*plain)[0])


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("begun", [False, True])
def test_causal_conv1d_fn(begun, activation, layout):
    x, weight, bias = torch.randn(BATCH, DIM, TOKENS), torch.randn(DIM, WIDTH), torch.randn(DIM)
    initial = torch.randn(BATCH, DIM, WIDTH - 1) if begun else torch.zeros(BATCH, DIM, WIDTH - 1)
    tokens = torch.cat((initial, x), 2)
    if layout == "bld":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty(BATCH, DIM, WIDTH - 1)
    for given in (None, out):
        y, last = compat.causal_conv1d_fn(x, weight, bias, None, initial if begun else None, True, given, activation)
        close(y, convolve(tokens, weight, bias, activation))
        assert torch.equal(last, tokens[..., -(WIDTH - 1) :])
    assert last is out
    close(compat.causal_conv1d_fn(x, weight), convolve(F.pad(x, (WIDTH - 1, 0)), weight, None, None))
    short = compat.causal_conv1d_fn(x[..., :1], weight, return_final_states=True)[1]
    assert torch.equal(short, F.pad(x[..., :1], (WIDTH - 2, 0)))


@pytest.mark.parametrize("length", [WIDTH - 1, WIDTH + 2])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d_update(activation, ring, length):
    """A sequence in steps of one token, of some, and of more than the state holds."""
    weight, bias, tokens = torch.randn(DIM, WIDTH), torch.randn(DIM), torch.randn(BATCH, DIM, TOKENS + 4)
    expected = convolve(F.pad(tokens, (WIDTH - 1, 0)), weight, bias, activation)
    states, rows, seen = torch.zeros(5, DIM, length), torch.tensor([3, 1], dtype=torch.int32), 0
    for count in (1, 1, 2, 1, 3, 7):
        x = tokens[..., seen : seen + count]
        lengths = torch.full((BATCH,), seen, dtype=torch.int32) if ring else None
        x = x[..., 0] if count == 1 else x
        y = compat.causal_conv1d_update(x, states, weight, bias, activation, lengths, rows)
        assert y.shape == x.shape
        close(y.view(BATCH, DIM, -1), expected[..., seen : seen + count])
        seen += count
    last = states[rows.long()]
    if ring:
        last = last.roll(-seen % length, 2).roll(0, 2) if seen % length == 0 else torch.roll(last, -(seen % length), 2)
    assert torch.equal(last, tokens[..., seen - length : seen])
    assert not states[[0, 2, 4]].any()
    alone = torch.zeros(BATCH, DIM, length)
    compat.causal_conv1d_update(tokens[..., 0], alone, weight)
    assert torch.equal(alone[..., -1], tokens[..., 0])


@pytest.mark.parametrize("heads", [None, 3])
def test_selective_state_update(heads):
    """A sequence token by token gives the scan of it."""
    groups = None if heads is None else heads
    shape = (DIM,) if heads is None else (heads, DIM)
    channels = (heads or 1) * DIM
    u, delta, z = (torch.randn(BATCH, channels, TOKENS) for _ in range(3))
    A, D, bias = -torch.rand(*shape, STATES), torch.randn(shape), torch.randn(shape)
    B, C = (torch.randn(BATCH, *([] if groups is None else [groups]), STATES, TOKENS) for _ in range(2))
    expected, last = scan(u, delta, A.flatten(0, -2), B, C, D.flatten(), z, bias.flatten(), True)
    states, rows = torch.zeros(4, *shape, STATES), torch.tensor([2, 0])
    for i in range(TOKENS):
        x, dt, gate = (t[..., i].view(BATCH, *shape) for t in (u, delta, z))
        y = compat.selective_state_update(states, x, dt, A, B[..., i], C[..., i], D, gate, bias, True, rows)
        assert y.shape == x.shape
        close(y.flatten(1), expected[..., i])
    close(states[rows].reshape(last.shape), last)
    assert not states[[1, 3]].any()
    state = torch.zeros(BATCH, *shape, STATES)
    y = compat.selective_state_update(state, x, dt.abs(), A, B[..., 0], C[..., 0])
    close(y.flatten(1), scan(x.reshape(BATCH, -1, 1), dt.abs().reshape(BATCH, -1, 1), A.flatten(0, -2), B, C)[0][..., 0])


@pytest.mark.parametrize("normed", [False, True])
def test_mamba_inner_fn(normed):
    rank, out = 3, 5
    xz = torch.randn(BATCH, TOKENS, 2 * DIM).transpose(1, 2)
    conv, conv_bias, x_proj = torch.randn(DIM, 1, WIDTH), torch.randn(DIM), torch.randn(rank + 2 * STATES, DIM) / 2
    delta_proj, out_proj, out_bias = torch.randn(DIM, rank), torch.randn(out, DIM), torch.randn(out)
    A, D, bias, B_bias, C_bias = -torch.rand(DIM, STATES), torch.randn(DIM), torch.randn(DIM), *torch.randn(2, STATES)
    weights = {"b": torch.rand(STATES), "c": torch.rand(STATES), "dt": torch.rand(rank)} if normed else {}

    def norm(part, name):
        return part if not normed else part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[name]

    u, z = xz.chunk(2, 1)
    u = convolve(F.pad(u, (WIDTH - 1, 0)), conv[:, 0], conv_bias, "silu")
    dt, B, C = (u.transpose(1, 2) @ x_proj.T).split((rank, STATES, STATES), -1)
    delta = (norm(dt, "dt") @ delta_proj.T).transpose(1, 2)
    B, C = norm(B + B_bias, "b").transpose(1, 2), norm(C + C_bias, "c").transpose(1, 2)
    arguments = (xz, conv, conv_bias, x_proj, delta_proj, out_proj, out_bias, A)
    more = {f"{name}_rms_weight": weight for name, weight in weights.items()}
    for given, of_scan in (((None, None), (B, C)), (tuple(torch.randn(2, DIM, STATES)),) * 2):
        y, _ = scan(u, delta, A, *of_scan, D, z, bias, True)
        actual = compat.mamba_inner_fn(*arguments, *given, D, bias, B_bias, C_bias, **more)
        close(actual, y.transpose(1, 2) @ out_proj.T + out_bias, 1e-4)


def test_signatures():
    """Positional calls written for the packages mean the same here; what clashes with this package's own ops is refused there."""
    names = {f: list(inspect.signature(getattr(compat, f)).parameters) for f in ("selective_scan_fn", "causal_conv1d_fn")}
    assert names["selective_scan_fn"][:10] == [*"u delta A B C D z delta_bias delta_softplus return_last_state".split()]
    assert names["causal_conv1d_fn"][3] == "seq_idx"
    tokens, matrix = torch.ones(1, 1, 2), torch.ones(1, 1)
    with pytest.raises(TypeError, match="positional"):
        selective_scan(tokens, tokens, -matrix, tokens, tokens, None, None, None, False, True)
    with pytest.raises(TypeError, match="positional"):
        causal_conv1d(tokens, matrix, None, None)


def test_refusals():
    x, state, matrix = torch.ones(1, 2, 3), torch.ones(1, 2, 2), torch.ones(2, 2)
    rotating = matrix * 1j
    for call in (
        lambda: compat.selective_scan_fn(x, x, rotating, matrix, matrix),
        lambda: compat.mamba_inner_fn(torch.cat((x, x), 1), None, None, None, matrix, None, None, rotating),
        lambda: compat.selective_state_update(state, x[..., 0], x[..., 0], rotating, matrix[:1], matrix[:1]),
    ):
        with pytest.raises(ValueError, match="A must be real, got torch.complex64"):
            call()
    index = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="causal_conv1d_fn: seq_idx must be None: packed sequences are not implemented"):
        compat.causal_conv1d_fn(x, matrix, seq_idx=index)
    with pytest.raises(ValueError, match="selective_scan_fn: cu_seqlens must be None"):
        compat.selective_scan_fn(x, x, matrix, matrix, matrix, cu_seqlens=index)
    for function in (lambda a: compat.causal_conv1d_fn(x, matrix, activation=a),
                     lambda a: compat.causal_conv1d_update(x[..., 0], state, matrix, activation=a)):  # fmt: skip
        with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
            function("gelu")
    with pytest.raises(ValueError, match=r"conv_state must hold at least 3 tokens, got \[1, 2, 2\]"):
        compat.causal_conv1d_update(x[..., 0], state, torch.ones(2, 4))


TRANSFORMERS = """
import sys, torch
from autohdr.kernels import compat
if sys.argv[1] == "ours":
    compat.take_over()
    calls = set()
    for name in ("causal_conv1d", "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.selective_state_update"):
        for key, function in list(vars(sys.modules[name]).items()):
            if callable(function):
                counted = lambda *a, function=function, **k: (calls.add(function.__name__), function(*a, **k))[1]
                counted.__signature__ = __import__("inspect").signature(function)
                setattr(sys.modules[name], key, counted)
    sys.modules["mamba_ssm"].selective_scan_fn = sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn
    sys.modules["mamba_ssm"].mamba_inner_fn = sys.modules["mamba_ssm.ops.selective_scan_interface"].mamba_inner_fn
from transformers import MambaConfig, MambaForCausalLM
torch.manual_seed(0)
config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
model = MambaForCausalLM(config).eval()
prompt = torch.randint(50, (2, 9))
with torch.no_grad():
    logits = model(prompt).logits
    generated = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)
loss = model.train()(prompt, labels=prompt).loss
loss.backward()
grads = [p.grad for p in model.parameters()]
if sys.argv[1] == "ours":
    assert calls == {"selective_scan_fn", "mamba_inner_fn", "causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"}
torch.save((logits, torch.stack(generated.logits), generated.sequences, loss.detach(), grads), sys.argv[2])
"""


def test_transformers(tmp_path):
    """transformers' Mamba by its own formulas and through these functions: the same logits, tokens, loss and gradients."""
    pytest.importorskip("transformers")
    results = []
    for path in ("its own", "ours"):
        subprocess.run([sys.executable, "-c", TRANSFORMERS, path, tmp_path / path], check=True)
        results.append(torch.load(tmp_path / path))
    (expected, actual) = results
    assert torch.equal(actual[2], expected[2])
    for a, e in zip([*actual[:2], actual[3], *actual[4]], [*expected[:2], expected[3], *expected[4]], strict=True):
        close(a, e, 1e-4)

"""What follows from an op's declaration: signatures that C++ keeps to, and the ops on devices that run nothing; and what csrc
asks of CUDA."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backend import BACKEND
from calls import DIFFERENTIABLE, call

from autohdr import _C, create_model
from autohdr.kernels import OPS, common, declare


def test_signatures_are_the_schemas():
    """Of every kernel that C++ registered; the emulation's are compared in conftest.py."""
    signatures = _C.signatures()
    declare.check_signatures(signatures)
    assert {name for key, name, _ in signatures if key == "CPU"} == set(declare.KERNELS)


@pytest.mark.parametrize(
    ("declared", "planted"),
    [
        ("(Tensor, ", "(Optional[Tensor], "),  # as from "Tensor d_out" to "Tensor? d_out"
        ("Optional[Tensor]", "Tensor"),
        ("float)", "int)"),
        ("bool)", "int)"),
        (", int", ""),
        (" -> (Tensor", " -> (Tensor, Tensor"),
    ],
)
def test_a_planted_mismatch_is_refused(declared, planted):
    found = 0
    for i, (key, name, signature) in enumerate(_C.signatures()):
        if declared not in signature:
            continue
        found += 1
        signatures = _C.signatures()
        signatures[i] = key, name, signature.replace(declared, planted, 1)
        with pytest.raises(ImportError, match=f"of other sources: {name} for {key} is declared .*, compiled .* Install"):
            declare.check_signatures(signatures)
    assert found


def test_a_schema_that_was_changed_is_refused(monkeypatch):
    schema = torch.ops.autohdr.gdfn_backward.default._schema
    arguments = [SimpleNamespace(type=torch._C.OptionalType(schema.arguments[0].type)), *schema.arguments[1:]]
    changed = SimpleNamespace(arguments=arguments, returns=schema.returns)
    fake = SimpleNamespace(gdfn_backward=SimpleNamespace(default=SimpleNamespace(_schema=changed)))
    monkeypatch.setattr(declare, "KERNELS", {"gdfn_backward": ("gdfn", "backward")})
    monkeypatch.setattr(torch.ops, "autohdr", fake)
    with pytest.raises(ImportError, match=r"gdfn_backward for CPU is declared \(Optional\[Tensor\], .*, compiled \(Tensor,"):
        declare.check_signatures(_C.signatures())


def test_a_kernel_that_is_missing_is_refused():
    for name in declare.KERNELS:
        with pytest.raises(ImportError, match=f"{name} for CPU is declared .*, compiled missing"):
            declare.check_signatures([s for s in _C.signatures() if s[1] != name])


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("size", ["SMALL", "PLAIN"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_meta(op, size, backend):
    """Shapes and dtypes of values and gradients, under autocast too."""
    function, tensors, dy = call(op, size)
    leaves = [t.to("meta").requires_grad_() for t in tensors]
    y = function(*leaves, backend=backend)
    assert y.device.type == "meta" and (y.shape, y.dtype) == (dy.shape, dy.dtype)
    for g, t in zip(torch.autograd.grad(y, leaves, dy.to("meta")), tensors, strict=True):
        assert g.device.type == "meta" and (g.shape, g.dtype) == (t.shape, t.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*leaves, backend=backend).dtype == dy.dtype


@pytest.mark.parametrize("op", OPS)
def test_meta_compiled(op):
    function, tensors, dy = call(op, "PLAIN")
    torch.compiler.reset()  # of one line torch compiles no more than eight, whichever op they are of
    compiled = torch.compile(lambda *t: function(*t, backend="auto"), fullgraph=True, backend="eager")
    assert compiled(*(t.to("meta") for t in tensors)).shape == dy.shape


@pytest.mark.parametrize("name", ["restormer_nano", "mamba_small"])
def test_models_on_meta(name):
    with torch.device("meta"):
        model = create_model(name)
        assert model(torch.zeros(2, 3, 24, 16)).shape == (2, 3, 24, 16)


@pytest.mark.parametrize("device", ["meta", "lazy", "vulkan"])
def test_devices_without_autocast(device):
    assert not torch.amp.is_autocast_available(device)
    x = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    assert common.autocast(x) is x
    with common.autocast_off(x.device):
        pass


@pytest.mark.skipif(BACKEND != "cpu", reason="an op of the CPU's")
def test_an_op_need_not_have_every_backend(monkeypatch):
    monkeypatch.setitem(OPS, "gdfn", {"cpu": (torch.float32,)})
    function, tensors, _ = call("gdfn", "SMALL")
    assert torch.equal(function(*tensors, backend="auto"), function(*tensors, backend="cpu"))
    with pytest.raises(RuntimeError, match="gdfn: backend 'triton' cannot run: gdfn has no triton kernels"):
        function(*tensors, backend="triton")


def test_host_code_may_be_captured_into_a_graph():
    """Of CUDA's functions csrc calls none that waits, copies or allocates: a capture refuses them."""
    sources = [p for p in (Path(__file__).parents[2] / "csrc").rglob("*") if p.is_file()]
    called = {name for source in sources for name in re.findall(r"\bcu(?:da)?[A-Z]\w*(?=\()", source.read_text())}
    ours = {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetLastError", "cudaGetErrorString"}
    assert called == ours | {"cudaOccupancyMaxActiveBlocksPerMultiprocessor"}

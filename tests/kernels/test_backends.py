import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autohdr import _C, kernels
from autohdr.kernels import _extension, backends, gdfn, set_backend
from autohdr.kernels.backends import resolve

X = torch.zeros(1, 8, 4, 4)
NO_CUDA = "this installation was built without CUDA kernels|there is no GPU that torch can use"  # which one, the machine decides


def test_backends_name_the_reason():
    for op in kernels.OPS:
        table = backends(op)
        assert list(table) == ["cuda", "triton", "cpu", "reference"]
        assert table["cpu"] == table["reference"] == "available"
        for name, reason in {"triton": "there is no GPU that torch can use", "cuda": NO_CUDA}.items():
            reason = reason if name in kernels.OPS[op] else f"{op} has no {name} kernels"
            assert torch.cuda.is_available() or re.fullmatch(reason, table[name])


def test_unknown_op_and_backend():
    with pytest.raises(ValueError, match=f"op: expected one of {', '.join(kernels.OPS)}, got 'conv'"):
        backends("conv")
    with pytest.raises(ValueError, match="backend: expected auto, cuda, triton, cpu, reference, got 'gpu'"):
        resolve("mdta", "gpu", X)
    with pytest.raises(ValueError, match="got 'gpu'"):
        set_backend("gpu")


def test_auto_takes_the_first_that_can_run():
    assert resolve("mdta", "auto", X) == "cpu"
    assert resolve("mdta", "auto", X.double()) == "reference"
    assert resolve("mdta", "auto", X.to("meta")) in ("cuda", "cpu")  # whose fake kernels need no steps
    assert resolve("mdta", "auto", X.to("meta", torch.float64)) == "reference"


def test_a_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=f"gdfn: backend 'cuda' cannot run: ({NO_CUDA}|x is on cpu)"):
        resolve("gdfn", "cuda", X)
    with pytest.raises(RuntimeError, match="gdfn: backend 'cpu' cannot run: it takes float32 or bfloat16, x is torch.float64"):
        gdfn(X.double(), *[torch.zeros(s) for s in ((8,), (8,), (8, 8, 1, 1), (8, 1, 3, 3), (8, 4, 1, 1))], backend="cpu")


def test_set_backend_changes_auto_alone():
    set_backend("reference")
    try:
        assert resolve("mdta", "auto", X) == "reference"
        assert resolve("mdta", "cpu", X) == "cpu"
    finally:
        set_backend("auto")
    assert resolve("mdta", "auto", X) == "cpu"


def test_an_absent_extension_warns_once_and_leaves_the_reference():
    code = (
        "import importlib.util as u, warnings; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'autohdr._C' else find(name, *a)\n"
        "import autohdr, torch\n"
        "print(autohdr.kernels.backends('mdta')['cpu'])\n"
        "m = autohdr.create_model('restormer_nano')\n"
        "print(m(torch.zeros(1, 3, 9, 8)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "not compiled into this installation (install with pip's --no-cache-dir; see README, Troubleshooting)",
        "torch.Size([1, 3, 9, 8])",
    ]
    assert done.stderr.count("autohdr's compiled kernels are not available") == 1


def test_a_broken_extension_is_named(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: somewhere")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert _extension._load() == (None, "the compiled module does not load: undefined symbol: somewhere")


def test_an_absent_triton_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    module = importlib.import_module("autohdr.kernels.backends")  # the package has a function of that name
    assert module._reason("triton") == "triton is not installed (pip install triton)"


@pytest.mark.parametrize(
    ("built_for", "capability", "fits"),
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 9), True),  # binaries run on later minor versions
        ("8.0 9.0", (7, 5), False),
        ("8.6", (8, 0), False),
        ("9.0", (10, 0), False),
        ("8.0+PTX", (12, 1), True),  # PTX is compiled there
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),
        ("Ampere Hopper+PTX", (7, 5), True),  # nobody knows
    ],
)
def test_a_gpu_without_compiled_code_gets_another_backend(monkeypatch, built_for, capability, fits):
    module = importlib.import_module("autohdr.kernels.backends")
    gpu = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(module, "_BUILT_FOR", built_for)
    monkeypatch.setattr(module, "_RUNS_ON", module._runs_on(built_for))
    monkeypatch.setattr(module, "_REASONS", dict.fromkeys(module.NAMES, ""))
    x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16)
    named = f"this GPU is {capability[0]}.{capability[1]}"
    assert resolve("mdta", "auto", x) == ("cuda" if fits else "triton" if capability >= (8, 0) else "reference")
    assert backends("mdta")["cuda"] == ("available" if fits else f"it was built for {built_for}, {named}")
    if capability < (8, 0):
        with pytest.raises(RuntimeError, match=f"'triton' cannot run: Triton kernels need 8.0 or newer, {named}"):
            resolve("mdta", "triton", x)


def test_build_info():
    info = _C.build_info()
    assert info["cpu_isa"] in info["cpu_isas_here"] and set(info["cpu_isas_here"]) <= set(info["cpu_isas"])
    with pytest.raises(ValueError, match="use_cpu_isa: expected one of baseline.*, got sse9"):
        _C.use_cpu_isa("sse9")


def test_importing_is_silent_and_leaves_triton_kernels_and_cuda_alone():
    code = (
        "import sys, torch, autohdr.kernels\n"
        "assert 'autohdr.kernels.selective_scan.triton_impl' not in sys.modules and not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_softplus_is_the_same_polynomial_on_every_backend():
    root = Path(__file__).parents[2]
    header = (root / "csrc/common/constants.h").read_text().split("#define AUTOHDR_ARTANH_BY_S(s2)")[1]
    kernel = (root / "autohdr/kernels/selective_scan/triton_impl.py").read_text().split("def _delta(")[1].split("return")[0]
    coefficients = re.findall(r"\b0\.\d{9}", header)
    assert len(coefficients) == 4 and re.findall(r"\b0\.\d{9}", kernel) == coefficients
    others = [p.relative_to(root) for p in (root / "csrc").rglob("*.*") if coefficients[0] in p.read_text()]
    assert others == [Path("csrc/common/constants.h")]

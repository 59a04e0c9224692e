import torch

from autohdr import kernels
from autohdr.doctor import doctor
from autohdr.kernels import _extension


def test_doctor_names_everything():
    report = doctor()
    assert torch.__version__ in report
    assert _extension.module.build_info()["cpu_isa"] in report
    can = "oneDNN can," if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "oneDNN can't,"
    assert f"bfloat16 on CPU   {can} on this processor" in report.splitlines()
    for op in kernels.OPS:
        for backend, state in kernels.backends(op).items():
            assert f"{op:<15} {backend:<10} {state}" in report.splitlines()


def test_doctor_without_the_extension(monkeypatch):
    monkeypatch.setattr(_extension, "module", None)
    monkeypatch.setattr(_extension, "reason", "not compiled into this installation")
    assert "compiled kernels  not compiled into this installation" in doctor().splitlines()

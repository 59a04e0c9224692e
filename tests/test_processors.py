"""The CPU kernels, the models and the plan again as on processors with fewer instructions: PyTorch's own kernels, oneDNN and
MKL held to AVX2 and to SSE4, and oneDNN left out. What this processor is by itself, every test runs on."""

import re
from pathlib import Path

import pytest
import torch
from again import run_tests

from autohdr.kernels import OPS

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
BASELINE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
NO_BFLOAT16 = {"AUTOHDR_TEST_ONEDNN": "0"}
KERNELS = [f"tests/kernels/test_{op}.py" for op in OPS]
ON = "test_forward and {}"  # by our kernels for that processor; those for the others are compared without this
MODELS = [f"tests/models/test_{name}.py" for name in ("restormer", "mamba_diffusion", "tiling")]
COMPUTES = "not parameter_count and not layout and not stays_within and not (test_plan and not measured)"
PLAN = "tests/test_plan.py"  # not below AVX2, where oneDNN's convolutions take memory that the plan does not count

FLAGS = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
IS_AVX2 = pytest.mark.skipif(not FLAGS & {"avx512f", "avx_vnni"}, reason="this processor has nothing beyond AVX2")
HAS_NO_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no instructions for bfloat16"
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("processor", "tests"),
    [
        pytest.param(AVX2, [*KERNELS, "-k", ON.format("avx2")], id="avx2-kernels", marks=IS_AVX2),
        pytest.param(AVX2, [*MODELS, PLAN, "-k", COMPUTES], id="avx2-models", marks=IS_AVX2),
        pytest.param(BASELINE, [*KERNELS, "-k", ON.format("baseline")], id="baseline-kernels"),
        pytest.param(BASELINE, [*MODELS, "-k", COMPUTES], id="baseline-models"),
        pytest.param(NO_BFLOAT16, [*MODELS, PLAN, "-k", "bf16 or bfloat16"], id="no-bfloat16-models", marks=HAS_NO_BFLOAT16),
    ],
)
def test_on(processor, tests):
    run_tests(*tests, env=processor)

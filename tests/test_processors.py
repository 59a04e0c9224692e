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
MODELS = [f"tests/models/test_{name}.py" for name in ("restormer", "mamba_diffusion", "tiling")]
PLAN = "tests/test_plan.py"  # not below AVX2, where oneDNN's convolutions take memory that the plan does not count
COMPUTES = "not parameter_count and not layout and not stays_within and not (test_plan and not measured)"
KERNELS = [f"tests/kernels/test_{op}.py" for op in OPS]
# The models, and our kernels for that processor; those for the others are compared without this.
BOTH = f"(kernels and test_forward and {{}}) or (not kernels and {COMPUTES})"

FLAGS = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
IS_AVX2 = pytest.mark.skipif(not FLAGS & {"avx512f", "avx_vnni"}, reason="this processor has nothing beyond AVX2")
HAS_NO_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no instructions for bfloat16"
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("processor", "tests"),
    [
        pytest.param(AVX2, [*KERNELS, *MODELS, PLAN, "-k", BOTH.format("avx2")], id="avx2", marks=IS_AVX2),
        pytest.param(BASELINE, [*KERNELS, *MODELS, "-k", BOTH.format("baseline")], id="baseline"),
        pytest.param(NO_BFLOAT16, [*MODELS, PLAN, "-k", "bf16 or bfloat16"], id="no-bfloat16", marks=HAS_NO_BFLOAT16),
    ],
)
def test_on(processor, tests):
    run_tests(*tests, env=processor)

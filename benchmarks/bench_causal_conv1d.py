"""causal_conv1d with its SiLU, forward and training step, channel-last as in MambaDiffusion: our backends against PyTorch's
depthwise convolution, and on a GPU that under torch.compile.
"""

import pytest
from measuring import DEVICE, columns
from plain_op import bench
from problems import causal_conv1d

SHAPES = {"cpu": [(1, 192, 4096), (2, 96, 9216)], "cuda": [(1, 192, 147456), (2, 96, 9216), (1, 192, 4096)]}  # batch, dim, seqlen
NAMES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}
PLAIN_LIMITS = {"float32": 1e-3, "bfloat16": 1e-2}  # PyTorch's convolutions round float32 to TF32 on a GPU unless told otherwise


@pytest.mark.parametrize("column", columns("causal_conv1d") + ["compiled"] * (DEVICE == "cuda"))
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", NAMES[DEVICE])
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
def test_causal_conv1d(timed, shape, dtype, mode, column):
    plain = DEVICE == "cuda" and column in ("reference", "compiled")
    bench(timed, causal_conv1d, shape, dtype, mode, column, (PLAIN_LIMITS if plain else LIMITS)[dtype])

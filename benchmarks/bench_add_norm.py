"""add_norm, a scaled residual and its layer norm, forward and training step: our backends against PyTorch's two ops, and on a GPU
those under torch.compile. In bfloat16 the branch alone is, as under autocast.
"""

import pytest
from measuring import DEVICE, columns
from plain_op import bench
from problems import NORM_SHAPES, add_norm

SHAPES = {"cpu": [(16384, 96), (4096, 384)], "cuda": NORM_SHAPES}  # rows, channels
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.mark.parametrize("column", columns("add_norm") + ["compiled"] * (DEVICE == "cuda"))
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
def test_add_norm(timed, shape, dtype, mode, column):
    bench(timed, add_norm, shape, dtype, mode, column, LIMITS[dtype])

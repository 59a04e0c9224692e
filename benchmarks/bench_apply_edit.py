"""apply_edit on a photo, with a grid and without, forward of floats and of a photo's own bytes, and training step: our backends
against eager PyTorch and that under torch.compile.
"""

import pytest
from measuring import DEVICE, columns
from plain_op import bench
from problems import apply_edit

SHAPES = {"cpu": [(1000, 1500, 0), (1000, 1500, 8)], "cuda": [(4000, 6000, 0), (4000, 6000, 8)]}  # height, width, bins
CASES = [("uint8", "forward"), ("float32", "forward"), ("float32", "training")]
CASES += [("bfloat16", "forward"), ("bfloat16", "training")] * (DEVICE == "cuda")
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "uint8": 1e-3}


@pytest.mark.parametrize("column", [*columns("apply_edit"), "compiled"])
@pytest.mark.parametrize(("dtype", "mode"), CASES)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
def test_apply_edit(timed, shape, dtype, mode, column):
    bench(timed, apply_edit, shape, dtype, mode, column, LIMITS[dtype], tuple(m for d, m in CASES if d == dtype))

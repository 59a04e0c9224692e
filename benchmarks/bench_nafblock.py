"""nafblock at the five levels of nafnet_32: forward and training step, our CPU kernels against PyTorch's layers.

On a CPU for a 384×384 image; a GPU has the reference alone.
"""

import image_op
import problems
import pytest


@pytest.mark.parametrize(
    ("channels", "height", "width", "dtype", "mode", "column"), image_op.cases("nafblock", problems.NAFNET_LEVELS)
)
def test_nafblock(timed, channels, height, width, dtype, mode, column):
    image_op.bench(timed, problems.nafblock, channels, height, width, dtype, mode, column)

"""nafblock at the five levels of nafnet_32: forward and training step, our backends against PyTorch's layers.

On a CPU for a 384×384 image; on a GPU also for 896×896 and 2192×3296.
"""

import image_op
import problems
import pytest


@pytest.mark.parametrize(
    ("channels", "height", "width", "dtype", "mode", "column"), image_op.cases("nafblock", problems.NAFNET_LEVELS)
)
def test_nafblock(timed, channels, height, width, dtype, mode, column):
    image_op.bench(timed, problems.nafblock, channels, height, width, dtype, mode, column)

"""gdfn at the four levels of restormer_base: forward and training step, our backends against PyTorch by other means.

On a CPU for a 384×384 image; on a GPU also for 896×896 and 3296×2192, which a CPU does not do in reasonable time.
"""

import image_op
import problems
import pytest


@pytest.mark.parametrize(("channels", "height", "width", "dtype", "mode", "column"), image_op.cases("gdfn"))
def test_gdfn(timed, channels, height, width, dtype, mode, column):
    image_op.bench(timed, problems.gdfn, channels, height, width, dtype, mode, column)

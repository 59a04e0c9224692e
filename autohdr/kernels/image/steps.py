"""How an op walks its images: in steps of some rows (or of some whole images), small enough that what one kernel of a step writes
is still in the second-level cache when the next one reads it. A step's buffers hold its rows and those of the halo that exist."""

from collections.abc import Iterator

import torch

from autohdr.kernels.image.view import INTERPRETED, View

# Bytes of a step's buffers: within the second-level cache of the larger GPUs forward, and in few steps backward. The interpreter
# takes several steps of its small images.
FORWARD_BUDGET, BACKWARD_BUDGET = (64 << 10, 448 << 10) if INTERPRETED else (32 << 20, 96 << 20)
_MOST_PROGRAMS = 65535  # in the second and third axis of a grid


class Steps:
    """A walk over images, or some of their rows, so that rows of `bytes_a_pixel` with a halo on each side stay within a budget.

    matrices: how many an image has, each a program of one axis of a grid."""

    def __init__(self, x: View, bytes_a_pixel: int, halo: int, budget: int, matrices: int = 1, rows: range | None = None):
        self.x, self.all_rows = x, range(x.height) if rows is None else rows
        row_bytes = x.data.shape[2] * bytes_a_pixel
        self.rows = min(max(budget // row_bytes - 2 * halo, 1), len(self.all_rows))
        fit = budget // (row_bytes * self.rows) if self.rows == len(self.all_rows) else 1
        self.images = max(min(fit, x.data.shape[0], _MOST_PROGRAMS // matrices), 1)

    def __iter__(self) -> Iterator[tuple[slice, range]]:
        for b in range(0, self.x.data.shape[0], self.images):
            for y in range(self.all_rows.start, self.all_rows.stop, self.rows):
                yield slice(b, min(b + self.images, self.x.data.shape[0])), range(y, min(y + self.rows, self.all_rows.stop))

    def around(self, rows: range, halo: int) -> range:
        return range(max(rows.start - halo, 0), min(rows.stop + halo, self.x.height))

    @property
    def pixels(self) -> int:
        """Of a step without its halo, at most."""
        return self.images * self.rows * self.x.data.shape[2]


class Buffer:
    """Memory for the rows of a step and a halo, of some channels."""

    def __init__(self, steps: Steps, channels: int, halo: int, dtype: torch.dtype):
        _, self.height, self.width, _ = steps.x.data.shape
        self.channels, rows = channels, min(steps.rows + 2 * halo, self.height)
        self.memory = torch.empty(steps.images * rows * self.width * channels, dtype=dtype, device=steps.x.data.device)

    def view(self, images: slice, rows: range) -> View:
        shape = images.stop - images.start, len(rows), self.width, self.channels
        return View(self.memory[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape), rows.start, self.height)

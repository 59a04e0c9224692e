"""Images in memory: a view of some rows, and what a kernel takes of it."""

from typing import NamedTuple

import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
VARYING = ["pixels", "images", "height", "width", "first"]
"""Arguments of kernels that are not worth a compilation for every kind of number."""


class Matrix(NamedTuple):
    """A matrix an image, as kernels take them: the distances are from an image and from a row to the next."""

    data: Tensor
    image: int
    row: int


class Place(NamedTuple):
    """Where a kernel's pixels lie in an image: `pixels` of them from row `first` on."""

    pixels: int
    first: int
    height: int
    width: int


class View(NamedTuple):
    """Rows of images, from `first` on of `height`: data [images, rows, width, channels]; the channels may be some of more."""

    data: Tensor
    first: int
    height: int

    @staticmethod
    def of(x: Tensor) -> "View":
        """Whole images [batch, channels, height, width], channels_last."""
        batch, channels, height, width = x.shape
        return View(x.permute(0, 2, 3, 1).flatten().view(batch, height, width, channels), 0, height)  # strides of size-1 axes too

    def at(self, rows: range, images: slice = slice(None)) -> "View":
        return self._replace(data=self.data[images, rows.start - self.first : rows.stop - self.first], first=rows.start)

    def channels(self, first: int, end: int) -> "View":
        return self._replace(data=self.data[..., first:end])

    @property
    def halves(self) -> tuple["View", "View"]:
        """Of the channels."""
        part = self.data.shape[3] // 2
        return self.channels(0, part), self.channels(part, 2 * part)

    @property
    def matrix(self) -> Matrix:
        """Pixels × channels."""
        return Matrix(self.data, self.data.stride(0), self.data.stride(2))

    @property
    def place(self) -> Place:
        _, rows, width, _ = self.data.shape
        return Place(rows * width, self.first, self.height, width)


def tile(n: int, most: int) -> int:
    """How many of n pixels or channels a program takes: a power of two, for the tensor cores at least 16."""
    return min(max(triton.next_power_of_2(n), 16), most)

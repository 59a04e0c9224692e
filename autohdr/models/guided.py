"""An edit of a reduced image, carried up to the whole one: local affine models, fitted there and interpolated between its pixels.

Around each pixel of the reduced image what the edit adds is fitted, by least squares, as an affine function of the colour. Edits
change at every edge, these functions hardly: interpolated, and applied to the whole image's own pixels, they keep its edges.
Source: He and Sun, Fast Guided Filter (2015), with the colour guide of He, Sun and Tang, Guided Image Filtering (2013),
equations 19 and 20. What is fitted is the difference: grain, which alone does not make a slope, stays as it is.
"""

from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels import apply_edit

FACTOR = 3  # of height and width
RADIUS = 1  # of the windows in which the models are fitted, and of those over which they are averaged, in reduced pixels
EPSILON = 1e-4  # what slopes cost: a window with less variance than this (a deviation of 0.01) mostly shifts its colours
ROWS = 32  # reduced rows that are carried up at once
COLUMNS = 512  # and columns: apply_edit's grid has some 1,000 on a GPU at most

_PAIRS = tuple(combinations_with_replacement(range(3), 2))


def reduced(image: Tensor) -> Tensor:
    """(B, C, H, W) as the means of its cells of FACTOR × FACTOR pixels, of which the last ones of a side may be smaller."""
    return F.avg_pool2d(image, FACTOR, ceil_mode=True)


def carry_up(image: Tensor, first: int, small: Tensor, edited: Tensor) -> Tensor:
    """What the edit that made `edited` of `small` makes of the image: of a part of it, whose first row is that of cell `first`.

    image: (1, 3, rows, W), float32 or float64. small: (1, 3, h, w), reduced() of the whole image; edited: its edit. Under no
    autocast. Returns the shape and dtype of image.
    """
    height, width = small.shape[2:]
    end = first + -(-image.shape[2] // FACTOR)
    top, bottom = max(first - 1, 0), min(end + 1, height)  # cells that pixels lie between
    seen = slice(max(top - 2 * RADIUS, 0), bottom + 2 * RADIUS)  # that their models depend on
    found = models(small[:, :, seen], edited[:, :, seen])[:, :, top - seen.start :][:, :, : bottom - top]
    above, result = FACTOR * (first - top), torch.empty_like(image)
    curves, matrix = image.new_tensor([0, 1]).expand(1, 3, 2), torch.eye(3, 4, dtype=image.dtype, device=image.device)[None]
    for left in range(0, width, COLUMNS):
        start, stop = max(left - 1, 0), min(left + COLUMNS + 1, width)
        part = image[..., FACTOR * left : FACTOR * (left + COLUMNS)]
        before, rows, columns = FACTOR * (left - start), FACTOR * (bottom - top), FACTOR * (stop - start)
        # The grid lies over whole cells.
        around = (before, columns - before - part.shape[3], above, rows - above - part.shape[2])
        grid = found[..., start:stop].unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2)[:, :, :, None]
        whole = apply_edit(F.pad(part, around), curves, matrix, grid)
        result[..., FACTOR * left : FACTOR * (left + COLUMNS)] = whole[..., above:, before:][
            ..., : part.shape[2], : part.shape[3]
        ]
    return result


def models(small: Tensor, edited: Tensor) -> Tensor:
    """(1, 12, h, w): at each pixel a 3×4 matrix, row by row, that takes its colour and 1 to the edited one. small, edited:
    (1, 3, h, w)."""
    added = edited - small
    mean, mean_added = _mean(small), _mean(added)
    products = _mean(torch.cat([small[:, i : i + 1] * small[:, j : j + 1] for i, j in _PAIRS], 1))
    xx, xy, xz, yy, yz, zz = (
        products[:, k] - mean[:, i] * mean[:, j] + (EPSILON if i == j else 0.0) for k, (i, j) in enumerate(_PAIRS)
    )
    # The inverse of this symmetric matrix, by its cofactors.
    a, b, c, d, e, f = (
        yy * zz - yz * yz,
        xz * yz - xy * zz,
        xy * yz - xz * yy,
        xx * zz - xz * xz,
        xy * xz - xx * yz,
        xx * yy - xy * xy,
    )
    inverse = torch.stack([a, b, c, b, d, e, c, e, f], 1).unflatten(1, (3, 3)) / (xx * a + xy * b + xz * c)[:, None, None]
    together = _mean((added[:, :, None] * small[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
    covariance = together - mean_added[:, :, None] * mean[:, None]
    slopes = (covariance[:, :, :, None] * inverse[:, None]).sum(2)
    offsets = mean_added - (slopes * mean[:, None]).sum(2)
    identity = torch.eye(3, dtype=small.dtype, device=small.device)[..., None, None]
    return _mean(torch.cat([slopes + identity, offsets[:, :, None]], 2).flatten(1, 2))


def _mean(x: Tensor) -> Tensor:
    """Over each pixel's window, as far as it is in the image."""
    return F.avg_pool2d(x, 2 * RADIUS + 1, 1, RADIUS, count_include_pad=False)

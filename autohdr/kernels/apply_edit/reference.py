"""apply_edit in plain PyTorch, in any floating dtype, uint8 and uint16: what the other backends are checked against."""

import torch
from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709
WHITE = {torch.uint8: 255, torch.uint16: 65535}


def apply_edit(x: Tensor, curves: Tensor, matrix: Tensor, grid: Tensor | None) -> Tensor:
    white = WHITE.get(x.dtype, 1)
    wide = torch.float32 if white > 1 else torch.promote_types(x.dtype, torch.float32)
    values, curves, matrix = x.to(wide) / white, curves.to(wide), matrix.to(wide)
    cell, part = between(values * (curves.shape[2] - 1), curves.shape[2])
    lower, upper = (curves.gather(2, (cell + i).flatten(2)).view_as(part) for i in (0, 1))
    toned = lower + part * (upper - lower)
    y = torch.einsum("brc,bchw->brhw", matrix[..., :3], toned) + matrix[..., 3, None, None]
    if grid is not None:
        affine = _slice(grid.to(wide), y)
        y = torch.einsum("bhwrc,bchw->brhw", affine[..., :3], y) + affine[..., 3].permute(0, 3, 1, 2)
    return (y * white).round().clamp(0, white).to(x.dtype) if white > 1 else y.to(x.dtype)


def between(place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where coordinates lie between the points 0 ... count - 1, and beyond: the point before, the part of the way to the next."""
    first = place.detach().floor().nan_to_num().clamp(0, max(count - 2, 0))
    return first.long(), place - first


def _slice(grid: Tensor, y: Tensor) -> Tensor:
    """The affine matrix of every pixel, [batch, height, width, 3, 4], between those of the eight nearest points of the grid."""
    batch, rows, columns, bins = grid.shape[:4]
    height, width = y.shape[2:]
    luma = (y * y.new_tensor(LUMA)[:, None, None]).sum(1)
    down, down_part = between(_cells(y, height, rows), rows)
    across, across_part = between(_cells(y, width, columns), columns)
    level, level_part = between((luma * (bins - 1)).clamp(0, bins - 1), bins)
    image = torch.arange(batch, device=y.device)[:, None, None]

    def at(i: int, j: int, k: int) -> Tensor:
        row, column = (down + i).clamp(max=rows - 1), (across + j).clamp(max=columns - 1)
        return grid[image, row[:, None], column, (level + k).clamp(max=bins - 1)]

    def mixed(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
        return a + part[..., None, None] * (b - a)

    planes = [mixed(at(i, 0, k), at(i, 1, k), across_part) for i in (0, 1) for k in (0, 1)]
    low, high = (mixed(planes[k], planes[k + 2], down_part[:, None]) for k in (0, 1))
    return mixed(low, high, level_part)


def _cells(like: Tensor, pixels: int, cells: int) -> Tensor:
    """Where the centres of pixels lie among the centres of a row of cells that is as long."""
    pixel = torch.arange(pixels, device=like.device, dtype=like.dtype)
    return ((pixel + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)

"""A photo's pixels through PyTorch: a network over the whole of them where that fits in memory, else in strips or reduced."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autohdr.data.images import to_float
from autohdr.enhance.work import PhotoRows, Settings, Work
from autohdr.errors import UserError
from autohdr.measure import free_bytes, is_out_of_memory, resident_bytes
from autohdr.models.combined import LEAST, Combined, Reduced
from autohdr.models.graphs import Graphed
from autohdr.models.network import Network, not_finite
from autohdr.models.tiling import Rows, in_strips, most_bytes, rows_in_strips, works_in_strips
from autohdr.plan import IMAGES, PARAMETERS, plan

PLANNED_TOO_LITTLE = 1.5  # times what is planned, a pass of a small photo takes on a CPU at most

log = logging.getLogger(__name__)


class Networks:
    """A model, or None for tensors alone, on the settings' device, and how a photo's pixels go through it.

    strips: whether the model, and every network that it is made of, works in strips. by_rows: whether it takes a photo by rows.
    """

    def __init__(self, settings: Settings, model: nn.Module | None):
        self.settings, self.device = settings, torch.device(settings.device)
        self.model = model.eval().to(self.device) if model is not None else None
        parts = model.parts() if isinstance(model, Combined) else [model]
        self.strips = all(map(works_in_strips, parts))
        self.by_rows = works_in_strips(model) or isinstance(model, Reduced)
        self._graphed = _graphed(parts, self.device) if settings.cuda_graphs else None
        self._plans: dict[tuple[int, int], int] = {}

    def image(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) in memory as (1, 3, H, W) channels-last: no copy is made on the CPU."""
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device)

    def pixels(self, image: Tensor) -> np.ndarray:
        """The way back, floating point in float32. UserError where a value is not finite, which a file would have as black."""
        if refused := not_finite(image, self.settings.precision):
            raise UserError(refused)
        rows = image[0].permute(1, 2, 0)
        return (rows.float() if rows.is_floating_point() else rows).cpu().numpy()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All of the model's tensors, with their names."""
        assert self.model is not None
        return ((name, value) for name, value in self.model.state_dict().items() if isinstance(value, Tensor))

    def run(self, work: Work) -> None:
        """Enhancer.run."""
        with self.inference():
            if works_in_strips(self.model):
                self._within_memory(self.model, work)
            elif isinstance(self.model, Reduced):
                self._carried_up(self.model, work)
            else:
                self._whole(work)

    def _whole(self, work: Work) -> None:
        work.edit_whole(lambda pixels: self.pixels(self._output(self.image(pixels))), self.settings.strength)

    def _output(self, image: Tensor) -> Tensor:
        assert self.model is not None
        return self.model.over(image, self._part) if isinstance(self.model, Combined) else self._pass(self.model, image)

    def _pass(self, network: nn.Module, image: Tensor) -> Tensor:
        return (self._graphed or network)(image)

    def _within_memory(self, model: Network, work: Work) -> None:
        """The whole photo at once where that fits, else in strips."""
        limit, rows = self._limit(), TensorRows(work, self)
        images = 3 if work.space and self.settings.on_cpu else 1  # in floating point: as in the file, in sRGB, cut off
        if self._fits(model, rows, images, limit):
            samples = work.photo.pixels
            try:
                work.photo.pixels = to_float(samples) if self.settings.on_cpu else samples
                return self._whole(work)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            work.photo.pixels, work.seen, work.after = samples, None, None
            log.info("%d×%d: out of memory: going on in strips", *rows.shape[:1:-1])
        rows_in_strips(model, rows, limit)
        rows.finish(work)

    def _carried_up(self, model: Reduced, work: Work) -> None:
        rows = TensorRows(work, self)
        if not model.reduces(rows):
            work.photo.notes.append(f"with a side of less than {LEAST} pixels it is too small for fast: it was edited whole")
        model.over_rows(rows, partial(self._part, others=rows.result_bytes))
        rows.finish(work)

    def _part(self, model: Network, view: Tensor, others: int = 0) -> Tensor:
        """One network of several, or one view of a photo: whole where that fits, else in strips. others: bytes left to them."""
        limit = self._limit() - others
        if not works_in_strips(model) or self._fits(model, view, 2, limit):  # its result, and the sum of all
            return self._pass(model, view)
        return in_strips(model, view, limit)

    def _limit(self) -> int:
        if self.settings.max_memory is not None:
            return self.settings.max_memory
        return resident_bytes(self.device) + max(free_bytes(self.device) - self.settings.reserved, 0) * 9 // 10

    def _fits(self, model: Network, image: Tensor | Rows, images: int, limit: int) -> bool:
        """images: of its size, in floating point, that are held besides."""
        height, width = image.shape[-2:]
        if self._graphed:
            images += 4  # that a graph reads and writes, and is compared with
        left = limit - resident_bytes(self.device) - images * 12 * height * width
        if most_bytes(model, image) <= left:
            return True
        if (height, width) not in self._plans:
            parts = plan(model, (height, width), 1, self.settings.precision, device=self.device).parts
            needed = sum(size for part, size in parts.items() if part not in (PARAMETERS, IMAGES))
            self._plans[height, width] = math.ceil(PLANNED_TOO_LITTLE * needed)
        fits = self._plans[height, width] <= left
        if not fits and self._graphed:
            self._graphed.release()  # strips are planned for all that is free
        return fits

    @contextmanager
    def inference(self) -> Iterator[None]:
        precision = self.settings.precision
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, getattr(torch, precision), enabled=precision != "float32"),
        ):
            yield


def _graphed(parts: Sequence[nn.Module | None], device: torch.device) -> Graphed:
    network = parts[0]
    assert network is not None
    if len(parts) > 1:
        raise UserError(f"cuda_graphs: expected one network, got {len(parts)}, each of which would keep the memory of a pass")
    if getattr(network, "steps", None) is not None:
        raise UserError("cuda_graphs: expected a model that makes a photo in one pass, got a diffusion bridge")
    return Graphed(network, device)


class TensorRows(PhotoRows):
    """tiling.Rows of a photo."""

    dtype = torch.float32

    def __init__(self, work: Work, networks: Networks):
        super().__init__(work, networks.settings)
        self.device, self._networks = networks.device, networks

    def read(self, first: int, end: int) -> Tensor:
        seen = self.seen(self.pixels[first:end])
        return self._networks.image(seen.clip(0, 1) if self.space else seen)

    def write(self, first: int, rows: Tensor) -> None:
        self.put(first, self.seen(self.pixels[first : first + rows.shape[2]]), self._networks.pixels(rows))

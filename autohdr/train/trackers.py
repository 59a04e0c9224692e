"""What log.jsonl says, to other programs too: TensorBoard, and Weights & Biases."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autohdr.train.config import TrainConfig


class Trackers:
    """Those that the configuration asks for. One that fails is named in a warning and left alone: the run goes on."""

    def __init__(self, config: TrainConfig, run_id: str, step: int):
        """step: the run goes on after so many; TensorBoard drops what it has of later ones."""
        self._open: dict[str, Any] = {}
        for name, kind in (("tensorboard", _TensorBoard), ("wandb", _Wandb)):
            if getattr(config, name):
                with self._warning(name):
                    self._open[name] = kind(config, run_id, step)

    def log(self, entry: dict[str, Any]) -> None:
        """Write a log entry's numbers as KIND/NAME, at its step."""
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
        numbers = {f"{entry['kind']}/{name}": value for name, value in numbers.items()}
        for name, tracker in list(self._open.items()):
            with self._warning(name):
                tracker.log(numbers, entry["step"])

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._warning(name):
                tracker.close()

    @contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            warnings.warn(f"{name}: nothing more is logged there: {error}", stacklevel=3)


class _TensorBoard:
    def __init__(self, config: TrainConfig, run_id: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        assert config.out
        self._writer = SummaryWriter(config.out / "tensorboard", purge_step=step + 1)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, run_id: str, step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        assert config.out
        settings = {name: str(value) for name, value in vars(config).items()}
        self._run = wandb.init(
            project="autohdr", name=config.out.resolve().name, id=run_id, resume="allow", dir=config.out, config=settings
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()

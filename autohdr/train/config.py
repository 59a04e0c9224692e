"""What a training run is made of: one flat dataclass, read from TOML strictly and written back to it."""

import json
import tomllib
import types
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from autohdr.errors import UserError

RECIPES = Path(__file__).parents[1] / "configs"

Resume = bool | Literal["auto"]
"""Whether to go on with the run in the run folder. auto: if there is one; else it starts."""

STAGE = ("epochs", "size", "resize", "batch_size", "accumulate")
"""What a stage can have."""

LOSSES = {"l1": 1, "charbonnier": 1, "edge": 3, "ssim": 11, "vgg": 16, "adversarial": 24}
"""The components that a training loss can have, and the smallest side, in pixels, of an image that each can take."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a key of the TOML file and an option of `autohdr train`.

    Paths inside a TOML file are relative to that file.
    """

    model: str = "restormer_base"
    """Name of the model; `autohdr.models.list_models()` lists them."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Overrides of the model's own settings, such as {"norm_bias": true}."""
    init_weights: Path | None = None
    """Weights to start from (any layout that load_weights reads); none: start from random weights."""

    branch: Path | None = None
    """The folder of a run that this one goes on from: with its weights, average and moments, in the epoch where it stands, over
    the same pairs, to more `epochs`, another `lr`, or any other setting but the model's. That run stays as it is."""

    objective: Literal["direct", "bridge"] = "direct"
    """direct: one pass makes the photo. bridge: a diffusion bridge from the source photo, for models with a time embedding."""
    prediction: Literal["x0", "v", "noise"] = "x0"
    """What a bridge's network says: the target, v, or the noise (`autohdr.models.Bridge`)."""
    noise_scale: float = 0.05
    """Standard deviation of a bridge's noise where it starts from the source photo; pixels are in [0, 1]."""
    sample_steps: int = 4
    """Calls of a bridge's network for one photo, in validation, and in eval and enhance unless --steps says otherwise."""
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0})
    """{component: weight}: the loss is the weighted sum. Components: l1, charbonnier, edge (Sobel gradients), ssim (1 - SSIM),
    vgg (perceptual) and adversarial (a discriminator's, 0.01). The logs hold each of them unweighted; one of weight 0 is in the
    logs only. A bridge that predicts v or noise takes l1 and charbonnier only: the others compare photos, and it makes none in
    training."""
    adversarial_start: int = 1
    """The first epoch, counted from 1, in which the discriminator of the loss adversarial acts and learns."""
    vgg_weights: Path | None = None
    """torchvision's VGG19 weights, for the loss vgg; none: those in torch.hub's cache. They are never downloaded."""

    teacher: Path | None = None
    """Distillation: the weights of a larger model, as `load_checkpoint` reads them. Beside the targets this run's model learns
    what that one makes of the same sources."""
    teacher_weight: float = 0.5
    """What the losses count that are taken against the teacher's outputs, where those against the targets count 1."""
    teacher_features_weight: float = 0.0
    """What the features' distance from the teacher's counts, at each stage at which both networks' features have one shape; 0:
    outputs alone are learnt."""

    train_pairs: Path | None = None
    """JSONL file of the pairs to train on. Required."""
    val_pairs: Path | None = None
    """JSONL file of the pairs to validate on after each epoch. Required."""
    out: Path | None = None
    """The run folder; none: runs/NAME, with NAME that of the TOML file."""

    size: int = 384
    """Side of the square that every pair is brought to, in pixels."""
    resize: Literal["squash", "fit", "crop"] = "squash"
    """squash: ignore the aspect ratio. fit: keep it; the longer side is `size`. crop: cut a square out of the picture."""
    augment: bool = True
    """Mirror half of the training pairs, and cut their squares at random places; validation cuts them in the centre."""

    zoom: float = 1.0
    """Cut each training pair at a scale drawn between 1 and this, log-uniformly, and reduce it to `size`. squash: out of the
    whole photo at size x zoom, so that a sample shows between all of it and 1/zoom of each side. crop: out of the photo at full
    resolution."""
    rotate: bool = False
    """Turn the training pairs by 0, 90, 180 or 270 degrees, drawn."""
    flip: bool = False
    """Turn half of the training pairs upside down."""
    exposure_jitter: float = 0.0
    """Stops: the light of a source to train on is multiplied by 2**e, e drawn between minus and plus this. Its target stays."""
    white_balance_jitter: float = 0.0
    """Stops: the same of its red and of its blue, each drawn by itself."""
    mixup: float = 0.0
    """Mix another pair into each training pair, the share drawn from Beta(mixup, mixup), such as 1.2; 0: none."""

    epochs: int = 100
    """Passes over the training pairs. A run that is resumed may take more: the learning rate then follows the new number."""
    batch_size: int = 2
    """Pairs in one forward pass of one process."""
    accumulate: int = 1
    """Forward passes in one optimiser step: the effective batch is batch_size x accumulate x processes."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Progressive training: [{epochs = 60, size = 128, batch_size = 8}, {epochs = 40, size = 256}], one by one; []: none.
    A stage has epochs, and any of size, resize, batch_size and accumulate; what it leaves out is the run's. The run's `epochs` is
    their sum. Every epoch is validated at the run's own size and resize, so that all can be compared."""
    optimizer: Literal["adamw", "adan", "muon"] = "adamw"
    """adan and muon need the package pytorch_optimizer. muon: Muon for matrices and for convolutions that mix channels, AdamW for
    the rest, with steps of AdamW's size."""
    lr: float = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Way of the learning rate from `lr`, after the warm-up, towards `min_lr` at the last step; constant: it stays at `lr`."""
    min_lr: float = 0.0
    """Where the learning rate ends."""
    warmup_epochs: float = 0
    """Epochs in which the learning rate climbs linearly; half of the run at most."""
    lr_groups: dict[str, float] = field(default_factory=dict)
    """{pattern: factor}, such as {"encoder*" = 0.1}: a parameter whose name matches learns at `lr` times the factor. Patterns are
    fnmatch's; of several that match the first counts. The logs have `lr`."""
    freeze: list[str] = field(default_factory=list)
    """Patterns, such as ["encoder*"]: parameters whose name matches one stay as they are."""
    weight_decay: float = 0.02
    """The optimiser's decoupled weight decay, of matrices and convolutions alone: scales, shifts and time constants stay."""
    clip: float = 1.0
    """A gradient that is longer than this (L2 norm over all weights) is scaled down to it; 0: no clipping."""
    ema: float = 0.0
    """Decay of a running average of the weights; 0: no average. Validation measures the average, and the files of weights hold
    it. Step n, counted from 1, uses the decay min(ema, n / (n + 9)): the random start is soon forgotten."""

    spike_factor: float = 5.0
    """A loss is a spike if it is above spike_factor times the median of the last good losses, and more than 10 robust standard
    deviations above that median. Its step is left out. 0: no loss is a spike."""
    spike_window: int = 50
    """The median is taken over so many good losses. Before half of them are there, no loss is a spike."""
    snapshot_every: int = 10
    """Steps between two copies, in memory, of the state that two bad steps in a row go back to."""
    max_bad_steps: int = 5
    """The run stops after so many bad steps in a row: spikes, and losses or gradients that are not finite."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU. bfloat16 and float16: autocast, weights and optimiser stay in float32;
    float16 scales the loss, and a step whose gradient overflows is skipped and halves the scale."""
    compile: bool = False
    """torch.compile the network."""
    cuda_graphs: bool = False
    """Capture the network's passes as CUDA graphs where batches of one shape repeat, and replay them: for small crops, whose
    kernels take less time than their launches. On a GPU, in one process, without compile."""
    recompute: bool = False
    """A MambaDiffusion's blocks keep only their input, and compute the rest again in the backward pass: a fraction of the memory
    for a third more time. Restormer's ops always do so."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    workers: int = 2
    """Processes that decode images; 0: the training process decodes them itself."""
    cache_gb: float = 8
    """Gigabytes in OUT/cache for decoded and resized photos, until the run ends: only the first epoch decodes them. 0: every
    epoch decodes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes divide among them. ddp: the batches. fsdp (FSDP2): weights, gradients and optimiser too."""
    sharded_states: bool = False
    """With parallel = fsdp: each process writes and reads its own part of a training state, in the run folder's shards/, and none
    holds all of it: for states that one machine's memory does not hold."""
    rank_timeout: float = 60
    """A step waits so many seconds for another process of the run; then the run ends."""
    seed: int = 0
    """Seed of the first weights, the order of the pairs and their augmentation; 0 to 2**64 - 1."""
    log_every: int = 10
    """Optimiser steps between two step lines in log.jsonl."""
    save_minutes: float = 10
    """Minutes between two saves within an epoch; 0: not by the clock. Each epoch's end is saved too."""
    save_every: int = 0
    """Optimiser steps between two saves within an epoch; 0: not by steps."""
    keep: int = 2
    """Training states kept on disk: the newest, and older ones in case it is damaged."""
    best_metric: Literal["val_psnr", "val_ssim", "val_l1"] = "val_psnr"
    """checkpoint_best is of the epoch with the highest PSNR or SSIM, or the lowest L1."""
    patience: int = 0
    """The run ends once so many epochs, one after the other, have not been better than the best; 0: it does not."""
    samples: int = 4
    """Validation pairs shown in samples/epoch_NNN.jpg; 0: none."""
    tensorboard: bool = False
    """Log to the run folder's tensorboard/ too; needs the package tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases too, project autohdr; needs the package wandb, whose own variables, such as WANDB_MODE=offline, say
    where."""


def recipes() -> list[str]:
    """Names of the recipes for `train` that come with the package; lite.toml is train.lite's."""
    return sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != "lite")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a TOML file, or a shipped recipe by its bare name, into a TrainConfig.

    overrides replace the file's values. Raises UserError for a missing or malformed file, an unknown key, or a value of the
    wrong type. checks.check_config checks the values' ranges, and that the files that they name exist.
    """
    file = Path(path)
    if not file.is_file() and str(path) in recipes():
        file = RECIPES / f"{path}.toml"
    if not file.is_file():
        raise UserError(f"config: expected a TOML file or one of {', '.join(recipes())}; got {str(path)!r}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None
    hints = get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{file}: unknown key {key!r}; expected one of {', '.join(hints)}")
        if not _is_a(value, hints[key]):
            raise UserError(f"{file}: {key}: expected {_describe(hints[key])}, got {value!r}")
        if Path in _options(hints[key]):
            values[key] = (file.parent / value).resolve()
        elif hints[key] is float:
            values[key] = float(value)
    if values.get("stages"):
        check_stages(values["stages"])
        values.setdefault("epochs", sum(stage["epochs"] for stage in values["stages"]))
    return replace(TrainConfig(out=Path("runs") / file.stem), **(values | (overrides or {})))


def check_stages(stages: list[dict[str, Any]]) -> None:
    """Raise UserError unless each is a table with epochs, and with settings that a stage can have, of their types."""
    hints = get_type_hints(TrainConfig)
    for number, stage in enumerate(stages, 1):
        for key, value in stage.items():
            if key not in STAGE:
                raise UserError(f"stages: stage {number}: unknown key {key!r}; expected one of {', '.join(STAGE)}")
            if not _is_a(value, hints[key]):
                raise UserError(f"stages: stage {number}: {key}: expected {_describe(hints[key])}, got {value!r}")
        if "epochs" not in stage:
            raise UserError(f"stages: stage {number}: expected epochs beside {', '.join(stage) or 'nothing'}")


def dump_config(config: TrainConfig, header: str = "", *, inside: bool = False) -> str:
    """The TOML text that load_config reads back to the same config, from any folder; `header` becomes comments.

    inside: the text is for a file in config.out. There `out` is ".": a run is its folder, wherever that is moved or copied to.
    """
    lines = [f"# {line}" for line in header.splitlines()]
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name == "out" and inside:
            value = "."
        if value is not None:
            lines.append(f"{item.name} = {_toml(value.resolve() if isinstance(value, Path) else value)}")
    return "\n".join(lines) + "\n"


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run folder's config.toml, as TOML has them; one that an older version lacked has its default.

    Raises OSError, and ValueError where it is not valid TOML.
    """
    return tomllib.loads(dump_config(TrainConfig())) | tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str | Path):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    raise UserError(f"config: TOML cannot hold {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if Path in _options(hint):
        return isinstance(value, str)
    kind = get_origin(hint) or hint
    if kind is list and isinstance(value, list):
        return all(_is_a(item, get_args(hint)[0]) for item in value)
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if Path in _options(hint):
        return "a path (a string)"
    if get_origin(hint) is list:
        return f"a list, each {_describe(get_args(hint)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(hint, "a table")

"""Models as files for other runtimes, or of other weights. Each file is run, and compared with the model, before it is kept."""

import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram

from autohdr import __version__
from autohdr.data.images import read_rgb
from autohdr.edits import SHIPPED
from autohdr.errors import UserError
from autohdr.files import replacing, sha256
from autohdr.kernels.backends import default_backend
from autohdr.kernels.common import counts_above_one
from autohdr.models import load_checkpoint, save_weights
from autohdr.models.diffusion import Sampler
from autohdr.models.network import Network, in_8_bits
from autohdr.models.weight_files import some

Format = Literal["onnx", "torch-export", "aoti", "safetensors"]
Weights = Literal["float32", "float16", "bfloat16"]
Program = Callable[[Tensor], Tensor]

SIZES = ((61, 97), (5, 1031), (1031, 1))
"""Height and width of what is compared: odd, smaller and larger than a thumbnail; thin ones are large in no time. A side that is
less than the program takes is the least that it takes."""
FARTHEST = 1 / 255
"""The largest difference of a file that is kept. In 8 bits an image's mean difference: where a float falls between two codes its
last digit decides, so that single pixels say nothing."""
EMBEDDED = 1 << 30
"""Bytes of weights up to which an ONNX file holds them; it can hold less than 2 GB. Above, they are in a second one beside it."""
METADATA = "autohdr.json"
"""The name of the metadata within a file of torch.export; in ONNX its entries stand by themselves."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the files, and the difference from the model that FARTHEST limits, of values between 0 and 1."""

    files: list[Path]
    difference: float
    mean: bool
    """The difference is an image's mean, as for a model in 8 bits, not the largest."""
    sizes: list[tuple[int, int]]
    """Height and width of the images that were compared."""

    def __str__(self) -> str:
        sizes = ", ".join(f"{height}×{width}" for height, width in self.sizes)
        files = ", ".join(f"{file} ({file.stat().st_size / 1e6:.2f} MB)" for file in self.files)
        which = "on average" if self.mean else "at most"
        return f"{files}: at {sizes} pixels {which} {255 * self.difference:.4f} / 255 from the model"


def export(out: Path, to: Format, checkpoint: Path | None = None, weights: Weights = "float32") -> Exported:
    """Writes a checkpoint's model, by default the one that ships, as a program for photos of any size, or as a checkpoint again.

    A program takes float32 [1, 3, height, width], as the model does, and gives the same. A checkpoint (safetensors) holds its
    floating-point tensors in `weights`, but for the scales of 8-bit codes, and says beside them what the first one said; programs
    are float32 alone.
    Raises UserError where the format can't hold the model or its weights, where what it needs is not installed, and where the
    file, run on the CPU, is farther than FARTHEST from the model.
    """
    suffix, needed = _FORMATS[to]
    if out.suffix != suffix:
        raise UserError(f"--out: expected a file that ends in {suffix}, as {to} has it, got {out}")
    if not out.parent.is_dir():
        raise UserError(f"--out: expected a file in a folder that exists, got {out}")
    if weights != "float32" and to != "safetensors":
        raise UserError(f"--weights: expected float32 for {to}, got {weights}, which is for --to safetensors")
    if lacking := [name for name in needed if not importlib.util.find_spec(name)]:
        raise UserError(f'export: {to} needs {" and ".join(lacking)}: pip install "autohdr[{to}]"')
    checkpoint = checkpoint or SHIPPED
    model = load_checkpoint(checkpoint).requires_grad_(False)
    sizes = [(max(height, _least(model, to)), max(width, _least(model, to))) for height, width in SIZES]
    with TemporaryDirectory() as folder, torch.no_grad():
        run = _write(model, to, Path(folder) / out.name, checkpoint, weights)
        try:
            differences = [(run(image) - model(image)).abs() for image in _images(sizes)]
        except Exception as error:  # each runtime has its own
            raise UserError(f"export: {out}: not written: it does not run: {error}") from error
        mean = in_8_bits(model)
        difference = float(torch.stack([apart.mean() if mean else apart.max() for apart in differences]).max())
        if not difference <= FARTHEST:
            raise UserError(f"export: {out}: not written: {255 * difference:.2f} / 255 from the model, expected 1 at most")
        files = [out.with_name(file.name) for file in sorted(Path(folder).iterdir(), reverse=True)]
        for file in files:  # the weights beside a program before the program
            with replacing(file) as part:
                shutil.copyfile(Path(folder) / file.name, part)
    return Exported(files[::-1], difference, mean, sizes)


def _write(model: Network, to: Format, path: Path, checkpoint: Path, weights: Weights) -> Program:
    """Writes the file, and loads it to be run."""
    match to:
        case "onnx":
            return _onnx(_traced(model, to, "reference", checkpoint), path, _metadata(model, to, checkpoint))
        case "torch-export":
            return _torch_export(_traced(model, to, "auto", checkpoint), path, _metadata(model, to, checkpoint))
        case "aoti":
            return _aoti(_traced(model, to, "auto", checkpoint), path, _metadata(model, to, checkpoint))
        case "safetensors":
            return _safetensors(model, path, checkpoint, weights)


def _least(model: Network, to: Format) -> int:
    """The least side that the program takes; in AOTInductor's one, counts_above_one refuses less."""
    return model.multiple + 1 if to == "aoti" else 1


def _traced(model: Network, to: Format, backend: str, checkpoint: Path) -> ExportedProgram:
    """The model for every size. backend: of its ops; "reference" is PyTorch's own alone."""
    if model.steps is not None:
        raise UserError(f"export: {model.config.name} of {checkpoint} is a bridge, which draws noise at each call: no program")
    if to == "onnx" and in_8_bits(model):  # in float64 convolutions, which ONNX Runtime has not
        raise UserError(f"export: {model.config.name} of {checkpoint} is in 8 bits: not for onnx; torch-export has the op itself")
    followed = to == "aoti"
    try:
        with default_backend(backend), counts_above_one() if followed else nullcontext():
            image, shapes = torch.zeros(1, 3, 40, 48), ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
            return torch.export.export(
                model, (image,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=followed
            )
    except RuntimeError as error:  # an op's, whose reference can't be a program
        raise UserError(f"export: {model.config.name} can't become {to}: {error}; torch-export has the op itself") from error


def _metadata(model: Network, to: Format, checkpoint: Path) -> dict[str, str]:
    settings = {key: value for key, value in asdict(model.config).items() if key not in ("name", "overrides")}
    return {
        "autohdr": __version__,
        "model": model.config.name,
        "settings": json.dumps(settings),
        "weights_sha256": sha256(checkpoint),
        "input": "float32 [1, 3, height, width]: RGB, sRGB-encoded, from 0 to 1",
        "output": "as the input, not clamped",
        "sides": f"any, from {_least(model, to)} on",
    }


def _images(sizes: list[tuple[int, int]]) -> list[Tensor]:
    """A photo, since of noise a model may change nothing, in each of the sizes."""
    photo = torch.from_numpy(read_rgb(Path(__file__).with_name("samples") / "dining_room_src.jpg")).permute(2, 0, 1)[None]
    return [F.interpolate(photo, size, mode="bilinear", antialias=True) for size in sizes]


def _onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> Program:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # at first it names each op of torchvision, which it lacks
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["edited"]}
    shapes = ({2: "height", 3: "width"},)
    written = torch.onnx.export(program, (), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert written is not None
    written.model.metadata_props.update(metadata)
    written.save(path, external_data=sum(t.nbytes for t in program.state_dict.values()) > EMBEDDED)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["edited"], {"image": image.numpy()})[0])


def _torch_export(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> Program:
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})
    return torch.export.load(path).module()


def _aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> Program:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its own use of pytrees
            aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})
    except Exception as error:  # its own kinds, of which most say much more than why, and the compiler's
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"export: {path.name}: not written: AOTInductor: {why}") from error
    return aoti_load_package(str(path))


def _safetensors(model: Network, path: Path, checkpoint: Path, weights: Weights) -> Program:
    dtype, network = getattr(torch, weights), model.network if isinstance(model, Sampler) else model
    whole = "scale" if in_8_bits(network) else ()  # a code's can be too small for float16
    tensors = {
        name: tensor if name.endswith(whole) or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in network.state_dict().items()
    }
    if beyond := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        most = f"up to {torch.finfo(dtype).max:g}"
        raise UserError(f"--weights: {weights} has values {most}, {checkpoint} more in {len(beyond)} tensors: {some(beyond)}")
    save_weights(path, network, model.metadata, tensors)
    return load_checkpoint(path)


_FORMATS: dict[Format, tuple[str, tuple[str, ...]]] = {
    "onnx": (".onnx", ("onnxscript", "onnxruntime")),
    "torch-export": (".pt2", ()),
    "aoti": (".pt2", ()),
    "safetensors": (".safetensors", ()),
}
"""How a file's name ends, and the packages that it needs."""

"""The command `autohdr`, with a verb for each job. What a verb needs is imported when it runs: help stays quick."""

import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo
from tyro.extras import SubcommandApp

from autohdr import __version__
from autohdr.errors import UserError
from autohdr.score import Points
from autohdr.train.config import Resume, TrainConfig, dump_config, load_config, recipes


def _resume(words: list[str]) -> Resume:
    if words not in ([], ["auto"]):
        raise ValueError(f"expected --resume or --resume auto, got {' '.join(words)}")
    return "auto" if words else True


_RESUME = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[auto]",
    instance_from_str=_resume,
    is_instance=lambda value: isinstance(value, bool | str),
    str_from_instance=lambda value: [] if value is False else [str(value)],
)

DESCRIPTION = """Turn unedited real-estate photos into edited, HDR-looking ones: train a model on pairs, evaluate it,
and run it over folders of photos. `autohdr VERB -h` explains each verb; `autohdr --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; `argv` without the program's name. Returns the exit status: 0 done, 1 failed or part of it, 2 wrong input,
    3 part of it skipped, 128 and a signal's number where one stopped a run (Ctrl-C 130, SIGTERM 143). Like every argument parser
    it raises SystemExit for -h and for bad options.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may have characters that the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    if argv == ["--version"]:
        print(f"autohdr {__version__}")
        return 0
    try:
        verbs, options = _verbs(argv), {"config": (OmitArgPrefixes,), "registry": _registry()}
        named = next((name for name in (" ".join(argv[:2]), *argv[:1]) if name in verbs), None)
        if named:  # by itself: what it says of a wrong option points to its own help
            rest = argv[len(named.split()) :]
            return tyro.cli(verbs[named], prog=f"autohdr {named}", args=rest, **options) or 0
        return _app(verbs).cli(prog="autohdr", description=DESCRIPTION, args=argv, **options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def doctor() -> None:
    """Print the versions, the compiled code and the hardware, and for every op which backends can run here."""
    from autohdr.doctor import doctor

    print(doctor())


def split(pairs: Positional[Path], out: Path, test: int = 5, seed: int = 0, folds: int | None = None) -> None:
    """Divide pairs into test.jsonl, train.jsonl and val.jsonl, so that no photo, nor one like it, is in two of them.

    Args:
        pairs: JSONL file of {"src": ..., "tar": ...}, paths relative to the file.
        out: Folder for the parts.
        test: The first so many pairs are held out; 10% of the others validate.
        seed: Seed of the draw.
        folds: Cross-validation: this many folds instead, fold_0/train.jsonl, fold_0/val.jsonl, ...
    """
    from autohdr.data.audit import audit
    from autohdr.data.pairs import read_pairs
    from autohdr.data.splits import FEW, write_splits

    found = audit([pairs])
    if found.groups:
        print(found)
    for file in write_splits(found.pairs, out, folds, seed, test, found.same):
        count = len(read_pairs(file))
        print(f"{file}: {count} pairs")
        if count < FEW and file.name != "train.jsonl":
            print(f"warning: {file}: {count} pairs are too few to tell two models apart: {FEW} at least", file=sys.stderr)


def audit(pairs: Positional[list[Path]], out: Path | None = None) -> int:
    """Find photos that show the same picture: re-encoded, mirrored, cropped by a few percent, brightened, edited anew.

    Given one list, prints the groups of pairs that `data split` will keep together. Given several, such as train.jsonl,
    val.jsonl and test.jsonl, the exit status is 1 where a group is in more than one of them.

    Args:
        pairs: JSONL files of {"src": ..., "tar": ...}, paths relative to the file.
        out: JSON file for the groups.
    """
    from autohdr.data.audit import audit
    from autohdr.files import write_text

    found = audit(pairs)
    print(found)
    if out:
        write_text(out, found.json())
    return 1 if found.crossing else 0


def synth(
    out: Path,
    count: int = 64,
    height: int = 384,
    width: int = 576,
    seed: int = 0,
    workers: int | None = None,
    exteriors: int = 0,
) -> None:
    """Render synthetic rooms as pairs: a photo with a bright window, and its edit. No assets needed.

    Args:
        out: Folder for the images and their pairs.jsonl.
        count: Number of pairs, each of a room of its own.
        height: Pixels.
        width: Pixels.
        seed: Seed of the rooms.
        workers: Processes that render; one a core by default.
        exteriors: How many of the pairs, the last, show a house from its street instead, by day or at dusk.
    """
    from autohdr.data.synthetic import synthesize

    print(synthesize(out, count, height, width, seed, workers, exteriors=exteriors))


def degrade(finished: Positional[Path], out: Path, size: int = 2048, seed: int = 0, workers: int | None = None) -> int:
    """Make pairs from finished photos alone: each beside what a camera might have taken, unedited.

    A photo that cannot be read is reported and skipped, and the exit status is then 1.

    Args:
        finished: Folder of finished photos.
        out: Folder for the images and their pairs.jsonl.
        size: Pixels of the longest side at most; larger photos are reduced.
        seed: Seed of the light, the exposure and everything else that the camera draws.
        workers: Processes; one a core by default.
    """
    from autohdr.data.synthetic import degrade

    result = degrade(finished, out, size, seed, workers)
    for path, reason in result.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    print(f"{result.pairs}: {result.count} pairs, {len(result.skipped)} photos skipped")
    return 1 if result.skipped else 0


def adapt(pairs: Positional[Path], out: Path) -> int:
    """Fit the model that ships to a look of your own, from some tens of pairs, in a minute on a CPU.

    How far it goes from the shipped weights, and what that gains, is found by leaving out one picture after the other. Where the
    gain is not above chance, nothing is written, and the exit status is 1.

    Args:
        pairs: JSONL file of {"src": ..., "tar": ...}, paths relative to the file: of eight different pictures at least.
        out: File for the weights, for `enhance --checkpoint` and `eval --checkpoint`.
    """
    from autohdr.train.adapt import adapt

    result = adapt(pairs, out)
    if not result.helps:
        print(f"error: {out}: not written: the gain is not above chance: {result}", file=sys.stderr)
        return 1
    print(f"{result}\n{out}: the shipped weights count for {result.shrinkage} of such pairs in it")
    return 0


@dataclass(frozen=True)
class ModelOptions:
    """The model that is measured, or that enhances."""

    checkpoint: UseAppendAction[tuple[Path, ...]] = ()
    """Weights, such as the checkpoint_best.safetensors of a run folder; by default the small model that ships.
    Given more than once, several models work together."""
    average: Literal["outputs", "weights"] = "outputs"
    """Of several models, the mean of what they make, or of their weights, where they are checkpoints of one run."""
    flips: Literal[1, 2, 4, 8] = 1
    """The mean over so many views of the photo, each a pass. 2 adds its mirror image, and is safe; 4 adds both upside down and 8
    these transposed, and lose where a look treats above and below differently, as ceilings and floors."""
    fast: Annotated[bool, FlagCreatePairsOff] = False
    """Let the model see the photo at a third of its height and width, and carry its edit up: about a ninth of the work. Photos
    with a side of less than 64 pixels it sees whole."""
    sharpen: float = 0.0
    """How much of the luma's finest detail is added to the result, up to 2; 0.3 is gentle."""
    steps: int | None = None
    """Calls of a diffusion bridge's network; by default as many as it was validated with."""

    def load(self) -> Any:
        """The network that these options mean. UserError as load_checkpoint and combine raise it, and for wrong steps."""
        from autohdr.edits import SHIPPED
        from autohdr.models import combine, load_checkpoint

        models = [self._with_steps(load_checkpoint(checkpoint)) for checkpoint in self.checkpoint or (SHIPPED,)]
        return combine(models, average=self.average, flips=self.flips, fast=self.fast, sharpen=self.sharpen)

    def _with_steps(self, model: Any) -> Any:
        if self.steps is None:
            return model
        from autohdr.models.diffusion import STEPS

        if model.steps is None or not 1 <= self.steps <= STEPS:
            raise UserError(f"--steps: expected 1 to {STEPS}, and a checkpoint that was trained as a bridge; got {self.steps}")
        model.steps = self.steps
        return model


def evaluate(
    pairs: Path,
    out: Path,
    model: ModelOptions = ModelOptions(),
    size: int | None = None,
    resize: Literal["squash", "fit", "crop"] = "squash",
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    max_loss: float | None = None,
    lpips: tuple[Path, ...] = (),
    allow_trained: Annotated[bool, FlagCreatePairsOff] = False,
) -> int:
    """Measure a model on held-out pairs, beside the unedited source and two fixed recipes. Ends in a table and report.html.

    With --fast or a half --precision the model is measured in full as well, and the differences, photo by photo.

    Args:
        pairs: JSONL file of pairs that the model was not trained on.
        out: Folder for results.json and report.html.
        model: The model.
        size: Side of the square that every pair is brought to; by default they keep their own size.
        resize: How pairs are brought to SIZE.
        device: auto (CUDA where there is one), cpu, cuda, ...
        precision: bfloat16 and float16 run the model under autocast. float16 rounds less, ends at 65504, and is for a GPU.
        max_loss: The most that --fast and a half --precision may lose on these pairs, in dB PSNR, such as 0.05. Where it is
            more, the exit status is 1.
        lpips: Measure LPIPS too, by the weights in these files: torchvision's alexnet-owt-7be5be79.pth and lpips'
            weights/v0.1/alex.pth, or both in one.
        allow_trained: Measure pairs with photos that the model was trained on too; the table and the report then say so.
    """
    from autohdr.data.pairs import check_pairs, read_pairs
    from autohdr.edits import SHIPPED
    from autohdr.evaluate import evaluate
    from autohdr.measure import pick_device
    from autohdr.report import format_table
    from autohdr.report.tables import with_interval

    cheaper = ["--fast"] * model.fast + [f"--precision {precision}"] * (precision != "float32")
    if max_loss is not None and not cheaper:
        raise UserError("--max-loss: expected --fast or --precision bfloat16 or float16, whose loss it limits, got none")
    where = pick_device(device)
    network = model.load()
    listed = read_pairs(pairs)
    check_pairs(listed)
    settings = {"size": size, "resize": resize, "device": where, "precision": precision, "allow_trained": allow_trained}
    settings["lpips"] = lpips
    named = ", ".join(map(str, model.checkpoint or (SHIPPED,)))
    if cheaper:
        settings["whole"] = replace(model, fast=False).load() if model.fast else network
    results = evaluate(listed, out, model=network, checkpoint=named, **settings)
    print(format_table(results))
    print(f"report: {out / 'report.html'}")
    if max_loss is None:
        return 0
    gain, half = results["summary"]["model_minus_whole"]["psnr"]
    lost = f"{' and '.join(cheaper)} loses {with_interval((-gain, half), 3)} dB PSNR; --max-loss allows {max_loss:g}"
    if -gain <= max_loss:
        print(lost)
        return 0
    print(f"error: {lost}", file=sys.stderr)
    return 1


def compare(
    checkpoints: Positional[list[Path]],
    pairs: Path,
    out: Path,
    points: Points,
    size: int | None = None,
    resize: Literal["squash", "fit", "crop"] = "squash",
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    forms: tuple[Literal["bfloat16", "float16", "fast", "flips-2", "flips-4", "flips-8", "sharpen"], ...] = (),
    ensemble: UseAppendAction[tuple[tuple[Path, ...], ...]] = (),
    average: tuple[Literal["outputs", "weights"], ...] = ("outputs",),
    cost_size: str | None = None,
    lpips: tuple[Path, ...] = (),
    allow_trained: Annotated[bool, FlagCreatePairsOff] = False,
) -> None:
    """Measure several models on held-out pairs: quality, cost on this machine, a score of both. Ends in a table and compare.html.

    The unedited source and the two fixed recipes stand beside them.

    Args:
        checkpoints: Weights of the models; `lite` is the model that ships. Differences are taken from the first.
        pairs: JSONL file of pairs that none of the models was trained on.
        out: Folder for compare.json and compare.html.
        points: What the score is made of.
        size: Side of the square that every pair is brought to; by default they keep their own size.
        resize: How pairs are brought to SIZE.
        device: auto (CUDA where there is one), cpu, cuda, ...
        precision: bfloat16 and float16 run the models under autocast.
        forms: Measure each model in these forms too: in half precision, and as `enhance` has it with --fast, --flips 2, 4 and 8,
            and --sharpen 0.3.
        ensemble: Two checkpoints or more, which are measured together as well. Given more than once, there are several.
        average: Of each ensemble, the mean of what its models make, of their weights, where they are checkpoints of one run, or
            both.
        cost_size: WIDTHxHEIGHT in pixels: seconds and memory are those of the first pair's source, brought to this size; by
            default those of the pairs.
        lpips: Measure LPIPS too, by the weights in these files: torchvision's alexnet-owt-7be5be79.pth and lpips'
            weights/v0.1/alex.pth, or both in one. The score leaves it out.
        allow_trained: Measure pairs with photos that a model was trained on too; the table and the page then say so.
    """
    from autohdr.compare import compare
    from autohdr.data.pairs import check_pairs, read_pairs
    from autohdr.edits import SHIPPED
    from autohdr.measure import pick_device
    from autohdr.report import format_comparison

    files, *ensembles = (
        [SHIPPED if path == Path("lite") and not path.exists() else path for path in paths] for paths in (checkpoints, *ensemble)
    )
    listed = read_pairs(pairs)
    check_pairs(listed)
    settings = {"size": size, "resize": resize, "device": pick_device(device), "precision": precision, "points": points}
    settings |= {"forms": forms, "ensembles": ensembles, "average": average}
    settings |= {"cost_size": _parse_size(cost_size, "--cost-size") if cost_size else None}
    print(format_comparison(compare(files, listed, out, lpips=lpips, allow_trained=allow_trained, **settings)))
    print(f"page: {out / 'compare.html'}")


def enhance(
    paths: Positional[list[Path]],
    out: Path | None = None,
    model: ModelOptions = ModelOptions(),
    auto_tone: Annotated[bool, FlagCreatePairsOff] = False,
    strength: float = 1.0,
    save_edit: Annotated[bool, FlagCreatePairsOff] = False,
    brackets: Literal["off", "auto", "3", "5"] = "off",
    property: Annotated[bool, FlagCreatePairsOff] = False,
    keep_white_balance: Annotated[bool, FlagCreatePairsOff] = False,
    on_exists: Literal["skip", "overwrite", "rename", "error"] = "skip",
    shard: str = "1/1",
    jobs: int | None = None,
    quality: int | None = None,
    format: Literal["jpeg", "png", "tiff", "webp", "avif", "same"] = "same",
    depth: Literal[8, 16] | None = None,
    subsampling: Literal["444", "422", "420"] | None = None,
    strip: Literal["gps", "all"] | None = None,
    damaged: Literal["skip", "keep"] = "skip",
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    max_memory: str | None = None,
    cuda_graphs: Annotated[bool, FlagCreatePairsOff] = False,
    json: Annotated[bool, FlagCreatePairsOff] = False,
    verbose: Annotated[bool, FlagCreatePairsOff, tyro.conf.arg(aliases=["-v"])] = False,
) -> int:
    """Enhance photos at their own resolution; format, bit depth, colour space and metadata stay, unless asked otherwise.

    Of a photo that is unlike those that the shipped model learnt from, less is changed, and a line says so.
    The same call again finishes what a kill, a full disk or Ctrl-C left: OUT/autohdr.jsonl has a line of each photo, with hashes.
    The exit status is 0 where all is done, also if before; 1 where a photo failed (it is damaged, cannot be written, there is too
    little memory); 3 where none did but some were skipped: what may be a photo in a folder but is of a kind that is not read
    (.psd, a dangling link), or a photo whose result exists and is not of an earlier run.

    Args:
        paths: Photos, and folders of photos; or `-`: one photo comes through standard input, its result goes to standard output.
        out: Folder for the results; needed but for `-`.
        model: The model that enhances.
        auto_tone: Use the fixed auto-tone instead of a model.
        strength: How much of the edit is made, 0 to 1; above 1, up to 2, it is exaggerated.
        save_edit: Write each photo's edit beside it too, to carry on with in an editor: NAME.cube, and its curves as NAME.json.
        brackets: Exposures of one picture become one result, with the name of the middle one: as many as there are, 3 or 5.
            Told by EXIF, with a number by what they show too; what can't be told stays single photos, and a line says so.
        property: The photos of a folder are of one property: their edits are changed, within bounds, so that the walls come out
            of nearly one tint and lightness.
        keep_white_balance: Leave the photo's own white balance: what is a neutral grey stays one.
        on_exists: What to do where a result exists and was not done before, by the same model and options from the same photo:
            skip the photo (but make anew what OUT/autohdr.jsonl knows and nobody has changed since), overwrite everything, also
            what was done before, rename the result to NAME-1, NAME-2, ..., or end with an error before any work.
        shard: I/N: the I-th of N parts of the photos, for N processes, as of a Slurm array. Each writes OUT/autohdr.I-of-N.jsonl.
        jobs: Threads that read and write photos while the model works; one a core by default.
        quality: Of JPEG, AVIF and lossy WebP, 1 to 100; by default a JPEG has its file's own, 90 at least, a WebP 95, an AVIF 90.
        format: Of the results; HEIC, JPEG XL and raw become JPEG by default. What a format does not hold of a photo, a line says.
        depth: Bits a channel; by default the photo's own, where the format has them.
        subsampling: Of the colours of JPEG and AVIF; by default a JPEG has its file's own.
        strip: Take the place out of what a photo says, or everything but its colour and density.
        damaged: A JPEG whose data are damaged has failed and is left out, or what there is of it is written.
        device: auto (CUDA where there is one, but the CPU for the shipped model by itself and the auto-tone), cpu, cuda, ...
        precision: bfloat16 and float16 run the model under autocast. float16 rounds less, ends at 65504, and is for a GPU.
        max_memory: What the process may hold at most, such as 3GB; on a GPU, what its tensors may. A Restormer or a NAFNet works
            in strips where it needs to, with the same result; a photo that needs more even so has failed. By default nine tenths
            of what is free.
        cuda_graphs: Replay the network's pass as a CUDA graph where images of one size follow each other: for small ones, as of
            --fast, whose kernels take less time than their launches.
        json: Print what became of the photos as JSON, instead of a line.
        verbose: Print the plan of each photo that does not fit in memory whole: strips, files, expected memory and time.
    """
    if auto_tone and (model.checkpoint or model.flips > 1 or model.fast or model.sharpen):
        raise UserError("enhance: expected --auto-tone, or a model with --checkpoint, --flips, --fast and --sharpen, got both")
    through = paths == [Path("-")]
    if through == (out is not None) or through and (save_edit or property or brackets != "off"):
        raise UserError("enhance: expected photos and --out FOLDER, or - alone for standard input and output")
    # Until the model's next kernel its threads would spin, on cores that photos are read and encoded on.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from autohdr.edits import shipped
    from autohdr.enhance import Enhancer, Interrupted, enhance
    from autohdr.measure import parse_bytes, pick_device

    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    limit = parse_bytes(max_memory) if max_memory else None
    if device in ("auto", "cpu") and precision == "float32" and (auto_tone or model == ModelOptions()):
        network, where = None if auto_tone else shipped(), "cpu"  # without PyTorch, whose start takes longer than many photos
    else:
        network, where = None if auto_tone else model.load(), pick_device(device)
    settings = {"device": where, "precision": precision, "strength": strength, "max_memory": limit, "cuda_graphs": cuda_graphs}
    settings |= {"quality": quality, "keep_damaged": damaged == "keep", "keep_white_balance": keep_white_balance}
    settings |= {"format": format, "depth": depth, "subsampling": subsampling or "", "strip": strip or ""}
    if out is None:
        enhanced, notes, reason = Enhancer(network, **settings).file(sys.stdin.buffer.read())
        for note in notes:
            print(f"standard input: {note}", file=sys.stderr)
        if reason:
            print(f"failed standard input: {reason}", file=sys.stderr)
        sys.stdout.buffer.write(enhanced)
        return 1 if reason else 0
    stopped = 0
    try:
        part = _parse_shard(shard)
        settings |= {"save_edit": save_edit, "brackets": brackets, "property": property}
        result = enhance(paths, out, network, on_exists=on_exists, shard=part, jobs=jobs, **settings)
    except Interrupted as error:
        result, stopped = error.result, error.signal
    print(result.json() if json else result)
    for kind, photos in (("skipped ", result.skipped), ("failed ", result.failed), ("", result.notes)):
        for path, text in photos:
            print(f"{kind}{path}: {text}", file=sys.stderr)
    return 128 + stopped if stopped else 1 if result.failed else 3 if result.skipped else 0


def _parse_shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise UserError(f"--shard: expected I/N, such as 3/16, got {text!r}")
    return int(part), int(parts)


def _parse_size(text: str, option: str) -> tuple[int, int]:
    """Height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"{option}: expected a side or WIDTHxHEIGHT in pixels, such as 896 or 3297x2201, got {text!r}")
    return int(sides[-1]), int(sides[0])


def export(
    checkpoint: Positional[Path | None] = None,
    *,
    to: Literal["onnx", "torch-export", "aoti", "safetensors"] = "onnx",
    out: Path,
    weights: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Write a model as a program for another runtime, for photos of any size, or as a smaller checkpoint.

    The file holds metadata, and is run and compared with the model before it is kept.

    Args:
        checkpoint: Weights, such as the checkpoint_best.safetensors of a run folder; by default the model that ships.
        to: onnx: for ONNX Runtime and others (pip install "autohdr[onnx]"). torch-export: for torch.export.load, with autohdr's
            own ops. aoti: for torch._inductor.aoti_load_package, the same compiled by a C++ compiler for this processor.
            safetensors: a checkpoint for autohdr.
        out: File, .onnx, .pt2 or .safetensors. One that is farther than 1/255 from the model is not kept.
        weights: Of a checkpoint, in the file: half of it in half precision. The model that is loaded from it is float32 again.
    """
    from autohdr.export import export

    print(export(out, to, checkpoint, weights))


def quantize(checkpoint: Positional[Path], *, calibrate: Path, pairs: Path, out: Path, most_loss: float = 0.05) -> None:
    """Write a Restormer's checkpoint with its products in 8 bits, for the CPU, unless that costs more than it may.

    Prints PSNR on the pairs, seconds and bytes, before and after. Every verb but train takes the new checkpoint as any other.

    Args:
        checkpoint: Weights, such as the checkpoint_best.safetensors of a run folder.
        calibrate: Folder of unedited photos, of the kind that the model will see, from which the activations' scales are taken.
        pairs: JSONL file of held-out pairs, on which the loss is measured.
        out: File, .safetensors.
        most_loss: dB PSNR that 8 bits may cost, as a mean of the pairs. Where it is more, nothing is written.
    """
    from autohdr.data.pairs import check_pairs, read_pairs
    from autohdr.quantize import quantize

    listed = read_pairs(pairs)
    check_pairs(listed)
    print(quantize(checkpoint, calibrate, listed, out, most_loss))


def plan(
    model: Positional[str],
    size: str = "384",
    batch: int = 1,
    device: str = "auto",
    max_memory: str | None = None,
    recompute: Annotated[bool, FlagCreatePairsOff] = False,
) -> None:
    """Say what memory and time a model will take, for inference and training in float32 and bfloat16, before it takes them.

    Args:
        model: Its name: `autohdr.models.list_models()`.
        size: Of the images in pixels: the side of a square, or WIDTHxHEIGHT.
        batch: Images in one pass.
        device: auto (CUDA where there is one), cpu, or cuda, which is planned for without one, too; meta counts tensors alone.
        max_memory: Inference of a Restormer or a NAFNet in strips, within so much memory for the whole process, such as 3GB.
            Images are counted in float32; `autohdr enhance` holds a photo in less, as the samples of its file.
        recompute: Training of a MambaDiffusion whose blocks keep their input alone, as `autohdr train --recompute` does.
    """
    from autohdr.measure import parse_bytes, pick_device
    from autohdr.plan import table

    where = pick_device(device) if device == "auto" else device
    limit = parse_bytes(max_memory) if max_memory else None
    print(table(model, _parse_size(size, "--size"), batch, where, limit, recompute))


def watch(run: Positional[Path], html: Path | None = None, port: int = 0) -> None:
    """Show a run as it stands, while it goes on or later: curves, samples, events, the time that is left.

    The page is served to this machine alone, and renews itself; nothing is written into the run folder.

    Args:
        run: The run folder of `autohdr train`.
        html: Write the page into this file instead; it needs no other.
        port: Of 127.0.0.1; by default a free one, which is printed.
    """
    from autohdr.watch import watch

    watch(run, html, port)


def demo(out: Path = Path("demo_run"), train: Annotated[bool, FlagCreatePairsOff] = False) -> int:
    """Enhance the sample photos that come along with the model that does, and write a report with before/after sliders.

    Args:
        out: Folder for everything; one that an earlier demo made is made anew.
        train: The whole road instead, in minutes on a CPU: synthesise rooms, train restormer_nano, evaluate it on rooms that it
            has not seen, enhance those. The exit status is 1 unless it beats gain and gamma by at least 0.5 dB.
    """
    from autohdr.demo import WANTED_MARGIN, demo, demo_train

    if not train:
        demo(out)
        return 0
    return 0 if demo_train(out).margin >= WANTED_MARGIN else 1


def _train_verb(argv: list[str]) -> Any:
    """The verb `train`, with the values of the recipe that `argv` names as the options' defaults."""
    named = argv[1] if argv[:1] == ["train"] and len(argv) > 1 and not argv[1].startswith("-") else None
    recipe = load_config(named) if named else TrainConfig()

    def train(
        config: Annotated[Positional[str], tyro.conf.arg(metavar="CONFIG")],
        settings: TrainConfig = recipe,
        resume: Annotated[Resume, _RESUME] = False,
        dry_run: Annotated[bool, FlagCreatePairsOff] = False,
        show: Path | None = None,
        print_config: Annotated[bool, FlagCreatePairsOff] = False,
        folds: int | None = None,
        baseline: Path | None = None,
    ) -> int:
        """Train a model. Every setting of the TOML file can be overridden by an option.

        The run folder gets the resolved config, logs, curve.png, samples and checkpoints. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1
        finish the step and save; `autohdr train RUN_FOLDER/config.toml --resume` goes on from there. On several GPUs:
        `torchrun --nproc-per-node 8 -m autohdr train CONFIG`.

        Args:
            config: TOML file, or the name of a recipe: RECIPES. It comes first, before the options.
            settings: The defaults are those of CONFIG, where it is named before -h.
            resume: Go on with the run that is in the run folder; `--resume auto` starts it where there is none.
            dry_run: Build everything, check the data, make two steps, and tell memory and time; write nothing.
            show: With --dry-run, a JPEG file for pairs as the network will see them, augmented.
            print_config: Print the settings as TOML, and do nothing else.
            folds: Cross-validation: divide the training pairs into this many folds, train without each of them in turn
                (OUT/fold_0, ...), and measure every pair by the model that has not seen it: OUT/cross_validation.json.
            baseline: With --folds, the folder of another cross-validation of the same pairs, to compare with pair by pair.
        """
        if config != named:
            raise UserError("train: CONFIG comes first: autohdr train CONFIG [options]")
        if print_config:
            print(dump_config(settings), end="")
            return 0
        if show and not dry_run:
            raise UserError("--show: shows pairs without training: give --dry-run as well")
        return _train(settings, resume, dry_run, show, folds, baseline)

    train.__doc__ = (train.__doc__ or "").replace("RECIPES", ", ".join(recipes()))
    return train


def _train(
    settings: TrainConfig, resume: Resume, dry_run: bool, show: Path | None, folds: int | None, baseline: Path | None
) -> int:
    """Rehearse a run, cross-validate, or train: the exit status."""
    if baseline and folds is None:
        raise UserError("--baseline: compares cross-validations: give --folds as well")
    if dry_run and folds is not None:
        raise UserError("--dry-run: rehearses one run: leave out --folds")
    from autohdr.train.folds import cross_validate
    from autohdr.train.guards import TrainingError
    from autohdr.train.loop import train
    from autohdr.train.rehearsal import rehearse

    # torchrun starts several processes: only the first one prints.
    say = print if os.environ.get("RANK", "0") == "0" else lambda text: None
    try:
        if dry_run:
            say(rehearse(settings, show))
            return 0
        if folds is not None:
            found = cross_validate(settings, folds, resume=resume, baseline=baseline)
            if isinstance(found, int):
                against = f" --baseline {baseline}" if baseline else ""
                print(f"stopped; go on: autohdr train {settings.out}/config.toml --folds {folds} --resume{against}")
                return 128 + found
            return 0
        summary = train(settings, resume=resume)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if summary.interrupted:
        say(f"stopped after {summary.epochs} epochs; go on: autohdr train {summary.out / 'config.toml'} --resume")
        return 128 + summary.interrupted
    weights = summary.out / "checkpoint_best.safetensors"
    say(f"best: epoch {summary.best['epoch']}, PSNR {summary.best['val_psnr']:.2f} dB: {weights}")
    return 0


def _registry() -> ConstructorRegistry:
    """Tables and lists of them, which tyro would take apart, are one JSON argument: --model-args '{"norm_bias": true}'."""

    def table(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kind = info.type_origin
        if kind is not dict and not (kind is list and get_origin(get_args(info.type)[0]) is dict):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda args: _parse_json(args[0], kind),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    registry = ConstructorRegistry()
    registry.primitive_rule(table)
    return registry


def _parse_json(text: str, kind: type) -> Any:
    wanted = "object" if kind is dict else "list of objects"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON {wanted}, got {text!r}: {error}") from None
    if not isinstance(value, kind) or kind is list and not all(isinstance(item, dict) for item in value):
        raise ValueError(f"expected a JSON {wanted}, got {text!r}")
    return value


def _verbs(argv: list[str]) -> dict[str, Any]:
    """{what comes after `autohdr`: the function of its options}, in the order of the help."""
    verbs = {"doctor": doctor, "data split": split, "data audit": audit, "data synth": synth, "data degrade": degrade}
    verbs |= {
        "train": _train_verb(argv),
        "watch": watch,
        "adapt": adapt,
        "eval": evaluate,
        "compare": compare,
        "enhance": enhance,
        "export": export,
        "quantize": quantize,
        "plan": plan,
        "demo": demo,
    }
    return verbs


def _app(verbs: dict[str, Any]) -> SubcommandApp:
    app, data = SubcommandApp(), SubcommandApp()
    about = "Make pairs: split a list of them, find near-duplicates in some, synthesise some, or make some of finished photos."
    for name, function in verbs.items():
        if name.startswith("data "):
            data.command(name=name.removeprefix("data "))(function)
        else:
            app.command(name=name)(function)
        if name == "doctor":
            app.command(data, name="data", help=about)
    return app

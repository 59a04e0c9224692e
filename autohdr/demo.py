"""The demos: photos that ship with the package, enhanced by the model that does; and the whole road with training."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autohdr.data.pairs import read_pairs
from autohdr.data.splits import write_splits
from autohdr.data.synthetic import synthesize
from autohdr.edits import SHIPPED
from autohdr.enhance import enhance
from autohdr.errors import UserError
from autohdr.evaluate import evaluate
from autohdr.models import load_checkpoint
from autohdr.report import format_table
from autohdr.train.config import TrainConfig, load_config
from autohdr.train.loop import train

SCENES, HELD_OUT = 88, 12
HEIGHT, WIDTH = 256, 384
WANTED_MARGIN = 0.5  # dB PSNR above gain and gamma: a model that has learnt reaches more, in minutes not yet auto-tone
SAMPLES = Path(__file__).with_name("samples") / "pairs.jsonl"
"""Two rooms at 1536 x 1024, as JPEG of quality 75. Their seeds were not noted; `autohdr data synth --out FOLDER --height 1024
--width 1536` makes others to choose from."""
SHOWN = (512, 768)  # height and width at which the samples are measured and shown: in seconds
_MARK = ".autohdr-demo"


@dataclass(frozen=True)
class DemoResult:
    """Where a demo ended: its report, the enhanced photos, and PSNR of the model above gain and gamma's in dB."""

    report: Path
    enhanced: Path
    margin: float


def demo(out: Path) -> DemoResult:
    """Enhances the sample photos with the shipped model, beside the edits that were synthesised with them, in the folder `out`.

    A folder that an earlier demo made is made anew; UserError if `out` holds anything else.
    """
    _claim(out)
    pairs, model = read_pairs(SAMPLES), load_checkpoint(SHIPPED)
    enhanced = enhance([pair.src for pair in pairs], out / "enhanced", model)
    results = evaluate(pairs, out / "report", model=model, size=SHOWN, checkpoint=SHIPPED)
    print(format_table(results))
    print(f"\nreport:            {out / 'report' / 'report.html'}")
    speed = f"{enhanced.seconds / enhanced.megapixels:.2f} s a megapixel"
    print(f"enhanced photos:   {out / 'enhanced'} ({len(enhanced.written)}, {speed})")
    print("your own:          autohdr enhance PHOTO_OR_FOLDER --out FOLDER")
    return _result(out, results)


def demo_train(
    out: Path,
    *,
    config: TrainConfig | None = None,
    scenes: int = SCENES,
    held_out: int = HELD_OUT,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> DemoResult:
    """Synthesise rooms, train on them, evaluate on rooms held out and enhance those; all in the folder `out`.

    config: how to train; the recipe `demo` by default. Its pairs and its run folder are set here.
    A folder that an earlier demo made is made anew; UserError if `out` holds anything else.
    """
    _claim(out)
    config = config or load_config("demo")
    started = time.perf_counter()

    def step(number: int, text: str) -> None:
        print(f"\n[{number}/4] {text}  ({time.perf_counter() - started:.0f} s)", flush=True)

    step(1, f"rendering {scenes} rooms, {held_out} of them held out")
    pairs, parts = synthesize(out / "rooms", scenes, height, width), out / "parts"
    write_splits(read_pairs(pairs), parts, test=held_out)

    step(2, f"training {config.model}")
    config = replace(config, train_pairs=parts / "train.jsonl", val_pairs=parts / "val.jsonl", out=out / "run")
    if train(config).interrupted:
        raise KeyboardInterrupt

    step(3, "evaluating on the rooms held out, at full resolution")
    checkpoint = out / "run" / "checkpoint_best.safetensors"
    test, model = read_pairs(parts / "test.jsonl"), load_checkpoint(checkpoint)
    results = evaluate(test, out / "report", model=model, checkpoint=checkpoint)
    print(format_table(results))

    step(4, "enhancing them")
    enhanced = enhance([pair.src for pair in test], out / "enhanced", model)
    result = _result(out, results)
    verdict = "at least" if result.margin >= WANTED_MARGIN else "LESS than"
    print(
        f"\n{result.margin:+.2f} dB PSNR against gain and gamma, {verdict} the {WANTED_MARGIN:+.1f} dB that it should be, "
        f"in {time.perf_counter() - started:.0f} s altogether"
    )
    print(f"report:            {result.report}")
    print(f"enhanced photos:   {result.enhanced} ({len(enhanced.written)})")
    print(f"training curve:    {out / 'run' / 'curve.png'}")
    return result


def _result(out: Path, results: dict[str, Any]) -> DemoResult:
    margin, _ = results["summary"]["model_minus_gain_and_gamma"]["psnr"]
    return DemoResult(out / "report" / "report.html", out / "enhanced", margin)


def _claim(out: Path) -> None:
    """Leave an empty folder that bears the demo's mark."""
    if out.exists() and not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"demo: {out} was not made by a demo: give another folder with --out")
    if (out / _MARK).is_file():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()

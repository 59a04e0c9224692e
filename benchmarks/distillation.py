"""What a teacher is worth: a small student of the demo's rooms, trained with and without one, by the same seeds and steps.

    python benchmarks/distillation.py --out distillation.json [--demo demo_train_run] [--model nafnet_nano]
        [--model-args '{"width": 8}'] [--epochs 10] [--teacher-weight 0.5] [--seeds 0 1 2 3]

--demo is the folder of `autohdr demo --train`, which has the rooms and the teacher; it is made first where it is not there. The
students are trained by the demo's recipe, and measured by their last weights on the rooms held out, at full resolution.

Writes and prints JSON: the mean PSNR in dB over rooms and seeds; `gain`, what the teacher adds to it: the mean of the differences
room by room, each the mean over the seeds, with half the width of its 95% interval; `gains`, the same of each seed; `over_seeds`,
the mean and the interval of these: what another seed may give.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from run import commit, processor

from autohdr import load_checkpoint
from autohdr.data.pairs import Pair, read_pairs
from autohdr.demo import demo_train
from autohdr.evaluate import evaluate
from autohdr.files import finite
from autohdr.metrics import mean_interval
from autohdr.train.config import TrainConfig, load_config
from autohdr.train.loop import train

STUDENT = {"width": 8}


def psnrs(model: torch.nn.Module, pairs: Sequence[Pair]) -> list[float]:
    with TemporaryDirectory() as folder:
        return [image["figures"]["model"]["psnr"] for image in evaluate(pairs, folder, model=model)["images"]]


def trained(config: TrainConfig, pairs: Sequence[Pair]) -> list[float]:
    """The PSNR of each pair, of the student that this run trains."""
    with TemporaryDirectory() as folder:
        if stopped := train(replace(config, out=Path(folder) / "run")).interrupted:
            raise SystemExit(128 + stopped)
        return psnrs(load_checkpoint(Path(folder) / "run" / "checkpoint_last.safetensors"), pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--demo", type=Path, default=Path("demo_train_run"))
    parser.add_argument("--model", default="nafnet_nano")
    parser.add_argument("--model-args", type=json.loads, default=STUDENT)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-weight", type=float, default=0.5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    options = parser.parse_args()
    teacher, parts = options.demo / "run" / "checkpoint_best.safetensors", options.demo / "parts"
    if not teacher.exists():
        demo_train(options.demo)
    pairs = read_pairs(parts / "test.jsonl")
    config = replace(load_config("demo"), train_pairs=parts / "train.jsonl", val_pairs=parts / "val.jsonl")
    config = replace(config, model=options.model, model_args=options.model_args, epochs=options.epochs)
    alone, taught = [], []  # a list for each seed, of a figure for each room
    for seed in options.seeds:
        alone.append(trained(replace(config, seed=seed), pairs))
        taught.append(trained(replace(config, seed=seed, teacher=teacher, teacher_weight=options.teacher_weight), pairs))
    gains = [[b - a for a, b in zip(*of_seed, strict=True)] for of_seed in zip(alone, taught, strict=True)]
    found = {
        "processor": processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "student": {"model": options.model, "model_args": options.model_args},
        "epochs": options.epochs,
        "teacher_weight": options.teacher_weight,
        "seeds": options.seeds,
        "rooms": len(pairs),
        "teacher_psnr": fmean(psnrs(load_checkpoint(teacher), pairs)),
        "psnr": {"alone": fmean(map(fmean, alone)), "taught": fmean(map(fmean, taught))},
        "gain": mean_interval([fmean(room) for room in zip(*gains, strict=True)]),
        "gains": [mean_interval(of_seed) for of_seed in gains],
        "over_seeds": mean_interval([fmean(of_seed) for of_seed in gains]),
    }
    text = json.dumps(finite(found), indent=1)
    options.out.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()

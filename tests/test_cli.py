import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import autohdr
from autohdr.cli import main
from autohdr.data.pairs import read_pairs
from autohdr.edits import SHIPPED
from autohdr.enhance import enhancer, networks
from autohdr.models import create_model, save_weights

WHITE, WIDE = [0.3127, 0.329, 1.0], [0.68, 0.32, 1.0, 0.265, 0.69, 1.0, 0.15, 0.06, 1.0]
TINY = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0}
VERBS = ["doctor", "data", "data split", "data audit", "data synth", "data degrade"]
VERBS += ["train", "watch", "adapt", "eval", "compare", "enhance", "export", "quantize", "plan", "demo"]


@pytest.fixture
def photos(tmp_path):
    """Seven pairs of 40 x 32 photos and their list."""
    rng = np.random.default_rng(0)
    for index in range(7):
        pixels = rng.integers(0, 128, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}_src.png")
        Image.fromarray(2 * pixels).save(tmp_path / f"{index}_tar.png")
    lines = [json.dumps({"src": f"{index}_src.png", "tar": f"{index}_tar.png"}) + "\n" for index in range(7)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "weights.safetensors", create_model("restormer_nano", **TINY), {"epoch": 1})
    return tmp_path / "weights.safetensors"


def run(*args):
    return main([str(arg) for arg in args])


def refusal(capsys, *args):
    """What a refused call says on stderr, after `error: `."""
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err.removeprefix("error: ")


def usage_error(capsys, *args):
    """What the parser says about options it can't take."""
    with pytest.raises(SystemExit) as exit_:
        run(*args)
    assert exit_.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"autohdr {autohdr.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help(capsys, verb):
    with pytest.raises(SystemExit) as exit_:
        run(*verb.split(), "-h")
    assert exit_.value.code == 0
    assert f"usage: autohdr {verb}" in capsys.readouterr().out


def test_help_lists_the_verbs(capsys):
    with pytest.raises(SystemExit):
        run("-h")
    output = capsys.readouterr().out
    assert all(f"• {verb.split()[0]} " in output for verb in VERBS)


def test_help_of_a_recipe_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        run("train", "restormer_896", "-h")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: 896)" in text and "(default: 5e-05)" in text


def test_doctor(capsys):
    assert run("doctor") == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output and "mdta" in output and "gdfn" in output


def test_data_split(photos, capsys):
    assert run("data", "split", photos / "pairs.jsonl", "--out", photos / "parts", "--test", 2) == 0
    said = capsys.readouterr()
    assert said.out.count("pairs\n") == 3
    warned = [line.split(": ")[1] for line in said.err.splitlines()]  # not of few pairs to train on
    assert warned == [str(photos / "parts" / name) for name in ("test.jsonl", "val.jsonl")]
    assert sorted(path.name for path in (photos / "parts").iterdir()) == ["test.jsonl", "train.jsonl", "val.jsonl"]


def test_data_split_into_folds(photos):
    assert run("data", "split", photos / "pairs.jsonl", "--out", photos / "parts", "--test", 1, "--folds", 3) == 0
    assert (photos / "parts" / "fold_2" / "val.jsonl").is_file()


def test_names_that_are_not_utf8(photos, checkpoint, capsys):
    """From the list of pairs to the report, and into what is printed: the terminal here takes UTF-8 alone."""
    odd = os.fsdecode(b"caf\xe9 \xff")
    for name in ("src", "tar"):
        os.replace(photos / f"0_{name}.png", photos / f"{odd}_{name}.png")
    (photos / "copy.png").write_bytes((photos / f"{odd}_src.png").read_bytes())
    listed = [{"src": f"{odd}_src.png", "tar": f"{odd}_tar.png"}, {"src": "copy.png", "tar": "1_tar.png"}]
    listed += [{"src": f"{index}_src.png", "tar": f"{index}_tar.png"} for index in range(2, 6)]
    (photos / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in listed))
    assert run("data", "audit", photos / "pairs.jsonl", "--out", photos / "groups.json") == 0
    assert r"caf\udce9 \udcff_src.png ~ " in capsys.readouterr().out
    (group,) = json.loads((photos / "groups.json").read_text("utf-8"))["groups"]
    assert group["pairs"][0]["src"] == str(photos / f"{odd}_src.png")

    assert run("data", "split", photos / "pairs.jsonl", "--out", photos / odd, "--test", 0) == 0
    train, val = read_pairs(photos / odd / "train.jsonl"), read_pairs(photos / odd / "val.jsonl")
    assert (photos / f"{odd}_src.png").resolve() in {pair.src.resolve() for pair in train + val}
    given = ("--checkpoint", checkpoint, "--pairs", photos / odd / "train.jsonl", "--out", photos / odd / "report")
    assert run("eval", *given, "--device", "cpu") == 0
    assert r"caf\udce9 \udcff/report/report.html" in capsys.readouterr().out
    capsys.readouterr()
    assert run("enhance", photos / f"{odd}_src.png", "--auto-tone", "--out", photos / odd / "enhanced", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifest"] == str(photos / odd / "enhanced" / "autohdr.jsonl")
    assert (photos / odd / "enhanced" / f"{odd}_src.png").is_file()


def test_data_synth(tmp_path, capsys):
    args = ("--count", 1, "--height", 32, "--width", 48, "--workers", 1, "--exteriors", 1)
    assert run("data", "synth", "--out", tmp_path / "rooms", *args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "rooms" / "pairs.jsonl")


def test_data_degrade(tmp_path, capsys):
    """A photo that is none is skipped and named, and the status says so; no folder, or none with photos, is refused."""
    finals = tmp_path / "finals"
    (finals / "house").mkdir(parents=True)
    Image.new("RGB", (48, 40), (200, 190, 180)).save(finals / "house" / "kitchen.png")
    assert run("data", "degrade", finals, "--out", tmp_path / "pairs", "--workers", 1) == 0
    assert "1 pairs, 0 photos skipped" in capsys.readouterr().out
    assert [pair.src.name for pair in read_pairs(tmp_path / "pairs" / "pairs.jsonl")] == ["0000_kitchen_src.jpg"]
    (finals / "bath.jpg").write_text("no photo")
    assert run("data", "degrade", finals, "--out", tmp_path / "pairs", "--workers", 1) == 1
    assert "bath.jpg" in capsys.readouterr().err
    assert "expected a folder of finished photos" in refusal(capsys, "data", "degrade", tmp_path / "no", "--out", tmp_path / "x")


def test_train_eval_enhance(photos, capsys):
    """The whole road, with options over the recipe's values."""
    assert run("data", "split", photos / "pairs.jsonl", "--out", photos, "--test", 2) == 0
    pairs, out = photos / "test.jsonl", photos / "run"
    settings = (
        "--train-pairs",
        photos / "train.jsonl",
        "--val-pairs",
        photos / "val.jsonl",
        "--size",
        32,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
    )
    settings += ("--model", "restormer_nano", "--model-args", json.dumps(TINY), "--workers", 0, "--out", out)
    assert run("train", "restormer_384", *settings, "--lr", 0.001, "--no-augment", "--device", "cpu") == 0
    assert "checkpoint_best.safetensors" in capsys.readouterr().out
    resolved = (out / "config.toml").read_text()
    assert "lr = 0.001\n" in resolved and "accumulate = 2\n" in resolved and "augment = false\n" in resolved
    assert run("train", out / "config.toml", "--resume") == 0

    weights = out / "checkpoint_best.safetensors"
    sized = ("--resize", "squash", "--size", 24)
    assert run("eval", "--checkpoint", weights, "--pairs", pairs, "--out", photos / "report", *sized) == 0
    assert "auto-tone" in capsys.readouterr().out
    assert json.loads((photos / "report" / "results.json").read_text())["images"][0]["height"] == 24
    assert (photos / "report" / "report.html").is_file()

    assert run("enhance", photos / "0_src.png", "--checkpoint", weights, "--out", photos / "enhanced") == 0
    assert Image.open(photos / "enhanced" / "0_src.png").size == (40, 32)


@pytest.mark.parametrize(
    ("given", "resume"), [((), False), (("--resume",), True), (("--resume", "auto"), "auto"), (("--resume", "--lr", 3), True)]
)
def test_train_resume(monkeypatch, given, resume):
    from autohdr.train import loop

    seen = []
    monkeypatch.setattr(loop, "train", lambda config, resume: seen.append(resume) or loop.RunSummary(config.out, 0, {}, 15))
    assert run("train", "demo", *given) == 143 and seen == [resume]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_interrupted(photos, capsys, monkeypatch, number, status):
    from autohdr.train import loop

    summary = loop.RunSummary(photos / "run", 3, {}, interrupted=number)
    monkeypatch.setattr(loop, "train", lambda config, resume: summary)
    assert run("train", "demo") == status
    assert f"autohdr train {photos / 'run' / 'config.toml'} --resume" in capsys.readouterr().out


def test_train_dry_run_writes_nothing(photos, capsys):
    """What a real run would take, and a real run's refusals."""
    pairs, out = photos / "pairs.jsonl", photos / "run"
    (photos / "val").mkdir()
    for name in ("src", "tar"):
        Image.new("RGB", (40, 32)).save(photos / "val" / f"{name}.png")
    (photos / "val" / "pairs.jsonl").write_text('{"src": "src.png", "tar": "tar.png"}\n')
    before = sorted(photos.rglob("*"))
    given = ["train", "demo", "--train-pairs", pairs, "--val-pairs", photos / "val" / "pairs.jsonl", "--out", out, "--size", 32]
    assert run(*given, "--model-args", json.dumps(TINY), "--dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"memory +[\d.]+ [GM]B at most in a process \(\w+\), [\d.]+ [GM]B still free\n", said)
    assert re.search(r"planned +\d+ MB \(.*AdamW", said)
    assert re.search(r"an epoch +[\d.]+ (s|min): 4 steps, 1 validations of", said) and said.endswith("nothing was written\n")
    assert sorted(photos.rglob("*")) == before
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "already holds files" in refusal(capsys, *given, "--dry-run")


def test_train_print_config_can_be_read_back(photos, capsys):
    from autohdr.train.config import load_config

    assert run("train", "restormer_384", "--lr", 3, "--out", photos / "run", "--print-config") == 0
    (photos / "printed.toml").write_text(capsys.readouterr().out)
    assert load_config(photos / "printed.toml") == load_config("restormer_384", {"lr": 3.0, "out": photos / "run"})
    assert not (photos / "run").exists()


def test_train_stopped_by_an_error(capsys, monkeypatch):
    from autohdr.train import loop
    from autohdr.train.guards import TrainingError

    def train(config, resume):
        raise TrainingError("step 3: the loss is not finite")

    monkeypatch.setattr(loop, "train", train)
    assert run("train", "demo") == 1
    assert capsys.readouterr().err == "error: step 3: the loss is not finite\n"


def test_enhance_auto_tone(photos):
    assert run("enhance", photos / "0_src.png", "--auto-tone", "--out", photos / "enhanced") == 0
    assert np.asarray(Image.open(photos / "enhanced" / "0_src.png")).mean() > 100


def test_enhance_with_the_model_that_ships(photos, capsysbinary, monkeypatch):
    """A folder of photos, and one photo through standard input and output; that noise is like no photo is said."""
    assert run("enhance", photos / "0_src.png", "--out", photos / "enhanced") == 0
    written = (photos / "enhanced" / "0_src.png").read_bytes()
    assert f"{photos / '0_src.png'}: its colours are ".encode() in capsysbinary.readouterr().err
    for sent, status, received in (((photos / "0_src.png").read_bytes(), 0, written), (b"no picture", 1, b"")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(sent)))
        assert run("enhance", "-") == status
        captured = capsysbinary.readouterr()
        said = b"failed standard input: " if status else b"standard input: its colours are "
        assert captured.out == received and captured.err.startswith(said)


def test_enhance_needs_no_pytorch_but_for_a_network(photos, tmp_path):
    """Which takes longer to start than many photos take: the shipped model and the auto-tone go without, whatever the option."""
    (photos / "in").mkdir()
    profile = {"sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    profile["wide"] = imagecodecs.cms_profile("rgb", whitepoint=WHITE, primaries=WIDE, gamma=2.2)
    for name, icc in profile.items():
        Image.open(photos / "0_src.png").convert("RGB").save(photos / "in" / f"{name}.jpg", icc_profile=icc)
    imagecodecs.imwrite(photos / "in" / "sixteen.png", np.full((9, 8, 3), 9000, np.uint16))
    code = """
import sys
from autohdr.cli import main
folder, out = sys.argv[1:]
for number, options in enumerate(([], ["--auto-tone"], ["--property", "--save-edit", "--keep-white-balance"],
                                  ["--strength", "0.5", "--depth", "16", "--format", "tiff", "--device", "cpu"])):
    assert main(["enhance", folder, "--out", f"{out}/{number}", *options]) == 0
    assert "torch" not in sys.modules, options
assert main(["enhance", "-"]) == 0 and "torch" not in sys.modules
"""
    given = (photos / "0_src.png").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, photos / "in", tmp_path], input=given, capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode()
    made = (photos / "0" / "sRGB.jpg").read_bytes()
    assert run("enhance", photos / "in", "--checkpoint", SHIPPED, "--out", tmp_path / "0", "--on-exists", "error") == 0
    assert (photos / "0" / "sRGB.jpg").read_bytes() == made  # the network knows what its twin for arrays did


def test_enhance_verbose_prints_the_plan_of_what_needs_one(photos, checkpoint, caplog, monkeypatch):
    # Under pytest the root logger has handlers already, and basicConfig would leave it as it is.
    monkeypatch.setattr(logging, "basicConfig", lambda level, format: caplog.set_level(level))
    args = ("enhance", photos / "0_src.png", "--checkpoint", checkpoint, "-v", "--max-memory")
    assert run(*args, "64GB", "--out", photos / "whole") == 0 and "strips" not in caplog.text
    monkeypatch.setattr(networks.Networks, "_fits", lambda *arguments: False)
    assert run(*args, "64GB", "--out", photos / "strips") == 0
    assert re.search(r"40×32: strips of 32 rows, expected peak \d+", caplog.text)
    assert run(*args, "1MB", "--out", photos / "none") == 1


def test_enhance_says_what_became_of_the_photos(photos, capsys):
    """In four counts, whose exit status is 1 where a photo failed, 3 where some were skipped, else 0, and as JSON."""
    (photos / "in").mkdir()
    for name in ("0_src.png", "1_src.png"):
        (photos / name).rename(photos / "in" / name)
    args = ("enhance", photos / "in", "--auto-tone", "--out", photos / "enhanced")
    (photos / "in" / "bad.png").write_bytes(b"no picture")
    (photos / "in" / "c.psd").write_bytes(b"no picture")
    assert run(*args) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{photos / 'enhanced'}: 0 done before, 2 written, 1 skipped, 1 failed, ")
    assert f"failed {photos / 'in' / 'bad.png'}: " in captured.err and f"skipped {photos / 'in' / 'c.psd'}: " in captured.err
    (photos / "in" / "bad.png").unlink()
    assert run(*args, "--json") == 3
    said = json.loads(capsys.readouterr().out)
    assert said["counts"] == {"done_before": 2, "written": 0, "skipped": 1, "failed": 0} and said["failed"] == []
    assert [entry["source"] for entry in said["skipped"]] == [str(photos / "in" / "c.psd")]
    assert said["manifest"] == str(photos / "enhanced" / "autohdr.jsonl")
    (photos / "in" / "c.psd").unlink()
    assert run(*args) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_enhance_interrupted(photos, capsys, monkeypatch, number, status):
    """What was done is counted; the same call does the rest."""
    args = ("enhance", photos / "0_src.png", photos / "1_src.png", "--auto-tone", "--out", photos / "enhanced")
    recipe, calls = enhancer.pinning, []

    def stop(pixels):
        calls.append(pixels)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return recipe(pixels)

    monkeypatch.setattr(enhancer, "pinning", stop)
    assert run(*args) == status
    captured = capsys.readouterr()
    assert "0 done before, 1 written, 0 skipped, 0 failed" in captured.out and "Traceback" not in captured.err
    assert run(*args) == 0 and "1 done before, 1 written" in capsys.readouterr().out


def test_enhance_quality_and_damaged(photos, tmp_path, capsys):
    whole, cut = photos / "whole.jpg", photos / "cut.jpg"
    Image.open(photos / "0_src.png").convert("RGB").save(whole, quality=95)
    cut.write_bytes(whole.read_bytes()[:-200])
    sizes = []
    for quality in (30, 98):
        assert run("enhance", whole, "--auto-tone", "--quality", quality, "--out", tmp_path / str(quality)) == 0
        sizes.append((tmp_path / str(quality) / "whole.jpg").stat().st_size)
    assert sizes[0] < sizes[1]
    assert run("enhance", cut, "--auto-tone", "--out", tmp_path / "out") == 1
    assert f"failed {cut}: the JPEG is damaged: it is truncated" in capsys.readouterr().err
    assert run("enhance", cut, "--auto-tone", "--damaged", "keep", "--out", tmp_path / "out") == 0
    assert f"{cut}: " in capsys.readouterr().err and (tmp_path / "out" / "cut.jpg").is_file()


def test_enhance_where_a_result_exists(photos, capsys):
    (photos / "enhanced").mkdir()
    (photos / "enhanced" / "0_src.png").write_text("precious")
    args = ("enhance", photos / "0_src.png", "--auto-tone", "--out", photos / "enhanced", "--on-exists")
    assert [run(*args, policy) for policy in ("skip", "error", "rename", "overwrite", "error")] == [3, 2, 0, 0, 0]
    assert "--on-exists" in usage_error(capsys, *args, "ask")


def test_enhance_brackets(photos, capsys):
    """Photos without EXIF are single ones, and a line says so."""
    folder = photos / "enhanced"
    assert run("enhance", photos / "0_src.png", "--auto-tone", "--out", folder, "--brackets", "auto") == 0
    assert "0_src.png: its EXIF does not say when and how it was exposed" in capsys.readouterr().err
    assert (folder / "0_src.png").exists()


def test_enhance_a_property_with_its_white_balance(photos):
    assert (
        run("enhance", photos / "0_src.png", photos / "1_src.png", "--out", photos / "a", "--property", "--keep-white-balance")
        == 0
    )
    options = [json.loads(line)["options"] for line in (photos / "a/autohdr.jsonl").read_text().splitlines()]
    assert all(each["keep_white_balance"] for each in options) and len({each["property"] for each in options}) == 1


def test_enhance_a_shard(photos, capsys):
    args = ("enhance", photos / "0_src.png", photos / "1_src.png", "--auto-tone", "--out", photos / "enhanced", "--shard")
    assert run(*args, "2/2") == 0 and "1 written" in capsys.readouterr().out
    assert sorted(os.listdir(photos / "enhanced")) == ["1_src.png", "autohdr.2-of-2.jsonl"]
    for shard, said in (("3/2", "shard must be from 1/N to N/N, got 3/2"), ("0/2", "got 0/2"), ("2", "expected I/N")):
        assert said in refusal(capsys, *args, shard)


def test_enhance_into_another_format(photos, tmp_path, capsys):
    photo = photos / "0_src.png"
    options = ("--format", "jpeg", "--depth", "8", "--subsampling", "420", "--strip", "gps")
    assert run("enhance", photo, "--auto-tone", *options, "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "0_src.jpg") as image:
        assert image.format == "JPEG" and image.layer[0][1:3] == (2, 2)
    assert run("enhance", photo, "--auto-tone", "--format", "jpeg", "--depth", "16", "--out", tmp_path / "out") == 2
    assert "a JPEG holds 8 bits a channel, not 16" in capsys.readouterr().err


def test_demo_fails_where_gain_and_gamma_is_nearly_as_good(monkeypatch, tmp_path):
    from autohdr import demo

    for margin, status in ((0.5, 0), (0.4, 1), (-0.1, 1), (math.nan, 1)):
        result = demo.DemoResult(tmp_path, tmp_path, margin)
        monkeypatch.setattr(demo, "demo_train", lambda out, result=result: result)
        assert run("demo", "--train", "--out", tmp_path) == status


def test_ctrl_c(monkeypatch, tmp_path):
    from autohdr import demo

    def interrupted(out):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupted)
    assert run("demo") == 130


def test_a_folder_that_cannot_be_made(photos, capsys):
    out = photos / "0_src.png" / "parts"
    assert run("demo", "--out", out) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("call", [("train", "demo", "--lrr", 3), ("data", "split", "pairs.jsonl", "--out", "x", "--tset", 3)])
def test_an_unknown_option_points_to_its_verbs_help(capsys, call):
    verb = " ".join(call[: 1 + (call[0] == "data")])
    assert f"autohdr {verb} --help" in usage_error(capsys, *call).partition("For full helptext, run")[2]


def test_refuses_no_verb_and_unknown_verbs_and_options(capsys):
    assert "doctor" in usage_error(capsys)
    assert "paint" in usage_error(capsys, "paint")
    assert "--fast" in usage_error(capsys, "demo", "--fast")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("train",), "CONFIG"),
        (("train", "demo", "--epochs", "many"), "--epochs"),
        (("train", "demo", "--resize", "stretch"), "squash"),
        (("train", "demo", "--model-args", "[1]"), "expected a JSON object"),
        (("train", "demo", "--model-args", "{dim"), "expected a JSON object"),
        (("train", "demo", "--resume", "run"), "expected --resume or --resume auto, got run"),
        (("data", "split", "pairs.jsonl"), "--out"),
        (("data", "synth"), "--out"),
        (("data", "degrade", "finals"), "--out"),
    ],
    ids=" ".join,
)
def test_refuses_options(capsys, args, named):
    assert named in usage_error(capsys, *args)


def test_train_refuses(photos, capsys):
    assert "expected a TOML file or one of demo, " in refusal(capsys, "train", "nowhere.toml")
    assert "CONFIG comes first" in refusal(capsys, "train", "--epochs", 3, "demo")
    assert "train_pairs: required; give --train-pairs" in refusal(capsys, "train", "restormer_384")
    pairs = ("--train-pairs", photos / "pairs.jsonl", "--val-pairs", photos / "pairs.jsonl")
    assert "is also in" in refusal(capsys, "train", "demo", *pairs, "--out", photos / "run")
    run("data", "split", photos / "pairs.jsonl", "--out", photos)
    capsys.readouterr()
    pairs = ("--train-pairs", photos / "train.jsonl", "--val-pairs", photos / "val.jsonl")
    assert "no model is called 'resnet'" in refusal(capsys, "train", "demo", *pairs, "--model", "resnet", "--out", photos / "run")
    assert "--resume: nothing to resume" in refusal(capsys, "train", "demo", *pairs, "--resume", "--out", photos / "run")
    assert "already holds files" in refusal(capsys, "train", "demo", *pairs, "--out", photos)
    assert not (photos / "run").exists()


def test_data_refuses(photos, capsys):
    assert "nowhere.jsonl" in refusal(capsys, "data", "split", photos / "nowhere.jsonl", "--out", photos / "parts")
    (photos / "pairs.jsonl").rename(photos / "train.jsonl")
    assert "would replace the list" in refusal(capsys, "data", "split", photos / "train.jsonl", "--out", photos)
    (photos / "train.jsonl").rename(photos / "pairs.jsonl")
    few = ("data", "split", photos / "pairs.jsonl", "--out", photos / "parts")
    assert "got 7" in refusal(capsys, *few, "--test", 7)
    assert "got 9" in refusal(capsys, *few, "--test", 0, "--folds", 9)
    assert "count" in refusal(capsys, "data", "synth", "--out", photos / "rooms", "--count", 0)


def test_several_checkpoints_and_views_work_together(photos, checkpoint, capsys):
    second = photos / "second.safetensors"
    save_weights(second, create_model("restormer_nano", **TINY), {"epoch": 1})
    together = ("--checkpoint", checkpoint, "--checkpoint", second, "--flips", 2)
    assert run("eval", *together, "--pairs", photos / "pairs.jsonl", "--out", photos / "report") == 0
    results = json.loads((photos / "report" / "results.json").read_text())
    assert results["model"]["name"] == "mean of restormer_nano, restormer_nano, 2 views"
    assert results["settings"]["checkpoint"] == f"{checkpoint}, {second}"
    assert run("enhance", photos / "0_src.png", *together, "--out", photos / "enhanced") == 0
    assert (photos / "enhanced" / "0_src.png").is_file()
    capsys.readouterr()
    fast = ("eval", "--checkpoint", checkpoint, "--fast", "--pairs", photos / "pairs.jsonl", "--out", photos / "fast")
    assert run(*fast) == 0
    results, said = json.loads((photos / "fast" / "results.json").read_text()), capsys.readouterr().out
    assert results["model"]["name"] == "restormer_nano, at a third"
    figures = results["images"][0]["figures"]
    assert results["summary"]["whole"].keys() == figures["whole"].keys() and "the same, in full" in said
    assert "model − the same, in full" in said
    assert "model_minus_whole" in results["summary"]
    assert run("enhance", photos / "0_src.png", "--checkpoint", checkpoint, "--fast", "--out", photos / "fast") == 0
    assert "too small for fast: it was edited whole" in capsys.readouterr().err
    assert "lite sees no more than a thumbnail" in refusal(
        capsys, "enhance", photos / "0_src.png", "--fast", "--out", photos / "x"
    )
    souped = (*together, "--average", "weights", "--pairs", photos / "pairs.jsonl", "--out", photos / "souped")
    assert "checkpoints of one run" in refusal(capsys, "eval", *souped)


def test_what_is_cheaper_may_lose_so_much_and_no_more(photos, checkpoint, capsys):
    """Both ways from what it really loses on these pairs, against the same model in float32."""
    measure = ("eval", "--checkpoint", checkpoint, "--pairs", photos / "pairs.jsonl", "--precision", "bfloat16")
    assert run(*measure, "--out", photos / "half") == 0
    summary = json.loads((photos / "half" / "results.json").read_text())["summary"]
    assert run("eval", *measure[1:5], "--out", photos / "full") == 0
    full = json.loads((photos / "full" / "results.json").read_text())["summary"]
    assert summary["whole"] == full["model"] and summary["model"] != full["model"]
    loss, half = -summary["model_minus_whole"]["psnr"][0], summary["model_minus_whole"]["psnr"][1]
    capsys.readouterr()
    assert run(*measure, "--out", photos / "half", "--max-loss", loss + 1e-9) == 0
    said = capsys.readouterr()
    assert f"--precision bfloat16 loses {loss:.3f} ± {half:.3f} dB PSNR; --max-loss allows" in said.out and not said.err
    assert run(*measure, "--out", photos / "half", "--max-loss", loss - 1e-9) == 1
    said = capsys.readouterr()
    assert f"error: --precision bfloat16 loses {loss:.3f} ± {half:.3f} dB PSNR" in said.err and "report: " in said.out
    assert "expected --fast or --precision bfloat16 or float16, whose loss it limits" in refusal(
        capsys, *measure[:5], "--max-loss", 1, "--out", photos / "x"
    )


def test_eval_refuses(photos, checkpoint, capsys):
    pairs = ("--pairs", photos / "pairs.jsonl", "--out", photos / "report")
    assert "nowhere" in refusal(capsys, "eval", "--checkpoint", photos / "nowhere.safetensors", *pairs)
    assert "is no checkpoint" in refusal(capsys, "eval", "--checkpoint", photos / "pairs.jsonl", *pairs)
    (photos / "3_tar.png").unlink()
    assert "pairs.jsonl:4: " in refusal(capsys, "eval", "--checkpoint", checkpoint, *pairs)
    assert "device: 'tpu'" in refusal(capsys, "eval", "--checkpoint", checkpoint, *pairs, "--device", "tpu")
    assert not (photos / "report").exists()


def test_enhance_refuses(photos, checkpoint, capsys):
    out = ("--out", photos / "enhanced")
    for arguments in ((photos / "0_src.png",), ("-", *out), ("-", photos / "0_src.png"), ("-", "--brackets", "auto")):
        assert "photos and --out FOLDER, or - alone" in refusal(capsys, "enhance", *arguments)
    both = ("--auto-tone", "--checkpoint", checkpoint)
    said = refusal(capsys, "enhance", photos / "0_src.png", *out, *both)
    assert "expected --auto-tone, or a model with --checkpoint, --flips, --fast and --sharpen" in said
    assert "does not exist" in refusal(capsys, "enhance", photos / "nowhere.png", "--auto-tone", *out)
    assert "expected photos" in refusal(capsys, "enhance", "--auto-tone", *out)
    with_limit = ("--checkpoint", checkpoint, "--max-memory", "much")
    assert "such as 3GB or 512MiB, got 'much'" in refusal(capsys, "enhance", photos / "0_src.png", *with_limit, *out)
    assert not (photos / "enhanced").exists()


def test_demo_refuses_a_folder_of_others(photos, capsys):
    before = sorted(os.listdir(photos))
    assert "was not made by a demo" in refusal(capsys, "demo", "--out", photos)
    assert sorted(os.listdir(photos)) == before


def test_plan_prints_a_table(capsys):
    assert run("plan", "restormer_nano", "--size", "70x50", "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert output.startswith("restormer_nano, 1 × 70×50 pixels, cpu\n")
    for mode, part in (("inference", "feature maps"), ("training", "(saved for backward|working set) .*, AdamW 4 MB")):
        for precision in ("float32", "bfloat16"):
            assert re.search(rf"^{mode} +{precision} +[\d.e-]+ to [\d.e-]+ s +\d+ MB  parameters 2 MB, {part}", output, re.M)
    assert run("plan", "restormer_nano", "--size", "64", "--max-memory", "9GB", "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "training" not in output and "maps and strips" in output


@pytest.mark.parametrize("size", ["", "x", "1x2x3", "-5", "a", "10x"])
def test_plan_refuses_sizes(capsys, size):
    assert "expected a side or WIDTHxHEIGHT" in refusal(capsys, "plan", "restormer_nano", f"--size={size}")

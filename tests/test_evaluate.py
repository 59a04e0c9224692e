import hashlib
import json
import math
import os
import re
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from autohdr.autotone import auto_tone, gain_and_gamma
from autohdr.data.images import read_rgb
from autohdr.data.pairs import Pair
from autohdr.errors import UserError
from autohdr.evaluate import count_macs, evaluate, summarise
from autohdr.metrics import METRICS
from autohdr.report import format_table, tables


class Brighten(nn.Module):
    """3 -> 3 channels, 3×3: 81 weights, 3 biases, 81 multiply-accumulates per pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.constant_(self.conv.bias, 0.2)

    def forward(self, x):
        return self.conv(x)


class Broken(nn.Module):
    def forward(self, x):
        return x.masked_fill(x > 0.3, math.nan)


@pytest.fixture
def pairs(tmp_path):
    """Three pairs of different sizes and shapes."""
    rng = np.random.default_rng(0)
    made = []
    for line, (name, height, width) in enumerate([("a", 24, 40), ("b", 33, 17), ("c", 16, 16)], 1):
        smooth = np.array(Image.fromarray(rng.integers(0, 120, (4, 4, 3), dtype=np.uint8)).resize((width, height)))
        pair = Pair(tmp_path / f"{name}_src.png", tmp_path / f"{name}_tar.png", line)
        Image.fromarray(smooth).save(pair.src)
        Image.fromarray(smooth * 2 + 10).save(pair.tar)
        made.append(pair)
    return made


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def test_figures_equal_recomputed_ones(pairs, tmp_path):
    out = tmp_path / "deep" / "out"
    model = Brighten()
    results = evaluate(pairs, out, model=model)
    stored = json.loads((out / "results.json").read_text("utf-8"))
    assert stored["model"]["parameters"] == 84 and stored["model"]["macs_per_megapixel"] == 81e6
    settings = {"size": None, "resize": None, "device": "cpu", "precision": "float32", "checkpoint": None, "pairs": []}
    settings["lpips"] = []
    assert stored["settings"] == settings
    assert {"autohdr", "torch", "python", "cpu", "threads", "gpu"} <= stored["environment"].keys()
    for pair, image in zip(pairs, stored["images"], strict=True):
        source, target = read_rgb(pair.src), read_rgb(pair.tar)
        with torch.no_grad():
            predicted = model(tensor(source)).clamp(0, 1)
        outputs = {"source": tensor(source), "gain_and_gamma": tensor(gain_and_gamma(source))}
        outputs |= {"auto_tone": tensor(auto_tone(source)), "model": predicted}
        for method, output in outputs.items():
            expected = {name: metric(output, tensor(target)).item() for name, metric in METRICS.items()}
            assert image["figures"][method] == pytest.approx(expected, rel=1e-6), (pair, method)
        assert (image["height"], image["width"]) == target.shape[:2] and image["name"] == pair.src.name
        assert image["seconds"] > 0 and image["peak_bytes"] > 0
    expected = summarise([image["figures"] for image in stored["images"]])
    assert {k: {m: tuple(v) for m, v in row.items()} for k, row in stored["summary"].items()} == expected
    assert results["summary"] == expected
    assert not list(out.glob("*.tmp"))


def test_identity_has_the_sources_figures(pairs, tmp_path):
    for image in evaluate(pairs, tmp_path / "out", model=nn.Identity())["images"]:
        assert image["figures"]["model"] == image["figures"]["source"]


def test_summary_pairs_the_differences():
    def figures(auto, model):
        values = {"source": 1.0, "gain_and_gamma": 2.0, "auto_tone": auto, "model": model}
        return {method: dict.fromkeys(METRICS, value) for method, value in values.items()}

    summary = summarise([figures(10.0, 11.0), figures(20.0, 21.0), figures(30.0, 31.0)])
    assert summary["model_minus_auto_tone"]["psnr"] == (1.0, 0.0) and summary["model_minus_gain_and_gamma"]["psnr"][0] == 19
    assert summary["model"]["psnr"][0] == 21 and summary["model"]["psnr"][1] > 20


def test_a_name_that_is_not_utf8_comes_back_from_results_json(pairs, tmp_path):
    """Python has a lone surrogate for each such byte, which UTF-8 cannot hold."""
    odd = Pair(pairs[0].src.rename(tmp_path / os.fsdecode(b"caf\xe9 \xff.png")), pairs[0].tar)
    evaluate([odd], tmp_path / "out")
    (image,) = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["images"]
    assert image["src"] == str(odd.src) and image["name"] == odd.src.name


def test_table(pairs, tmp_path):
    results = evaluate(pairs, tmp_path / "out", model=Brighten())
    lines = format_table(results).splitlines()
    assert lines[0].startswith("3 pairs, own resolution, float32, ")
    assert lines[3].split() == ["L1", "↓", "PSNR", "dB", "↑", "SSIM", "↑", "ΔE2000", "↓"]
    column = lines[3].index("PSNR")
    for line, method in zip(lines[4:], results["summary"], strict=False):
        mean, half = results["summary"][method]["psnr"]
        assert line[column:].lstrip("+").startswith(f"{mean:.2f} ± {half:.2f}")
    assert re.search(r"^Parameters: +84$", "\n".join(lines), re.M)


def test_the_verdict_is_over_all_metrics():
    differences = {"l1": (-0.01, 0.002), "psnr": (0.4, 0.1), "ssim": (-0.02, 0.01), "delta_e2000": (-0.3, 0.8)}
    results = {"summary": {"model_minus_auto_tone": differences}, "model": {"name": "net"}}
    assert tables.verdict(results) == (
        "Against auto-tone, better: L1 -0.0100 ± 0.0020, PSNR +0.40 ± 0.10 dB; worse: SSIM -0.020 ± 0.010; "
        "these pairs cannot tell: ΔE2000 -0.30 ± 0.80."
    )
    one = {"model_minus_auto_tone": dict.fromkeys(differences, (0.4, math.nan))}
    assert tables.verdict({"summary": one, "model": None}).startswith(
        "Against auto-tone, these pairs cannot tell: L1 +0.4000, PSNR"
    )
    assert not tables.verdict({"summary": {"source": differences}, "model": None})


def test_results_name_weights_pairs_and_date(pairs, tmp_path):
    listed = [replace(pair, file=tmp_path / "test.jsonl") for pair in pairs]
    before = datetime.now().astimezone().replace(microsecond=0)
    results = evaluate(listed, tmp_path / "out", model=Brighten(), checkpoint="net.safetensors")
    assert before <= datetime.fromisoformat(results["date"]) <= datetime.now().astimezone()
    line = f"checkpoint net.safetensors; pairs {tmp_path / 'test.jsonl'}; measured {results['date'][:16].replace('T', ' ')}"
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert format_table(results).splitlines()[1] == line and f"<p>{line}</p>" in page
    assert tables.verdict(results) in page and tables.verdict(results) in format_table(results)


def test_what_happens_once_is_not_timed(pairs, tmp_path):
    model, sides = Brighten(), []
    model.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape[2:])))
    evaluate(pairs, tmp_path, model=model)
    assert sides[-4:] == [(24, 40), (24, 40), (33, 17), (16, 16)]  # the first one twice


def test_memory_that_cannot_be_told(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("autohdr.measure._reset_high_water_mark", lambda: False)
    table = format_table(evaluate(pairs, tmp_path, model=Brighten()))
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))["model"]
    assert stored["memory_source"] == "ru_maxrss" and stored["bytes_per_megapixel"] is None
    assert "not measurable here" in table and "Peak memory (process, at most):" in table


def test_baselines_alone_at_a_given_size(pairs, tmp_path):
    results = evaluate(pairs[:1], tmp_path / "out", size=(16, 32))
    stored = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert stored["model"] is None and stored["summary"].keys() == {"source", "gain_and_gamma", "auto_tone"}
    assert (stored["images"][0]["height"], stored["images"][0]["width"]) == (16, 32)
    assert math.isnan(results["summary"]["source"]["psnr"][1]) and stored["summary"]["source"]["psnr"][1] is None
    table = format_table(results)
    assert "squash to 32×16" in table and "±" not in table and "a single pair has no confidence interval" in table


def test_equal_images_are_valid_json(pairs, tmp_path):
    results = evaluate([Pair(pairs[0].src, pairs[0].src)], tmp_path / "out")
    assert results["images"][0]["figures"]["source"]["psnr"] == math.inf
    stored = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert stored["images"][0]["figures"]["source"]["psnr"] is None


def test_half_precision_differs_from_float32_a_little(pairs, tmp_path):
    full, rough, half = (
        evaluate(pairs, tmp_path, model=Brighten(), precision=precision)["summary"]["model"]["psnr"][0]
        for precision in ("float32", "bfloat16", "float16")
    )
    assert full != rough and full == pytest.approx(rough, abs=0.1) and 0 < abs(half - full) < abs(rough - full)


def trained_on(*photos):
    model = Brighten()
    model.metadata = {"trained_on": sorted(hashlib.sha256(photo.read_bytes()).hexdigest() for photo in photos)}
    return model


def test_pairs_that_were_trained_on_are_refused(pairs, tmp_path):
    copy = Pair(pairs[0].src, tmp_path / "another name.png", 9)  # a copy of a target is what was trained on, too
    copy.tar.write_bytes(pairs[0].tar.read_bytes())
    with pytest.raises(UserError) as caught:
        evaluate([*pairs, copy], tmp_path / "out", model=trained_on(pairs[0].tar, pairs[2].src))
    first, *named = str(caught.value).splitlines()
    assert "trained on 3 of the 4 pairs" in first and "--allow-trained" in first
    assert named == [f"  pair:1: {pairs[0].tar}", f"  pair:3: {pairs[2].src}", f"  pair:9: {copy.tar}"]
    assert not (tmp_path / "out").exists()


def test_pairs_that_were_trained_on_are_marked_where_they_are_allowed(pairs, tmp_path):
    results = evaluate(pairs, tmp_path, model=trained_on(pairs[1].tar), allow_trained=True)
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert stored["model"]["trained_pairs"] == 1 and [i["trained_on"] for i in stored["images"]] == [False, True, False]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "1 of these pairs were TRAINED ON" in format_table(results) and "1 of these pairs were TRAINED ON" in page
    assert page.count("pixels, trained on</p>") == 1


def test_weights_tell_what_they_were_trained_on_or_that_they_cannot(pairs, tmp_path):
    held_out = evaluate(pairs[:2], tmp_path, model=trained_on(pairs[2].src))
    assert held_out["model"]["trained_pairs"] == 0 and "trained on" not in format_table(held_out).lower()
    unknown = evaluate(pairs, tmp_path, model=Brighten())
    assert unknown["model"]["trained_pairs"] is None and unknown["images"][0]["trained_on"] is None
    assert "do not say which photos they were trained on" in format_table(unknown)


def test_macs():
    assert count_macs(Brighten()) == 81
    assert count_macs(nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.Conv2d(8, 3, 1)), side=32) == (24 + 24) / 4


def test_names_tell_folders_apart(pairs, tmp_path):
    moved = []
    for pair, folder in zip(pairs, ("one", "two"), strict=False):
        (tmp_path / folder).mkdir()
        moved.append(Pair(pair.src.rename(tmp_path / folder / "src.png"), pair.tar))
    assert [image["name"] for image in evaluate(moved, tmp_path / "out")["images"]] == ["one/src.png", "two/src.png"]


def test_rejects_a_prediction_that_is_not_finite(pairs, tmp_path):
    said = r"a_src\.png: the network's result is not finite in "
    with pytest.raises(UserError, match=said + "float32$"):
        evaluate(pairs, tmp_path / "out", model=Broken())
    with pytest.raises(UserError, match=said + "float16; its largest number is 65504: take bfloat16 or float32$"):
        evaluate(pairs, tmp_path / "out", model=Broken(), precision="float16")
    assert not list((tmp_path / "out").iterdir())


def test_rejects_bad_calls(pairs, tmp_path):
    with pytest.raises(UserError, match="at least one pair"):
        evaluate([], tmp_path)
    with pytest.raises(UserError, match="precision must be one of float32, bfloat16, float16, got 'half'"):
        evaluate(pairs, tmp_path, precision="half")
    with pytest.raises(UserError, match=r"a_src\.png: expected a prediction \[1, 3, 24, 40\], got \[1, 3, 12, 20\]"):
        evaluate(pairs, tmp_path, model=nn.AvgPool2d(2))

"""A comparison: its figures against those of `eval`, what it refuses, and its page."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from report.test_page import Page

from autohdr import compare as comparison
from autohdr import evaluate as evaluation
from autohdr.cli import main
from autohdr.compare import compare
from autohdr.data.pairs import Pair, PairDataset, write_pairs
from autohdr.errors import UserError
from autohdr.evaluate import evaluate
from autohdr.metrics import METRICS
from autohdr.models import combine, create_model, load_checkpoint, save_weights
from autohdr.models.int8 import quantized
from autohdr.models.weights import SHIPPED
from autohdr.report import format_comparison
from autohdr.score import Points

NANO = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0}
FIXED = ["source", "gain_and_gamma", "auto_tone"]


@pytest.fixture
def pairs(tmp_path):
    """Four pairs of 24 x 32 pixels; the first target is grey, and has no highlights."""
    rng, made = np.random.default_rng(0), []
    for number in range(4):
        pair = Pair(tmp_path / f"{number}_src.png", tmp_path / f"{number}_tar.png", number + 1)
        pixels = np.array(Image.fromarray(rng.integers(0, 120, (4, 4, 3), dtype=np.uint8)).resize((32, 24)))
        Image.fromarray(pixels).save(pair.src)
        target = np.repeat(pixels.mean(2, keepdims=True).astype(np.uint8), 3, 2) if number == 0 else pixels * 2 + 10
        Image.fromarray(target).save(pair.tar)
        made.append(pair)
    return made


def weights(path, seed, **metadata):
    torch.manual_seed(seed)
    path.parent.mkdir(exist_ok=True)
    save_weights(path, create_model("restormer_nano", **NANO), metadata)
    return path


@pytest.fixture
def files(tmp_path):
    return [weights(tmp_path / run / "checkpoint_best.safetensors", seed) for seed, run in enumerate(("one", "two"))]


def test_figures_are_those_of_eval_and_the_score_is_made_of_them(pairs, files, tmp_path):
    points = Points(psnr=(5, 40), ssim=(0, 1), delta_e2000=(50, 0), quality_weight=0.6)
    results = compare(files, pairs, tmp_path / "out", points=points)
    assert (
        list(results["methods"]) == [*FIXED, "one/checkpoint_best", "two/checkpoint_best"]
        and results["first"] == "one/checkpoint_best"
    )
    alone = evaluate(pairs, tmp_path / "alone", model=load_checkpoint(files[1]))
    for mine, its in (*zip(FIXED, FIXED, strict=True), ("two/checkpoint_best", "model")):
        figures = results["methods"][mine]["figures"]
        assert {metric: figures[metric] for metric in alone["summary"][its]} == alone["summary"][its]
    for name, method in results["methods"].items():
        parts = [points.quality(image["figures"][name]) for image in results["images"]]
        assert method["figures"]["quality"][0] == pytest.approx(np.mean(parts)) and 0 < np.mean(parts) < 1
        assert method["score"][0] == pytest.approx(0.6 * np.mean(parts) + 0.4 * method["cost"])
        assert method["score"][1] == pytest.approx(0.6 * method["figures"]["quality"][1])
    model = results["methods"]["two/checkpoint_best"]
    assert (
        model["parameters"] == alone["model"]["parameters"]
        and model["macs_per_megapixel"] == alone["model"]["macs_per_megapixel"]
    )
    assert model["file_bytes"] == files[1].stat().st_size and model["seconds_per_megapixel"] > 0
    assert results["methods"]["source"]["cost"] == 1 and 0 < model["cost"] < 1
    stored = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert stored["settings"]["points"]["psnr"] == [5, 40] and stored["methods"].keys() == results["methods"].keys()


def test_differences_are_from_the_first_photo_by_photo(pairs, files, tmp_path):
    results = compare(files, pairs, tmp_path / "out")
    first, other = "one/checkpoint_best", "two/checkpoint_best"
    psnr = [image["figures"][other]["psnr"] - image["figures"][first]["psnr"] for image in results["images"]]
    assert results["methods"][other]["difference"]["psnr"][0] == pytest.approx(np.mean(psnr))
    assert "difference" not in results["methods"][first]


def test_photos_that_cannot_tell_a_metric_count_for_no_method(pairs, files, tmp_path):
    results = compare(files, pairs, tmp_path / "out")
    assert results["told"]["saturation"] == results["told"]["hue"] == 3 and results["told"]["psnr"] == 4
    shares = [image["figures"]["source"]["saturation"] for image in results["images"]]
    assert math.isnan(shares[0]) and results["methods"]["source"]["figures"]["saturation"][0] == pytest.approx(
        np.mean(shares[1:])
    )
    assert results["told"]["highlights"] < 4
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert "saturation 3, hue 3" in page and ">nan" not in page
    only_grey = compare(files, pairs[:1], tmp_path / "grey")
    assert math.isnan(only_grey["methods"]["source"]["figures"]["hue"][0])
    assert "<td>–</td>" in (tmp_path / "grey" / "compare.html").read_text("utf-8")


def test_the_worst_are_those_that_even_the_best_model_is_far_from(pairs, files, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "SHOWN_WORST", 2)
    results = compare(files, pairs, tmp_path / "out")
    models = ("one/checkpoint_best", "two/checkpoint_best")
    far = {image["name"]: min(image["figures"][model]["delta_e2000"] for model in models) for image in results["images"]}
    assert results["worst"] == sorted(far, key=lambda name: -far[name])[:2]
    assert Page((tmp_path / "out" / "compare.html").read_text("utf-8")).texts["h2"][-2:] == results["worst"]


def test_page_is_whole_and_names_are_text(pairs, tmp_path):
    odd = weights(tmp_path / "<b>&\"'$x.safetensors", 0)
    results = compare([odd], pairs[:2], tmp_path / "out")
    page = Page((tmp_path / "out" / "compare.html").read_text("utf-8"))
    assert page.texts["h1"] == ["<b>&\"'$x (restormer_nano), compared"] and len(page.all("script")) == 1
    assert not any(word in page.text for word in ("http:", "https:", "@import"))
    assert [image["data-show"] for image in page.all("img")] == [*FIXED, "<b>&\"'$x", "target"] * 2
    assert len(page.all("circle")) == len(results["methods"]) == 4
    assert "0.7 × quality + 0.3 × cost" in page.text and "our own choice" in page.text
    for circle in page.all("circle"):
        assert 40 <= float(circle["cx"]) <= 410 and 10 <= float(circle["cy"]) <= 260


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/best.safetensors", "b/best.safetensors", "c.pth"], ["a/best", "b/best", "c.pth"]),
        (["a/x/best.pth", "b/x/best.pth"], ["a/x/best.pth", "b/x/best.pth"]),
        (["best.pth", "best (2).pth", "best.pth", "best.pth"], ["best.pth", "best (2).pth", "best.pth (2)", "best.pth (3)"]),
        (["a/b", "a/b (2)", "a/b"], ["b", "b (2)", "b (3)"]),
        (["a/source.safetensors", "a/auto-tone.safetensors"], ["a/source", "a/auto-tone"]),
    ],
)
def test_files_of_one_name_are_told_apart(paths, names, tmp_path):
    assert comparison._names([tmp_path / path for path in paths]) == names


def test_refuses_pairs_that_one_of_the_models_was_trained_on(pairs, files, tmp_path):
    seen = hashlib.sha256(pairs[2].tar.read_bytes()).hexdigest()
    files.append(weights(tmp_path / "three.safetensors", 3, trained_on=[seen]))
    with pytest.raises(UserError, match=r"three\.safetensors was trained on 1 of the 4 pairs \(--allow-trained"):
        compare(files, pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = format_comparison(compare(files, pairs, tmp_path / "out", allow_trained=True))
    assert "three (restormer_nano) was TRAINED ON 1 of these pairs." in said
    assert "one/checkpoint_best (restormer_nano) does not say which photos it was trained on." in said


def test_command_line(pairs, tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    options = ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
    run = [str(weights(tmp_path / f"{name}.safetensors", seed, run="r")) for name, seed in (("a", 0), ("b", 1))]
    together = ["--ensemble", "lite", run[0], "--ensemble", *run, "--average", "outputs", "weights"]
    assert main(["compare", "lite", *options, "--ssim", "0.5", "1", *together]) == 0
    said = capsys.readouterr().out
    assert "Costs were measured on pictures of 0.00077 megapixels" in said
    assert "\nlite " in said and "\nauto-tone " in said and str(tmp_path / "out" / "compare.html") in said
    assert all(f"\n{name} (" in said for name in ("ensemble", "ensemble (2)", "soup")) and "one model, got several" in said
    assert json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["settings"]["points"]["ssim"] == [0.5, 1]
    for wrong, reason in (
        ([], "at least one checkpoint, got none"),
        ([str(tmp_path / "none.pth")], "cannot be read: No such file"),
    ):
        assert main(["compare", *wrong, *options]) == 2
        assert reason in capsys.readouterr().err


def test_forms_and_the_ensemble_stand_beside_their_models(pairs, files, tmp_path):
    first, second = "one/checkpoint_best", "two/checkpoint_best"
    large = [Pair(pair.src, pair.tar, pair.line) for pair in pairs[:2]]
    for pair in large:  # fast sees what is smaller whole
        for file in (pair.src, pair.tar):
            Image.open(file).resize((66, 64)).save(file)
    given = {"forms": ("bfloat16", "fast", "flips-8", "sharpen"), "ensembles": [files], "cost_size": (32, 40)}
    results = compare([*files, SHIPPED], large, tmp_path / "out", **given)
    methods, networks = results["methods"], [load_checkpoint(file) for file in files]
    formed = [f"{name}{form}" for name in (first, second) for form in ("", ", bfloat16", ", fast", ", flips-8", ", sharpen")]
    assert list(methods) == [*FIXED, *formed, "lite", "lite, bfloat16", "lite, sharpen", "ensemble"]
    assert results["left_out"] == [
        "lite: fast: lite sees no more than a thumbnail as it is; expected another model",
        "lite: flips: lite lightens ceilings, whose mean with floors is none: expected 1 or 2, got 8",
    ]
    sample = PairDataset(large)[0]  # not the pixels alone: sums follow how they lie in memory
    source, target = sample["src"][None], sample["tar"][None]
    with torch.inference_mode():
        outputs = {f"{second}, fast": combine([networks[1]], fast=True)(source)}
        outputs |= {f"{second}, flips-8": combine([networks[1]], flips=8)(source), "ensemble": combine(networks)(source)}
        outputs[f"{second}, sharpen"] = combine([networks[1]], sharpen=0.3)(source)
        with torch.autocast("cpu", torch.bfloat16):
            outputs[f"{second}, bfloat16"] = networks[1](source).float()
    for name, output in outputs.items():
        psnr = METRICS["psnr"](output.clamp(0, 1), target).item()
        of = second if name != "ensemble" else first
        figures = results["images"][0]["figures"]
        assert figures[name]["psnr"] == pytest.approx(psnr, abs=1e-6) and abs(psnr - figures[of]["psnr"]) > 1e-5, name
        gains = [image["figures"][name]["psnr"] - image["figures"][of]["psnr"] for image in results["images"]]
        assert methods[name]["difference"]["psnr"][0] == pytest.approx(np.mean(gains)), name
    plain, views = (methods[f"{first}{form}"]["macs_per_megapixel"] for form in ("", ", flips-8"))
    assert views == 8 * plain and methods[f"{first}, fast"]["macs_per_megapixel"] < plain / 8
    assert methods["ensemble"]["file_bytes"] == sum(file.stat().st_size for file in files)
    page = Page((tmp_path / "out" / "compare.html").read_text("utf-8"))
    assert [image["data-show"] for image in page.all("img")] == [*FIXED, first, second, "lite", "ensemble", "target"] * 2
    assert "Forms minus their model" in page.texts["h2"] and "a photo of 40×32 pixels" in page.text
    said = format_comparison(results)
    assert "Not measured: lite: fast: lite sees no more" in said and said.count("does not say which photos") == 3


def test_a_soup_is_a_form_of_its_member(pairs, files, tmp_path):
    """Both means of an ensemble, of which one member is measured by itself; the mean of weights of other runs is left out."""
    best, other = (weights(tmp_path / "run" / f"{name}.safetensors", seed, run="r") for name, seed in (("best", 3), ("last", 4)))
    twice = shutil.copy(best, tmp_path / "twice.safetensors")
    given = {"ensembles": [files, [other, best], [best, twice]], "average": ["outputs", "weights"]}
    results = compare([files[0], best], pairs, tmp_path / "out", **given)
    methods = results["methods"]
    assert list(methods) == [*FIXED, "checkpoint_best", "best", "ensemble", "ensemble (2)", "best, soup"]
    reason, *same = results["left_out"]
    assert reason.startswith(f"{files[0]} and {files[1]}: a mean of weights: expected checkpoints of one run, got several")
    named = f"{best} and {twice}: a mean of"
    said = "expected different weights, got the same: it is each of them"
    assert same == [f"{named} outputs: {said}", f"{named} weights: {said}"]
    networks = [load_checkpoint(file) for file in (other, best)]
    sample = PairDataset(pairs)[0]
    source, target = sample["src"][None], sample["tar"][None]
    with torch.inference_mode():
        outputs = {"best": networks[1](source), "ensemble (2)": combine(networks)(source)}
        outputs["best, soup"] = combine(networks, average="weights")(source)
    figures = results["images"][0]["figures"]
    for name, output in outputs.items():
        assert figures[name]["psnr"] == pytest.approx(METRICS["psnr"](output.clamp(0, 1), target).item(), abs=1e-6), name
    assert len({round(figures[name]["psnr"], 3) for name in outputs}) == 3
    soup = methods["best, soup"]
    assert soup["form_of"] == "best" and soup["parameters"] == methods["best"]["parameters"]
    assert soup["file_bytes"] == other.stat().st_size + best.stat().st_size and soup["macs_per_megapixel"] > 0
    gains = [image["figures"]["best, soup"]["psnr"] - image["figures"]["best"]["psnr"] for image in results["images"]]
    assert soup["difference"]["psnr"][0] == pytest.approx(np.mean(gains)) and any(gains)
    alone = compare(files[:1], pairs, tmp_path / "out", ensembles=[[other, best]], average=["weights"])["methods"]
    assert list(alone) == [*FIXED, "checkpoint_best", "soup"] and alone["soup"]["form_of"] is None


def test_a_model_in_8_bits_is_a_form_of_its_own(pairs, files, tmp_path):
    coded = tmp_path / "coded.safetensors"
    save_weights(coded, quantized(load_checkpoint(files[1]), [torch.rand(1, 3, 24, 32)]), {})
    results = compare([*files, coded], pairs, tmp_path / "out", forms=["bfloat16"])
    first, second = "one/checkpoint_best", "two/checkpoint_best"
    models = [first, f"{first}, bfloat16", second, f"{second}, bfloat16", f"{second}, int8"]
    assert list(results["methods"]) == [*FIXED, *models]
    made = results["methods"][f"{second}, int8"]
    assert made["form_of"] == second and made["file_bytes"] == coded.stat().st_size
    losses = [image["figures"][f"{second}, int8"]["psnr"] - image["figures"][second]["psnr"] for image in results["images"]]
    assert made["difference"]["psnr"][0] == pytest.approx(np.mean(losses)) and any(losses)
    alone = compare([files[0], coded], pairs, tmp_path / "out")["methods"]
    assert alone["coded"]["form_of"] is None


def test_a_form_never_takes_another_files_name(files, tmp_path):
    odd = weights(tmp_path / "one" / "checkpoint_best, flips-8.safetensors", 2)
    together = [[files[0], odd]] * 2, ["outputs"]
    names = list(comparison._candidates([files[0], odd], ["flips-8"], *together, "float32", torch.device("cpu"))[0])
    assert names == [
        "checkpoint_best",
        "checkpoint_best, flips-8 (2)",
        "checkpoint_best, flips-8",
        "checkpoint_best, flips-8, flips-8",
        "ensemble",
        "ensemble (2)",
    ]


def test_costs_are_those_of_the_size_that_is_asked_for(pairs, files, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "PASSES", 2)
    monkeypatch.setattr(
        type(load_checkpoint(files[0])), "forward", lambda self, image: seen.append(tuple(image.shape[2:])) or image
    )
    results = compare(files[:1], pairs[:1], tmp_path / "out", cost_size=(40, 60))
    assert seen[-2:] == [(40, 60)] * 2 and seen.count((24, 32)) == 2  # one to warm up
    assert results["settings"]["cost_size"] == (40, 60)


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(pairs, files, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "measured", lambda *args, **settings: pytest.fail("measured"))
    with pytest.raises(OSError, match="checkpoint_best.safetensors"):
        compare(files[:1], pairs, files[0])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"ensembles": [["one", "two"], ["one"]]}, "ensemble: expected two checkpoints or more, got 1"),
        ({"ensembles": [["one", "three"]]}, "three/checkpoint_best.safetensors: cannot be read: No such file"),
        ({"average": ["weights"]}, "average: expected ensembles to take the mean of the weights of, got none"),
        ({"average": ["photos"], "ensembles": [["one", "two"]]}, "average: expected some of outputs, weights, got photos"),
        ({"forms": ["flips"]}, "forms: expected some of bfloat16, float16, fast, flips-2, flips-4, flips-8, sharpen, got flips"),
        ({"forms": ["bfloat16"], "precision": "bfloat16"}, "forms: bfloat16 is the precision of all models as it is"),
        ({"cost_size": (0, 40)}, r"expected a height and a width above 0, got \[0, 40\]"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said, pairs, files, tmp_path):
    if "ensembles" in wrong:
        members = [[tmp_path / run / "checkpoint_best.safetensors" for run in runs] for runs in wrong["ensembles"]]
        wrong = wrong | {"ensembles": members}
    with pytest.raises(UserError, match=said):
        compare(files, pairs, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()

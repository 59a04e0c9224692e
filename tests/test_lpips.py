"""LPIPS against torchmetrics, against its formula in NumPy, what its files may be, and `eval` and `compare` with it."""

import importlib.resources
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.image import lpips as theirs

from autohdr.cli import main
from autohdr.data.images import read_rgb
from autohdr.data.pairs import Pair, write_pairs
from autohdr.errors import UserError
from autohdr.lpips import LPIPS

# Place among torchvision's features: input channels, channels, side, stride, padding.
CONVOLUTIONS = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2)} | {6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1)}
CONVOLUTIONS |= {10: (256, 256, 3, 1, 1)}
LINEAR = importlib.resources.files("torchmetrics") / "functional/image/lpips_models/alex.pth"  # the one of the package lpips


@pytest.fixture(scope="module")
def alexnet():
    """torchvision's layers, `features`, with random weights; the last pooling has no part in LPIPS."""
    torch.manual_seed(0)
    layers: dict[int, nn.Module] = {place: nn.Conv2d(*sizes) for place, sizes in CONVOLUTIONS.items()}
    layers |= {place + 1: nn.ReLU(inplace=True) for place in CONVOLUTIONS} | {place: nn.MaxPool2d(3, 2) for place in (2, 5, 12)}
    for place in CONVOLUTIONS:
        nn.init.kaiming_normal_(layers[place].weight)
    return nn.Sequential(*(layers[place] for place in sorted(layers)))


@pytest.fixture(scope="module")
def files(alexnet, tmp_path_factory):
    """As torchvision has them, with some of the classifier, and as the package lpips does."""
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    state = {f"features.{name}": tensor for name, tensor in alexnet.state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, path)
    return [path, LINEAR]


def images(height, width, batch=2):
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(batch, 3, height, width, generator=generator)
    return first, (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("height, width", [(31, 31), (67, 98)])
def test_agrees_with_torchmetrics(files, alexnet, monkeypatch, height, width):
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: alexnet)
    oracle = theirs._LPIPS(pretrained=True, net="alex")
    first, second = images(height, width)
    expected = oracle(first, second, normalize=True).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(LPIPS(files)(first, second), expected, rtol=1e-5, atol=0)


def test_is_the_formula(files):
    """In float64, with no convolution but sums over windows."""
    tensors = {name: t.double().numpy() for file in files for name, t in torch.load(file, map_location="cpu").items()}

    def windows(x, side, stride, padding=0, value=0.0):
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)), constant_values=value)
        return np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))[:, ::stride, ::stride]

    def features(x):
        shift, scale = (np.array(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x, found = (2 * x - 1 - shift) / scale, []
        for place, (_, _, side, stride, padding) in CONVOLUTIONS.items():
            x = windows(x, 3, 2).max((3, 4)) if place in (3, 6) else x
            x = np.einsum(
                "chwij,dcij->dhw", windows(x, side, stride, padding), tensors[f"features.{place}.weight"], optimize=True
            )
            x = np.maximum(x + tensors[f"features.{place}.bias"][:, None, None], 0)
            found.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
        return found

    first, second = (image.double() for image in images(35, 50, batch=1))
    expected = sum(
        (((a - b) ** 2) * tensors[f"lin{layer}.model.1.weight"][0]).sum(0).mean()
        for layer, (a, b) in enumerate(zip(features(first[0].numpy()), features(second[0].numpy()), strict=True))
    )
    found = LPIPS(files).double()(first, second)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx([expected], rel=1e-7)


def test_equal_images_are_0_apart(files):
    image, _ = images(40, 33)
    assert LPIPS(files)(image, image).tolist() == [0, 0]


def test_reads_a_state_dict_of_lpips(files, tmp_path):
    """Which has each of the linear weights twice."""
    state = {}
    for layer, place in enumerate(CONVOLUTIONS):
        for kind in ("weight", "bias"):
            state[f"net.slice{layer + 1}.{place}.{kind}"] = torch.load(files[0])[f"features.{place}.{kind}"]
        weight = torch.load(LINEAR, map_location="cpu")[f"lin{layer}.model.1.weight"]
        state |= {f"lin{layer}.model.1.weight": weight, f"lins.{layer}.model.1.weight": weight}
    state |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    torch.save(state, tmp_path / "lpips.pth")
    first, second = images(48, 40)
    torch.testing.assert_close(LPIPS([tmp_path / "lpips.pth"])(first, second), LPIPS(files)(first, second), rtol=0, atol=0)


def test_refuses_files_that_are_not_its_weights(files, tmp_path):
    state = torch.load(files[0])

    def refused(message, *given):
        with pytest.raises(UserError, match=message):
            LPIPS(given)

    def changed(**tensors):
        torch.save(state | {name.replace("_", "."): tensor for name, tensor in tensors.items()}, tmp_path / "other.pth")
        return tmp_path / "other.pth"

    refused(r"expected lin0\.model\.1\.weight \[1, 64, 1, 1\], as lpips' weights/v0\.1/alex\.pth has it, got no such", files[0])
    refused(r"expected features\.0\.weight \[64, 3, 11, 11\], as torchvision's alexnet-owt-7be5be79\.pth has it, got", LINEAR)
    vgg = changed(features_0_weight=torch.zeros(64, 3, 3, 3))
    refused(r"other\.pth.*expected features\.0\.weight \[64, 3, 11, 11\] of AlexNet, got \[64, 3, 3, 3\]", vgg, LINEAR)
    refused(r"features\.3\.bias is not finite", changed(features_3_bias=torch.full((192,), math.nan)), LINEAR)
    refused(r"expected features\.3\.bias .* got a tensor of torch\.bool", changed(features_3_bias=torch.ones(192) > 0), LINEAR)
    whole = changed(features_3_bias=torch.ones(192, dtype=torch.int64))
    refused(r"expected features\.3\.bias \[192\] of AlexNet, got a tensor of torch\.int64", whole, LINEAR)
    refused(r"alexnet\.pth: has features\.0\.weight a second time", *files, files[0])
    refused(r"none\.pth: cannot be read", tmp_path / "none.pth")


def test_refuses_what_is_no_pair_of_images(files):
    metric = LPIPS(files)
    with pytest.raises(UserError, match=r"lpips: both sides must be at least 31 pixels, got 30x64"):
        metric(*images(30, 64))
    with pytest.raises(UserError, match=r"lpips: prediction and target must both be \[B, 3, H, W\]"):
        metric(torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 41))


def test_eval_and_compare_measure_it_where_its_weights_are_given(files, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("src", "tar"):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    write_pairs(tmp_path / "pairs.jsonl", [Pair(tmp_path / "src.png", tmp_path / "tar.png", 1)])
    options = ["--pairs", str(tmp_path / "pairs.jsonl"), "--lpips", *map(str, files)]
    source, target = (torch.from_numpy(read_rgb(tmp_path / f"{name}.png")).permute(2, 0, 1)[None] for name in ("src", "tar"))
    expected = LPIPS(files)(source, target).item()

    assert main(["eval", *options, "--out", str(tmp_path / "eval")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "eval" / "results.json").read_text("utf-8"))
    assert results["images"][0]["figures"]["source"]["lpips"] == pytest.approx(expected)
    assert results["summary"]["model_minus_auto_tone"]["lpips"][0] is not None
    assert results["settings"]["lpips"] == [str(file) for file in files]
    assert "LPIPS ↓" in said and f"{expected:.4f}" in said and "these pairs cannot tell: L1" in said and "LPIPS " in said

    assert main(["compare", "lite", *options, "--out", str(tmp_path / "compare")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "compare" / "compare.json").read_text("utf-8"))
    assert results["methods"]["source"]["figures"]["lpips"][0] == pytest.approx(expected)
    assert "LPIPS ↓" in said and f"{expected:.4f}" in said
    for page in (tmp_path / "eval" / "report.html", tmp_path / "compare" / "compare.html"):
        assert f"<td>{expected:.4f}</td>" in page.read_text("utf-8")

    assert main(["eval", *options[:-1], "--out", str(tmp_path / "none")]) == 2
    assert "expected lin0.model.1.weight [1, 64, 1, 1]" in capsys.readouterr().err and not (tmp_path / "none").exists()

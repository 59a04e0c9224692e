"""The losses against torchmetrics, kornia and plain PyTorch, and whole runs with all of them."""

import csv
import json
import math
from pathlib import Path

import kornia
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture
from torch.autograd import gradcheck
from torchmetrics.functional.image import structural_similarity_index_measure

from autohdr.cli import main
from autohdr.errors import UserError
from autohdr.train import loop, losses
from autohdr.train.checkpoint import load_state
from autohdr.train.config import LOSSES, TrainConfig
from autohdr.train.loop import train

# VGG19 to relu5_1 as torchvision numbers it: (index, channels in, channels out) of each level's convolutions.
CONVOLUTIONS = [
    [(0, 3, 64), (2, 64, 64)],
    [(5, 64, 128), (7, 128, 128)],
    [(10, 128, 256), (12, 256, 256), (14, 256, 256), (16, 256, 256)],
    [(19, 256, 512), (21, 512, 512), (23, 512, 512), (25, 512, 512)],
    [(28, 512, 512)],
]
OF_PAIRS = sorted(LOSSES.keys() - {"adversarial"})  # test_adversarial.py has that
ALL = {"l1": 1.0, "charbonnier": 0.5, "vgg": 0.1, "edge": 0.05, "ssim": 0.1}


def images(height=19, width=23, batch=2, dtype=torch.float64):
    """(output, target), random and different."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(batch, 3, height, width, dtype=dtype, generator=generator) for _ in range(2))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights in torchvision's layout, with some of the layers that the loss has no use for."""
    generator = torch.Generator().manual_seed(1)
    tensors = {"features.30.weight": torch.zeros(512, 512, 3, 3), "classifier.6.bias": torch.zeros(1000)}
    for index, channels_in, channels_out in sum(CONVOLUTIONS, []):
        scale = math.sqrt(2 / (9 * channels_in))  # keeps the features' size from layer to layer
        tensors[f"features.{index}.weight"] = scale * torch.randn(channels_out, channels_in, 3, 3, generator=generator)
        tensors[f"features.{index}.bias"] = 0.1 * torch.randn(channels_out, generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def vgg(vgg_file):
    return losses.VGG(vgg_file).double()


def plain_vgg(tensors, output, target):
    """The perceptual loss without modules, in float64, of each level's first convolution."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    first = []
    for x in (output, target):
        x, taps = (x - mean) / std, []
        for level, convolutions in enumerate(CONVOLUTIONS):
            x = F.max_pool2d(x, 2) if level else x
            for index, _, _ in convolutions:
                weight, bias = (tensors[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, padding=1).relu()
                if index == convolutions[0][0]:
                    taps.append(x)
        first.append(taps)
    return sum((a - b).abs().mean() * w for a, b, w in zip(*first, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), strict=True))


def test_l1_is_the_mean_absolute_error():
    output, target = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.5, 1.0, 0.25])
    assert losses.l1(output.view(1, 3, 1, 1), target.view(1, 3, 1, 1)).item() == 0.25


def test_charbonnier_agrees_with_kornia():
    """kornia's has ε = 1: ours is that one with lengths measured in thousandths."""
    output, target = images()
    expected = kornia.losses.charbonnier_loss(1000 * output, 1000 * target, reduction="mean") / 1000
    torch.testing.assert_close(losses.charbonnier(output, target), expected)


def test_ssim_agrees_with_torchmetrics():
    """Within the image: torchmetrics reflects the border, and we leave it out."""
    output, target = images(41, 57)
    settings = {"sigma": 1.5, "kernel_size": 11, "data_range": 1.0, "return_full_image": True}
    _, similarity = structural_similarity_index_measure(output, target, **settings)
    torch.testing.assert_close(losses.ssim(output, target), 1 - similarity[..., 5:-5, 5:-5].mean())


def test_edge_agrees_with_kornia():
    """Within the image: kornia repeats the border, and we leave it out."""
    output, target = images()
    theirs, others = (kornia.filters.spatial_gradient(image, "sobel", 1, normalized=True) for image in (output, target))
    torch.testing.assert_close(losses.edge(output, target), (theirs - others)[..., 1:-1, 1:-1].abs().mean())


def test_vgg_agrees_with_plain_pytorch(vgg, vgg_file):
    output, target = images(35, 48)
    tensors = torch.load(vgg_file)
    output.requires_grad_()
    ours, expected = vgg(output, target), plain_vgg(tensors, output, target)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, output)[0] for loss in (ours, expected)))


def test_vgg_is_frozen_and_in_torchvisions_layout(vgg, vgg_file):
    assert not any(parameter.requires_grad for parameter in vgg.parameters())
    state = vgg.state_dict()
    assert state.keys() == torch.load(vgg_file).keys() - {"features.30.weight", "classifier.6.bias"}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_gradcheck(name, vgg):
    loss = vgg if name == "vgg" else getattr(losses, name)
    side = max(LOSSES[name], 4)
    output, target = images(side, side + 1, batch=1)
    # vgg: one random direction, not each of 816 pixels.
    assert gradcheck(loss, (output.requires_grad_(), target), fast_mode=name == "vgg")


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_loss_is_a_mean_over_the_batch_and_0_of_equal_images(name, vgg):
    loss = vgg if name == "vgg" else getattr(losses, name)
    output, target = images(LOSSES[name], LOSSES[name])
    whole = loss(output, target)
    assert whole.shape == () and whole > 0
    torch.testing.assert_close(whole, (loss(output[:1], target[:1]) + loss(output[1:], target[1:])) / 2)
    torch.testing.assert_close(loss(target, target), torch.zeros((), dtype=torch.float64))


def test_criterion_sums_in_float32_under_autocast(vgg_file):
    config = TrainConfig(losses=ALL | {"charbonnier": 0.0}, vgg_weights=vgg_file)
    criterion = losses.Criterion(config, torch.device("cpu"))
    output, target = (image.bfloat16() for image in images())
    with torch.autocast("cpu", torch.bfloat16):
        total, components = criterion(output.requires_grad_(), target)
    exact = {name: getattr(losses, name, None) for name in OF_PAIRS} | {"vgg": losses.VGG(vgg_file).double()}
    assert list(components) == ["l1", "charbonnier", "vgg", "edge", "ssim"]
    for name, component in components.items():
        assert component.dtype == torch.float32 and not component.requires_grad
        expected = exact[name](output.detach().double(), target.double())
        torch.testing.assert_close(component.double(), expected, rtol=1e-5, atol=0)
    expected = sum(weight * components[name] for name, weight in ALL.items() if name != "charbonnier")
    torch.testing.assert_close(total, expected)
    total.backward()
    assert output.grad.isfinite().all() and output.grad.any()


def test_criterion_logs_l1_and_what_weighs_nothing():
    config = TrainConfig(losses={"edge": 2.0, "ssim": 0.0})
    output, target = (image.float() for image in images())
    total, components = losses.Criterion(config, torch.device("cpu"))(output.requires_grad_(), target)
    assert list(components) == ["l1", "edge", "ssim"]
    assert total == 2 * components["edge"] and components["ssim"] == losses.ssim(output, target)
    torch.testing.assert_close(*(torch.autograd.grad(x, output)[0] for x in (total, 2 * losses.edge(output, target))))


def test_criterion_draws_no_random_numbers(vgg_file):
    before = torch.get_rng_state()
    losses.Criterion(TrainConfig(losses=ALL, vgg_weights=vgg_file), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_vgg_from_the_cache_of_torch_hub(vgg_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth").symlink_to(vgg_file)
    losses.Criterion(TrainConfig(losses={"vgg": 1.0}), torch.device("cpu"))


def test_refuses_absent_vgg_weights(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = make_config(losses=ALL)
    message = (
        r"no file .*hub/checkpoints/vgg19-dcbb9e9d\.pth.* https://download\.pytorch\.org/models/vgg19-dcbb9e9d\.pth .*"
        r"--vgg-weights PATH.*losses = \{l1 = 1.0, charbonnier = 0.5, edge = 0.05, ssim = 0.1\}"
    )
    with pytest.raises(UserError, match=message):
        train(config)
    assert not config.out.exists()
    with pytest.raises(UserError, match=r"no file nowhere\.pth\. .*losses = \{l1 = 1.0\}"):
        train(make_config(losses={"vgg": 1.0}, vgg_weights=Path("nowhere.pth")))


def test_refuses_other_weights(tmp_path):
    path = tmp_path / "vgg.pth"
    config = TrainConfig(losses={"vgg": 1.0}, vgg_weights=path)
    wanted = r"expected torchvision's vgg19 with features\.0\.weight \[64, 3, 3, 3\], got "
    for tensors, got in (
        ({"conv.weight": torch.zeros(1)}, "no such tensor"),
        ({"features.0.weight": torch.zeros(64, 3, 5, 5)}, r"\[64, 3, 5, 5\]"),
    ):
        torch.save(tensors, path)
        with pytest.raises(UserError, match=f"vgg.pth: {wanted}{got}"):
            losses.Criterion(config, torch.device("cpu"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="vgg.pth: .*damaged"):
        losses.Criterion(config, torch.device("cpu"))


@pytest.mark.parametrize("name, least", [("edge", 3), ("ssim", 11), ("vgg", 16), ("adversarial", 24)])
def test_refuses_training_pairs_too_small_for_a_loss(make_config, tmp_path, name, least):
    for side in ("src.png", "tar.png"):
        Image.new("RGB", (320, 10 * (least - 1))).save(tmp_path / side)
    (tmp_path / "long.jsonl").write_text('{"src": "src.png", "tar": "tar.png"}\n')
    config = make_config(train_pairs=tmp_path / "long.jsonl", resize="fit", batch_size=1, losses={name: 1.0})
    message = f"long.jsonl:1: expected training pairs .* at least {least} pixels, as the loss {name} needs; .*32x{least - 1} with"
    with pytest.raises(UserError, match=message):
        train(config)
    assert not config.out.exists()


def test_a_run_with_all_losses_logs_each_and_resumes_bitwise(make_config, monkeypatch, vgg_file):
    settings = {"losses": ALL, "vgg_weights": vgg_file, "log_every": 1, "batch_size": 2, "accumulate": 2}
    whole, parts = make_config("whole", **settings), make_config("parts", **settings)
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 1)
        assert train(parts).interrupted
    train(parts, resume=True)
    states = [load_state(config.out / STATE) for config in (whole, parts)]
    for key in ("model", "optimizer"):
        assert same(states[0][key], states[1][key])
    assert not any("features" in name for name in states[0]["model"])

    rows = list(csv.DictReader((whole.out / "log.csv").open()))
    lines, resumed = ([json.loads(x) for x in (c.out / "log.jsonl").read_text().splitlines()] for c in (whole, parts))
    names = ["l1", "charbonnier", "vgg", "edge", "ssim"]
    assert [key for key in rows[0] if key.startswith("train_")] == ["train_loss", *(f"train_{name}" for name in names)]
    for epoch, row in enumerate(rows, 1):
        steps = [line for line in lines if line["kind"] == "step" and line["epoch"] == epoch]
        assert len(steps) == 2
        for name in ("loss", *names):  # four samples in the first step, two in the second
            assert float(row[f"train_{name}"]) == pytest.approx((4 * steps[0][name] + 2 * steps[1][name]) / 6, rel=1e-6)
    for line, again in zip(lines, resumed, strict=True):
        prefix = {"step": "", "epoch": "train_"}[line["kind"]]
        values = {name: line[prefix + name] for name in ("loss", *names)}
        assert values == {name: again[prefix + name] for name in values}
        assert values["loss"] == pytest.approx(sum(weight * values[name] for name, weight in ALL.items()), rel=1e-5)


def test_an_ordinary_run_has_l1_alone(make_config):
    config = make_config(epochs=1, log_every=1)
    train(config)
    row, *_ = csv.DictReader((config.out / "log.csv").open())
    assert [key for key in row if key.startswith("train_")] == ["train_loss", "train_l1"]
    assert row["train_loss"] == row["train_l1"]


@pytest.mark.parametrize(
    "prediction, wanted", [("x0", {"charbonnier": 1.0, "edge": 0.1, "ssim": 0.1}), ("v", {"charbonnier": 1.0})]
)
def test_a_bridge_trains_on_other_losses(make_config, prediction, wanted):
    bridge = {"model": "mamba_diffusion_nano", "model_args": {"dim": 8, "num_groups": 2}, "objective": "bridge"}
    summary = train(make_config(**bridge, prediction=prediction, sample_steps=1, epochs=1, losses=wanted))
    assert all(math.isfinite(summary.best[f"train_{name}"]) for name in ("loss", "l1", *wanted))


def test_losses_on_the_command_line(make_config, pair_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    given = ["--train-pairs", str(pair_files[0]), "--val-pairs", str(pair_files[1]), "--out", str(tmp_path / "run")]
    assert main(["train", "restormer_384_enhanced", *given]) == 2
    assert "vgg_weights: the loss vgg needs" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(loop, "train", lambda config, resume: seen.append(config) or loop.RunSummary(config.out, 0, {}, 2))
    assert main(["train", "restormer_384", *given, "--losses", '{"l1": 1, "ssim": 0.5}']) == 130
    assert seen[0].losses == {"l1": 1, "ssim": 0.5}

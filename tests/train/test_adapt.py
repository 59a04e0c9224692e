"""Adapting the shipped Lite: a look is learnt and holds for others, chance is refused, pairs of one picture stay together."""

import json

import pytest
import torch
from PIL import Image

from autohdr.cli import main
from autohdr.data.pairs import photo_digests, read_pairs
from autohdr.models import load_checkpoint
from autohdr.train import adapt
from autohdr.train.lite import psnr


def photos(count, seed=0):
    """Dim walls, each of another light, and furniture, [count, 3, 128, 128]."""
    g = torch.Generator().manual_seed(seed)
    walls = 0.35 + 0.2 * torch.rand(count, 3, 1, 1, generator=g)
    x = walls * torch.linspace(0.6, 1, 128)
    furniture = torch.rand(count, 3, 8, 16, generator=g).repeat_interleave(8, 2).repeat_interleave(8, 3)
    furniture = 0.4 * (0.3 * furniture + 0.7 * furniture.mean(1, keepdim=True))
    return torch.cat([x.expand(count, 3, 64, 128), furniture], 2)


@torch.no_grad()
def edits(sources, look):
    """What the shipped model makes of the photos, in a look: warmer and of more contrast, or for each photo another."""
    targets = load_checkpoint()(sources)
    g = torch.Generator().manual_seed(1)
    if look == "none":
        gains, powers = torch.randn(len(targets), 3, 1, 1, generator=g), torch.rand(len(targets), 1, 1, 1, generator=g)
        return (targets ** (0.5 + powers) * torch.exp(0.2 * gains)).clamp(0, 1)
    return (targets**1.2 * torch.tensor([1.04, 1, 0.85])[:, None, None]).clamp(0, 1)


def write(folder, sources, targets):
    for index, pair in enumerate(zip(sources, targets, strict=True)):
        for name, picture in zip(("src", "tar"), pair, strict=True):
            samples = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(samples).save(folder / f"{index}_{name}.png")
    lines = [json.dumps({"src": f"{index}_src.png", "tar": f"{index}_tar.png"}) + "\n" for index in range(len(sources))]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return str(folder / "pairs.jsonl")


def test_a_look_is_learnt_and_recorded(tmp_path, capsys):
    sources = photos(10)
    pairs, weights = write(tmp_path, sources, edits(sources, "warm")), tmp_path / "look.safetensors"
    assert main(["adapt", pairs, "--out", str(weights)]) == 0
    assert "10 pairs, 10 pictures" in capsys.readouterr().out
    model, others = load_checkpoint(weights), photos(6, seed=2)
    assert psnr(model, others, edits(others, "warm")) > psnr(load_checkpoint(), others, edits(others, "warm")) + 3
    assert model.metadata["trained_on"] == sorted(photo_digests(read_pairs(pairs)).values())
    assert main(["enhance", str(tmp_path / "0_src.png"), "--checkpoint", str(weights), "--out", str(tmp_path / "out")]) == 0
    assert main(["eval", "--pairs", pairs, "--checkpoint", str(weights), "--out", str(tmp_path / "report")]) == 2
    assert "was trained on 10 of the 10 pairs" in capsys.readouterr().err


def test_chance_is_refused_with_the_figures(tmp_path, capsys):
    sources = photos(10)
    pairs = write(tmp_path, sources, edits(sources, "none"))
    assert main(["adapt", pairs, "--out", str(tmp_path / "look.safetensors")]) == 1
    said = capsys.readouterr().err
    assert "not above chance: 10 pairs" in said and "dB as shipped" in said and "±" in said
    assert not (tmp_path / "look.safetensors").exists()


def test_too_few_pictures_are_refused(tmp_path, capsys):
    """Eight pairs, two of which are of one photo."""
    sources = photos(8)
    pairs = write(tmp_path, sources, edits(sources, "warm"))
    (tmp_path / "7_src.png").write_bytes((tmp_path / "6_src.png").read_bytes())
    assert main(["adapt", pairs, "--out", str(tmp_path / "look.safetensors")]) == 2
    assert "at least 8 different pictures, got 7" in capsys.readouterr().err
    assert main(["adapt", pairs, "--out", str(tmp_path / "no" / "look.safetensors")]) == 2
    assert "a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize("together", [True, False])
def test_pairs_of_one_picture_are_left_out_together(together):
    """Else what copies of a picture have in common, and no other picture, would pass for a look."""
    sources = photos(3)
    targets = edits(sources, "none")
    groups = [list(range(i, 18, 3)) for i in range(3)] if together else [[i] for i in range(18)]
    result, _ = adapt.fit(load_checkpoint(), sources.repeat(6, 1, 1, 1), targets.repeat(6, 1, 1, 1), groups)
    assert result.helps != together and (result.pairs, result.pictures) == (18, len(groups))


def test_of_finished_photos_there_is_nothing_to_learn():
    sources = photos(8) ** 0.1
    result, shift = adapt.fit(load_checkpoint(), sources, sources, [[i] for i in range(8)])
    assert (result.gain, result.interval, result.shrinkage) == (0, 0, None) and not result.helps and not shift.any()

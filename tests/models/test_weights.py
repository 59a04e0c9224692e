import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint, load_weights, save_weights

TO_OFFICIAL = (("patch_embed.", "patch_embed.proj."), (".blocks.", "."), (".norm1.", ".norm1.body."))


def official(state):
    """A state dict under the names the Restormer authors' models have."""
    for ours, theirs in (*TO_OFFICIAL, (".norm2.", ".norm2.body.")):
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    return state


def randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def assert_same_weights(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


@pytest.fixture(scope="module")
def official_file(model_shapes, tmp_path_factory):
    """A denoising checkpoint as published: 406 tensors under `params`; one value repeated, so that it stays small."""
    shapes = model_shapes(48, (4, 6, 6, 8), 4, bias=False, reduce_level1=False)
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("official") / "denoising.pth"
    torch.save({"params": official(state)}, path)
    return path


def test_round_trip_is_bitwise(tmp_path):
    path = tmp_path / "model.safetensors"
    model = randomised(create_model("restormer_nano", dim=8, num_blocks=[1, 2, 1, 1], norm_bias=False))
    save_weights(path, model, {"epoch": 3, "psnr": 21.5, "note": ["a", None]})
    again = load_checkpoint(path)
    assert_same_weights(again, model.state_dict())
    assert again.config == model.config
    assert again.metadata == {"epoch": 3, "psnr": 21.5, "note": ["a", None]}
    assert not again.training
    image = torch.rand(1, 3, 9, 8)
    with torch.inference_mode():
        assert torch.equal(again(image), model.eval()(image))


def test_header(small, tmp_path):
    save_weights(tmp_path / "m.safetensors", small(), {"epoch": 1})
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["autohdr"]) == {
            "model": "restormer_nano",
            "overrides": {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1},
            "metadata": {"epoch": 1},
        }


def test_saving_is_atomic(small, tmp_path, monkeypatch):
    path, first = tmp_path / "m.safetensors", small()
    save_weights(path, first, {})

    def power_cut(_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        save_weights(path, randomised(small()), {})
    assert_same_weights(load_checkpoint(path), first.state_dict())
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "parallel"])
def test_checkpoint_of_the_original_project(tmp_path, prefix):
    state = randomised(create_model("restormer_tiny")).state_dict()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    saved = {"epoch": 7, "model_state_dict": wrapped, "val_loss": torch.tensor(0.25), "optimizer_state_dict": optimizer}
    torch.save(saved, tmp_path / "best.pt")
    model = load_checkpoint(tmp_path / "best.pt")
    assert (model.config.name, model.config.overrides) == ("restormer_tiny", {})
    assert model.metadata == {"epoch": 7, "val_loss": 0.25}
    assert_same_weights(model, state)


@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("nesting", [None, "params", "state_dict"])
def test_checkpoint_in_the_official_layout(small, tmp_path, nesting, norm_bias):
    state = randomised(small("restormer_official", norm_bias=norm_bias)).state_dict()
    torch.save({nesting: official(state)} if nesting else official(state), tmp_path / "m.pth")
    config = load_checkpoint(tmp_path / "m.pth").config
    assert config.name == "restormer_official" and config.eps == 1e-5 and config.norm_bias == norm_bias
    assert_same_weights(load_checkpoint(tmp_path / "m.pth"), state)


def test_official_checkpoint_is_the_official_model(official_file):
    config = load_checkpoint(official_file).config
    assert (config.name, config.overrides) == ("restormer_official", {})


def test_official_checkpoint_into_official(official_file, capsys):
    report = load_weights(create_model("restormer_official"), official_file)
    assert len(report.loaded) == 406
    assert not report.mismatched and not report.missing and not report.unexpected
    assert "loaded 406 of 406 tensors" in capsys.readouterr().out


def test_official_checkpoint_into_base(official_file, capsys):
    model = create_model("restormer_base")
    report = load_weights(model, official_file)
    assert len(report.loaded) == 341 and len(report.mismatched) == 65 and not report.unexpected
    assert {name.split(".")[0] for name in report.mismatched} == {"decoder_level1", "refinement", "output"}
    assert len(report.missing) == 89 and "reduce_chan_level1.weight" in report.missing
    assert not model.latent.blocks[7].ffn.project_out.weight.any() and model.output.weight.any()
    printed = capsys.readouterr().out
    assert "loaded 341 of 406 tensors" in printed and "leave the mean in" in printed
    assert "65 mismatched: " in printed and "and 62 more" in printed


def test_plain_state_dicts(small, tmp_path):
    state = randomised(small()).state_dict()
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / "m.weights")
    save_weights(tmp_path / "own.safetensors", load_checkpoint(tmp_path / "new.pt"), {})
    for file in tmp_path.iterdir():
        model = small()
        assert len(load_weights(model, file).loaded) == len(state)
        assert_same_weights(model, state)


def test_report_names_what_does_not_fit(small, tmp_path):
    state = small().state_dict()
    state["output.weight"] = torch.zeros(4, 8, 3, 3)
    state["extra"] = torch.zeros(1)
    del state["patch_embed.weight"]
    torch.save(state, tmp_path / "m.pt")
    report = load_weights(small(), tmp_path / "m.pt")
    assert report.mismatched == ["output.weight"]
    assert report.missing == ["patch_embed.weight"]
    assert report.unexpected == ["extra"]
    assert len(report.loaded) == len(state) - 2


def test_rejects_norm_biases_the_model_has_no_place_for(small, tmp_path):
    torch.save(official(small("restormer_official", norm_bias=True).state_dict()), tmp_path / "m.pth")
    model = small("restormer_official")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"m.pth: .*create_model\('restormer_official', norm_bias=True\)"):
        load_weights(model, tmp_path / "m.pth")
    assert_same_weights(model, before)


def test_rejects_weights_of_which_none_fits(small, tmp_path):
    torch.save({"classifier.weight": torch.zeros(2, 2)}, tmp_path / "m.pt")
    with pytest.raises(UserError, match="m.pt: no tensor fits restormer_nano"):
        load_weights(small(), tmp_path / "m.pt")
    with pytest.raises(UserError, match="m.pt: holds no Restormer: .*patch_embed.weight.*got classifier.weight"):
        load_checkpoint(tmp_path / "m.pt")


def test_load_checkpoint_rejects_a_part_of_a_model(small, tmp_path):
    state = small().state_dict()
    del state["up2_1.body.0.weight"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError, match="(?s)not make a whole model.*1 missing: up2_1.body.0.weight"):
        load_checkpoint(tmp_path / "m.pt")


class Foreign:
    def __reduce__(self):
        return os.mkdir, ("foreign code ran",)


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_never_runs_foreign_code(small, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "zip":
        torch.save({"params": small().state_dict(), "extra": Foreign()}, "m.pt")
    else:
        (tmp_path / "m.pt").write_bytes(pickle.dumps(Foreign(), protocol=2))
    with pytest.raises(UserError, match="m.pt: (needs .*mkdir|is damaged, truncated or no PyTorch checkpoint)"):
        load_checkpoint("m.pt")
    assert os.listdir() == ["m.pt"]


@pytest.mark.parametrize("keep", [0, 4, 30, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "pt", "old"])
def test_rejects_a_truncated_file(small, tmp_path, kind, keep):
    path = tmp_path / f"m.{kind}"
    if kind == "safetensors":
        save_weights(path, small(), {})
    else:
        torch.save(small().state_dict(), path, _use_new_zipfile_serialization=kind == "pt")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=f"m.{kind}: is (damaged|no checkpoint)"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a photo", b"{}", b"PK\x03\x04 an archive"], ids=str)
def test_rejects_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"photo\.jpg: is (no checkpoint|damaged)"):
        load_checkpoint(tmp_path / "photo.jpg")


@pytest.mark.parametrize(("content", "got"), [([1, 2], "list"), ({}, "nothing"), ({"epoch": 3}, "epoch")], ids=str)
def test_rejects_a_file_without_tensors(tmp_path, content, got):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=f"m.pt: expected a state dict, .*, got {got}"):
        load_checkpoint(tmp_path / "m.pt")


def test_rejects_a_path_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="absent.pt: cannot be read: No such file"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "'autohdr' header is damaged"),
        ("[]", "'autohdr' header is damaged"),
        ('{"model": "restormer_tiny"}', "'autohdr' header is damaged"),
        ('{"model": "m", "overrides": {}, "metadata": {}}', "no model is called 'm'"),
        ('{"model": "restormer_nano", "overrides": {"width": 1}, "metadata": {}}', "has no setting width"),
    ],
)
def test_rejects_a_header_it_cannot_follow(tmp_path, header, message):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"autohdr": header})
    with pytest.raises(UserError, match=f"m.safetensors: .*{message}"):
        load_checkpoint(tmp_path / "m.safetensors")

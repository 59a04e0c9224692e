import argparse
import contextlib
import datetime
import functools
import json
import os
import pickle
import random
import re
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint, load_weights, read_metadata, save_weights

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
    families = "Restormer or NAFNet or SwinIR or MambaDiffusion or Lite"
    with pytest.raises(UserError, match=f"m.pt: holds no {families}: .*patch_embed.weight.*got classifier.weight"):
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


# What other trainers write


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(tmp_path, content, **how):
    torch.save(content, tmp_path / "m.pth", **how)
    return tmp_path / "m.pth"


def wrapped_within(state):
    """As FSDP, checkpoint_wrapper and torch.compile name the tensors of modules that they wrap one by one."""
    return {
        "_fsdp_wrapped_module."
        + n.replace(".blocks.0.", "._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod."): t
        for n, t in state.items()
    }


LAYOUTS = {
    "BasicSR's params_ema": (lambda s: {"params_ema": s}, "params_ema"),
    "timm": (lambda s: {"state_dict_ema": s, "arch": "x", "version": 2}, "state_dict_ema"),
    "Lightning's model": (lambda s: {"state_dict": under("model.", s), "hyper_parameters": {"lr": 1e-4}}, "state_dict.model"),
    "Lightning's net, compiled": (lambda s: {"state_dict": under("net._orig_mod.", s)}, "state_dict.net"),
    "Lightning with a perceptual loss": (
        lambda s: {"state_dict": under("net_g.", s) | {"loss.vgg.features.0.weight": torch.zeros(64, 3, 3, 3)}},
        "state_dict.net_g",
    ),
    "a dictionary's model": (lambda s: {"model": s}, "model"),
    "Composer": (lambda s: {"state": {"model": under("module.", s), "rank": 0}}, "state.model"),
    "DeepSpeed": (lambda s: {"module": under("module.", s)}, "module"),
    "a GAN": (lambda s: {"generator": s, "discriminator": {"0.weight": torch.zeros(3)}}, "generator"),
    "prefixes, nested": (lambda s: under("module._orig_mod.net.module.backbone.", s), "net.backbone"),
    "AveragedModel": (lambda s: under("module.", s) | {"n_averaged": torch.tensor(5)}, ""),
    "thop": (lambda s: s | {"total_ops": torch.zeros(1), "latent.blocks.0.total_params": torch.zeros(1)}, ""),
    "FSDP, checkpoint wrappers, torch.compile": (wrapped_within, ""),
    "ema-pytorch": (
        lambda s: {"ema": under("online_model.", zeros(s)) | under("ema_model.module.", s) | {"initted": torch.tensor(True)}},
        "ema.ema_model",
    ),
    "both of an optimiser by names": (
        lambda s: {"model": s, "optim": {"state": {"exp_avg": zeros(s), "step": zeros(s)}}, "momentum": zeros(s)},
        "model",
    ),
    "the same twice": (lambda s: {"state_dict": under("net.", s) | under("loss.net.", s)}, "state_dict.net"),
}


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


HARDEST = "Lightning's net, compiled", "FSDP, checkpoint wrappers, torch.compile", "ema-pytorch", "prefixes, nested", "thop"


@pytest.mark.parametrize(
    ("layout", "family"),
    [(layout, "restormer") for layout in LAYOUTS] + [(layout, family) for layout in HARDEST for family in ("official", "mamba")],
)
def test_layouts_of_other_trainers(small, tmp_path, layout, family):
    if family == "mamba":
        model = create_model("mamba_diffusion_nano", dim=8, num_groups=1)
    else:
        model = small("restormer_official" if family == "official" else "restormer_nano")
    state = randomised(model).state_dict()
    wrap, place = LAYOUTS[layout]
    content = wrap(official(state) if family == "official" else state)
    path = saved(tmp_path, content | {"epoch": 3} if layout in ("AveragedModel", "thop") else {"epoch": 3} | content)
    assert_same_weights(load_checkpoint(path), state)
    assert load_checkpoint(path).metadata["epoch"] == read_metadata(path)["epoch"] == 3
    fresh = create_model(model.config.name, **model.config.overrides)
    report = load_weights(fresh, path)
    assert_same_weights(fresh, state)
    assert (report.place, report.missing, report.mismatched, report.unexpected) == (place, [], [], [])


def test_a_trainers_layout_in_safetensors(small, tmp_path):
    state = randomised(small()).state_dict()
    both = under("params.", zeros(state)) | under("params_ema.module.", state)
    safetensors.torch.save_file(both, tmp_path / "m.safetensors", {"format": "pt"})
    assert_same_weights(load_checkpoint(tmp_path / "m.safetensors"), state)


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [
        ("params_ema", "params"),
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("EMA", "net_g"),
        ("modelEMA", "model"),
        ("emaNet", "net"),
        ("swa_model", "model"),
        ("averaged_model", "model_state_dict"),
        ("shadow", "model"),
        ("state_dict", "current_model_state"),
        ("model", "online_model"),
    ],
)
@pytest.mark.parametrize("first", ["averaged", "plain"])
def test_the_averaged_weights_are_taken_and_the_report_says_so(small, tmp_path, averaged, plain, first, capsys):
    state = randomised(small()).state_dict()
    content = {averaged: state, plain: zeros(state)}
    path = saved(tmp_path, content if first == "averaged" else dict(reversed(content.items())))
    assert_same_weights(load_checkpoint(path), state)
    model = small()
    report = load_weights(model, path)
    assert_same_weights(model, state)
    assert (report.place, report.left_out) == (averaged, [plain])
    assert f"m.pth, {averaged}\n  1 left out: {plain}" in capsys.readouterr().out


def test_an_averaged_model_beside_the_live_one(small, tmp_path):
    state = randomised(small()).state_dict()
    averager = under("module.", state) | {"n_averaged": torch.tensor(5)}
    assert_same_weights(load_checkpoint(saved(tmp_path, {"model": zeros(state), "averager": averager})), state)


def test_no_averaged_weights_yet(small, tmp_path):
    state = randomised(small()).state_dict()
    for none in (None, {}, {"decay": 0.999}, {"decay": 0.999, "shadow_params": []}):
        assert_same_weights(load_checkpoint(saved(tmp_path, {"params": state, "params_ema": none})), state)


@pytest.mark.parametrize("content", [lambda a, b: {"day": a, "night": b}, lambda a, b: under("day.", a) | under("night.", b)])
def test_rejects_two_networks_of_the_same_right(small, tmp_path, content):
    state = randomised(small()).state_dict()
    path = saved(tmp_path, content(state, zeros(state)))
    for load in (load_checkpoint, lambda path: load_weights(small(), path)):
        with pytest.raises(UserError, match="m.pth: holds several networks that fit, at day, night; expected one"):
            load(path)


def test_rejects_a_tensor_of_two_values(small, tmp_path):
    state = small().state_dict()
    with pytest.raises(UserError, match="m.pth: holds output.weight twice, with different values"):
        load_checkpoint(saved(tmp_path, state | {"module.output.weight": state["output.weight"] + 1}))


def test_a_compiled_model_takes_weights(small, tmp_path):
    state = randomised(small()).state_dict()
    model = torch.compile(small())
    assert len(load_weights(model, saved(tmp_path, state)).loaded) == len(state)
    assert_same_weights(model._orig_mod, state)


# What lies beside the weights in a pickle


BESIDE = {
    "argparse": argparse.Namespace(lr=1e-4, out=Path("runs")),
    "path": Path("runs") / "a",
    "date": datetime.datetime.now(datetime.UTC),
    "duration": datetime.timedelta(1),
    "defaultdict": defaultdict(list, a=[1]),
    "OrderedDict": OrderedDict(a=1),
    "Counter": Counter("aab"),
    "deque": deque([1, 2], maxlen=3),
    "namespace": types.SimpleNamespace(a=1),
    "partial": functools.partial(dict, a=1),
    "slice": slice(2),
    "array": np.zeros(3),
    "array of objects": np.array([{}], dtype=object),
    "dtype": np.dtype("float32"),
    "type": np.float32,
    "random state": np.random.get_state(),
    "generator": np.random.default_rng(0),
    "time": np.datetime64("2020-01-01"),
    "Adam": torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", BESIDE)
def test_plain_data_beside_the_weights(small, tmp_path, kind, zipped):
    state = randomised(small()).state_dict()
    content = {"args": BESIDE[kind], "state_dict": state, "best": np.float64(31.25), "at": np.int64(7), "name": np.str_("a")}
    model = load_checkpoint(saved(tmp_path, content, _use_new_zipfile_serialization=zipped))
    assert_same_weights(model, state)
    assert model.metadata == {"best": 31.25, "at": 7, "name": "a"}
    assert [type(value) for value in model.metadata.values()] == [float, int, str]


@pytest.mark.parametrize("core", ["core", "_core"], ids=["numpy1", "numpy2"])
def test_numbers_of_either_numpy(small, tmp_path, core):
    path = saved(tmp_path, {"model": small().state_dict(), "psnr": np.float32(31.5), "seen": np.bool_(True), "h": np.zeros(2)})
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            if name.endswith("data.pkl"):
                record = re.sub(rb"numpy\._?core\.", b"numpy.%s." % core.encode(), record)
            archive.writestr(name, record)
    assert load_checkpoint(path).metadata == {"psnr": 31.5, "seen": True}


@pytest.mark.parametrize("base", [object, dict])
def test_settings_of_a_package_that_is_not_here(small, tmp_path, monkeypatch, base):
    """Nothing that a pickle names is imported: stand-ins take the place of omegaconf's, easydict's and others' objects."""
    module = types.ModuleType("omegaconf.dictconfig")
    module.SettingsDict = type("SettingsDict", (base,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    settings = module.SettingsDict()
    settings.lr = 1e-4
    if base is dict:
        settings["lr"] = 1e-4
    state = randomised(small()).state_dict()
    path = saved(tmp_path, {"state_dict": state, "hyper_parameters": settings, "epoch": 2})
    monkeypatch.undo()
    model = load_checkpoint(path)
    assert_same_weights(model, state)
    assert model.metadata == {"epoch": 2}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_rejects_a_pickled_module(small, tmp_path, zipped):
    module = small() if zipped else torch.nn.Linear(2, 2)  # the old format has every class's source beside it: slow
    for content in (module, {"model": module, "epoch": 3}):
        path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            UserError, match=r"needs (autohdr|torch\.nn)\.\S+, which is .*torch.save\(model.state_dict\(\), path\)"
        ):
            load_checkpoint(path)


class Calls:
    def __init__(self, call, *args):
        self.result = call, args

    def __reduce__(self):
        return self.result


@pytest.mark.parametrize("call", [eval, exec, __import__, getattr, os.system, pickle.loads, functools.reduce], ids=str)
def test_calls_nothing_that_a_pickle_names(small, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"model": small().state_dict(), "x": Calls(call, "__import__('os').mkdir('foreign code ran')")})
    with contextlib.suppress(UserError):
        load_checkpoint(path)
    assert os.listdir() == ["m.pth"]


def test_a_name_outside_plain_data_is_refused(small, tmp_path):
    path = saved(tmp_path, {"model": small().state_dict(), "x": Calls(eval, "1")})
    with pytest.raises(UserError, match="m.pth: needs eval, which is neither a tensor nor plain data; loading it could run"):
        load_checkpoint(path)


def test_a_name_that_poses_as_plain_data_is_refused(small, tmp_path):
    """PyTorch calls builtins.datetime.x "datetime.x": allowing that changes nothing, and is not tried for ever."""
    path = saved(tmp_path, {"model": small().state_dict(), "x": datetime.timedelta})
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record.replace(b"cdatetime\ntimedelta\n", b"cbuiltins.datetime\nx\n"))
    with pytest.raises(UserError, match="m.pth: needs datetime.x, which is neither a tensor nor plain data"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_formats_are_named(small, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(UserError, match="is a TorchScript archive"):
        load_checkpoint(tmp_path / "script.pt")
    with pytest.raises(UserError, match="pickle protocol"):
        load_checkpoint(saved(tmp_path, small().state_dict(), pickle_protocol=4))


# Shapes and kinds of numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["restormer_nano", "mamba_diffusion_nano"])
def test_weights_of_another_precision(tmp_path, dtype, name):
    """A trainer that casts everything casts the indices too."""
    state = {n: t.to(dtype) for n, t in randomised(create_model(name, dim=8)).state_dict().items()}
    path = saved(tmp_path, state)
    own = load_checkpoint(path).state_dict()
    assert (
        own["latent.blocks.0.norm1.weight" if "latent.blocks.0.norm1.weight" in own else "conv_first.0.weight"].dtype
        == torch.float32
    )
    for n, tensor in own.items():
        assert torch.equal(tensor, state[n].to(tensor.dtype)), n
    half = create_model(name, dim=8).bfloat16()
    load_weights(half, path)
    assert all(torch.equal(t, state[n].to(t.dtype)) for n, t in half.state_dict().items())


@pytest.mark.parametrize("reshape", [torch.squeeze, torch.flatten, lambda t: t[None]], ids=["squeezed", "flat", "one more"])
@pytest.mark.parametrize("name", ["restormer_nano", "restormer_official"])
def test_temperature_with_other_axes_of_length_1(small, tmp_path, name, reshape):
    state = randomised(small(name)).state_dict()
    changed = {n: reshape(t) if n.endswith("temperature") else t for n, t in state.items()}
    assert_same_weights(load_checkpoint(saved(tmp_path, changed)), state)


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda t: t.permute(1, 0, 2, 3), r"\[8, 3, 3, 3\] of torch.float32"),
        (lambda t: t.to(torch.int8), r"\[3, 8, 3, 3\] of torch.int8"),
        (lambda t: t.bool(), "a tensor of torch.bool"),
        (lambda t: t.to(torch.complex64), "a tensor of torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn"),
        (lambda t: t.to_sparse(), "a sparse or nested tensor"),
        (lambda t: t.to("meta"), "a tensor without data"),
        (lambda t: [0.5], "list"),
        (lambda t: 0.5, "float"),
        (lambda t: None, "no tensor"),
        (lambda t: np.zeros(3), "no tensor"),
    ],
)
def test_names_a_tensor_that_cannot_be_taken(small, tmp_path, change, came):
    state = small().state_dict()
    state["output.weight"] = change(state["output.weight"])
    message = rf"1 mismatched: output.weight \(expected \[3, 8, 3, 3\] of torch.float32, got {came}\)"
    path = saved(tmp_path, state)
    with pytest.raises(UserError, match=f"(?s)m.pth: its tensors do not make a whole model.*{message}"):
        load_checkpoint(path)
    model = small()
    before = model.output.weight.clone()
    assert load_weights(model, path).mismatched == ["output.weight"]
    assert torch.equal(model.output.weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_rejects_weights_that_are_not_finite(small, tmp_path, value):
    state = {n: t.double() for n, t in randomised(small()).state_dict().items()}
    state["latent.blocks.0.attn.qkv.weight"][3, 2] = value
    model, path = small(), saved(tmp_path, state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for load in (load_checkpoint, lambda path: load_weights(model, path)):
        with pytest.raises(UserError, match="holds NaN or .* torch.float32 in 1 tensors: latent.blocks.0.attn.qkv.weight"):
            load(path)
    assert_same_weights(model, before)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("restormer_nano", n) for n in ("patch_embed.weight", "encoder_level2.blocks.0.attn.temperature")]
    + [("mamba_diffusion_nano", f"encoder_groups.0.blocks.0.ssm_forward.{n}") for n in ("A_log", "conv1d.weight")],
)
@pytest.mark.parametrize(("value", "came"), [(None, "none"), ("x", "str"), (torch.tensor(True), "a tensor of torch.bool")])
def test_names_the_tensor_that_a_models_sizes_need(tmp_path, name, lost, value, came):
    state = create_model(name, dim=8).state_dict() | {lost: value}
    with pytest.raises(UserError, match=f"m.pth: holds no (Restormer|MambaDiffusion): expected a tensor '{lost}', got {came}"):
        load_checkpoint(saved(tmp_path, {n: v for n, v in state.items() if v is not None}))


def test_sizes_too_large_to_build_are_refused_before_any_memory_is_taken(tmp_path):
    state = create_model("restormer_nano", dim=8).state_dict()
    for dim in (2**20, 2**40):
        state["patch_embed.weight"] = torch.zeros(()).expand(dim, 3, 3, 3)
        with pytest.raises(UserError, match="m.pth: (its tensors do not make a whole model|.*too large)"):
            load_checkpoint(saved(tmp_path, state))


# Anything at all: right, or refused in words of ours

INTERNAL = re.compile(r"\w+Error|tuple index|NoneType|has no attribute|subscriptable|unhashable|Traceback|0x[0-9a-f]{6}")


def outcome(path):
    """Loads a file in each way; only UserErrors may leave, and their words must not be Python's."""
    loads = load_checkpoint, read_metadata, lambda path: load_weights(create_model("restormer_nano", dim=8), path)
    for load in loads:
        try:
            load(path)
        except UserError as error:
            assert not INTERNAL.search(str(error)), str(error)


ODD = (
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.to(torch.int8),
    lambda t: t.bool(),
    lambda t: t.half(),
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t * torch.nan,
    lambda t: torch.zeros(()),
    lambda t: torch.zeros(0),
    lambda t: None,
    lambda t: 3,
    lambda t: [t],
    lambda t: {"a": t},
    lambda t: "text",
)


@pytest.mark.parametrize("seed", range(25))
def test_odd_state_dicts(tmp_path, seed):
    draw = random.Random(seed)
    name = draw.choice(["restormer_nano", "mamba_diffusion_nano"])
    state = dict(create_model(name, dim=8).state_dict())
    for _ in range(draw.choice([1, 2, 5])):
        key = draw.choice(list(state)[:12] + [n for n in state if n.endswith(("temperature", "A_log", "conv1d.weight"))])
        value = state.pop(key)
        if draw.random() < 0.8:
            key = draw.choice([key, key, key, f"{key}.x", f"module.{key}", f"model.{key}", "extra"])
            state[key] = draw.choice(ODD)(value) if isinstance(value, torch.Tensor) else value
    for _ in range(draw.randrange(3)):
        place = draw.choice(["params", "params_ema", "optimizer", "", 3, None, ("a",)])
        state = draw.choice([{place: state}, {place: state, "params": {}}, {f"net.{n}": v for n, v in state.items()}, [state]])
        if isinstance(state, list):
            break
    outcome(saved(tmp_path, state, _use_new_zipfile_serialization=draw.random() < 0.5))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_damaged_bytes(tmp_path, kind, seed):
    draw, model, path = random.Random(seed), create_model("restormer_nano", dim=8), tmp_path / f"m.{kind}"
    if kind == "safetensors":
        save_weights(path, model, {"epoch": 3})
    else:
        torch.save({"model": model.state_dict(), "psnr": np.float64(3)}, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 4, 30])):
        content[draw.randrange(draw.choice([64, 4000, len(content)]))] = draw.randrange(256)
    if draw.random() < 0.3:
        del content[draw.randrange(len(content)) :][: draw.randrange(40)]
    path.write_bytes(content)
    outcome(path)


HEADERS = ("null", "3", '"x"', "[" * 100_000, '{"model": 3, "overrides": {}, "metadata": {}}', '{"model": "restormer_nano"}')
OVERRIDES = ("[]", '[["dim", 8]]', *(f'{{"dim": {v}}}' for v in ("1e9", "10000000000000", "null", "[1]", '"a"', "-8", "true")))
BRIDGES = (
    "3",
    '"ab"',
    "[1]",
    '{"steps": 4}',
    *(
        f'{{"prediction": {p}, "noise_scale": {n}, "steps": {s}}}'
        for p, n, s in (
            ('"q"', "0.1", "4"),
            ('"x0"', '"a"', "4"),
            ('"x0"', "0.1", "-1"),
            ('"x0"', "0.1", '"q"'),
            ("[]", "0.1", "4"),
        )
    ),
)


@pytest.mark.parametrize(
    "header",
    HEADERS
    + tuple(f'{{"model": "restormer_nano", "overrides": {o}, "metadata": {{}}}}' for o in OVERRIDES)
    + tuple(f'{{"model": "restormer_nano", "overrides": {{"dim": 8}}, "metadata": {{"bridge": {b}}}}}' for b in BRIDGES),
    ids=lambda header: header[-60:],
)
def test_odd_headers(tmp_path, header):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(create_model("restormer_nano", dim=8).state_dict(), path, {"autohdr": header})
    with pytest.raises(UserError):
        load_checkpoint(path)
    outcome(path)


@pytest.mark.parametrize("path", ["", ".", "absent", "a\0b", "a" * 5000, os.devnull])
def test_odd_paths(path):
    with pytest.raises(UserError, match="cannot be read|is no checkpoint"):
        load_checkpoint(path)

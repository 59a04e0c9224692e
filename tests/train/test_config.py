from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autohdr.errors import UserError
from autohdr.train.checks import check_config
from autohdr.train.config import TrainConfig, dump_config, load_config, recipes

SETTINGS = {
    "restormer_384": {"size": 384, "batch_size": 2, "accumulate": 2, "lr": 1e-4, "warmup_epochs": 5, "epochs": 100},
    "restormer_896": {"size": 896, "batch_size": 1, "accumulate": 8, "lr": 5e-5, "warmup_epochs": 10, "epochs": 100},
    "restormer_384_pretrained": {"size": 384, "lr": 1e-5, "warmup_epochs": 10, "epochs": 150},
}
DECAY_AND_CLIP = {"restormer_384": (0.02, 1.0), "restormer_896": (0.02, 1.0), "restormer_384_pretrained": (0.05, 0.5)}


def test_every_recipe_is_known_here():
    others = ["demo", "mamba_demo", "mamba_diffusion_384", "nafnet_384", "restormer_384_enhanced"]
    others += ["restormer_progressive", "swinir_384"]
    assert recipes() == sorted([*others, *SETTINGS])


@pytest.mark.parametrize("name", SETTINGS)
def test_recipe(name):
    config = load_config(name)
    assert {key: getattr(config, key) for key in SETTINGS[name]} == SETTINGS[name]
    assert (config.weight_decay, config.clip) == DECAY_AND_CLIP[name]
    assert (config.model, config.resize, config.augment) == ("restormer_base", "squash", True)
    assert config.out == Path("runs") / name


def test_enhanced_recipe_differs_in_its_losses_alone():
    plain, enhanced = load_config("restormer_384"), load_config("restormer_384_enhanced")
    assert plain.losses == {"l1": 1.0} and enhanced.losses == {"l1": 1.0, "vgg": 0.1, "edge": 0.05, "ssim": 0.1}
    assert replace(enhanced, losses=plain.losses, out=plain.out) == plain


@pytest.mark.parametrize(("name", "model"), [("nafnet_384", "nafnet_32"), ("swinir_384", "swinir_light")])
def test_recipes_of_other_families_differ_in_their_model_alone(name, model):
    restormer, other = load_config("restormer_384"), load_config(name)
    assert replace(restormer, model=model, out=other.out) == other


def test_demo_recipe_is_for_a_cpu():
    config = load_config("demo")
    assert (config.model, config.precision, config.device) == ("restormer_nano", "float32", "cpu")


def test_mamba_recipe():
    config = load_config("mamba_diffusion_384")
    assert (config.model, config.objective, config.size, config.batch_size) == ("mamba_diffusion_large", "bridge", 384, 1)
    assert (config.lr, config.weight_decay, config.clip) == (2e-4, 0.01, 1.0) and config.warmup_epochs > 0


def test_pretrained_recipe_needs_weights(make_config):
    pretrained = load_config("restormer_384_pretrained")
    config = replace(make_config(), init_weights=pretrained.init_weights)
    with pytest.raises(UserError, match="init_weights: no such file: .*give one with --init-weights"):
        check_config(config)


def test_overrides_win():
    assert load_config("restormer_384", {"lr": 3.0}).lr == 3.0


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "my.toml").write_text('train_pairs = "data/train.jsonl"\nlr = 1\n')
    config = load_config(tmp_path / "my.toml")
    assert config.train_pairs == tmp_path / "data" / "train.jsonl"
    assert config.val_pairs is None
    assert isinstance(config.lr, float)
    assert config.out == Path("runs/my")


def test_dump_reads_back_to_the_same(tmp_path, make_config):
    config = make_config(out='a "quoted" näme 🏠\x7f\t', model_args={"dim": 8, "num_blocks": [1, 2, 3, 4], "norm_bias": False})
    (tmp_path / "config.toml").write_text(dump_config(config, "two\nlines"), encoding="utf-8")
    assert asdict(load_config(tmp_path / "config.toml")) == asdict(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1.0", "unknown key 'learning_rate'; expected one of .*lr"),
        ('epochs = "many"', "epochs: expected an integer, got 'many'"),
        ("epochs = 1.5", "epochs: expected an integer, got 1.5"),
        ("epochs = true", "epochs: expected an integer, got True"),
        ('lr = "fast"', "lr: expected a number, got 'fast'"),
        ("augment = 1", "augment: expected true or false, got 1"),
        ("model = 3", "model: expected a string, got 3"),
        ('resize = "stretch"', "resize: expected 'squash' or 'fit' or 'crop', got 'stretch'"),
        ("train_pairs = 3", "train_pairs: expected a path .*, got 3"),
        ("model_args = 3", "model_args: expected a table, got 3"),
        ('losses = "l1"', "losses: expected a table, got 'l1'"),
        ("epochs = ", "not valid TOML"),
    ],
)
def test_rejects_toml(tmp_path, text, message):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "my.toml")


def test_rejects_missing_config():
    with pytest.raises(UserError, match="expected a TOML file or one of demo, .*got 'restormer_385'"):
        load_config("restormer_385")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"size": 8}, "size: expected at least 16, got 8"),
        ({"clip": -1.0}, "clip: expected at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected at least 0, got nan"),
        ({"noise_scale": 0.0}, "noise_scale: expected a positive number, got 0.0"),
        ({"sample_steps": 0}, "sample_steps: expected at least 1, got 0"),
        ({"ema": 1.0}, "ema: expected less than 1, got 1.0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"workers": 100_000}, r"workers: expected at most \d+, got 100000"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"seed": 2**64}, f"seed: expected a number of 64 bits, less than 2\\*\\*64, got {2**64}"),
        ({"keep": 0}, "keep: expected at least 1, got 0"),
        ({"max_bad_steps": 0}, "max_bad_steps: expected at least 1, got 0"),
        ({"snapshot_every": 0}, "snapshot_every: expected at least 1, got 0"),
        ({"spike_window": 3}, "spike_window: expected at least 4, got 3"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"losses": {"l2": 1.0}}, "losses: unknown component 'l2'; expected one of l1, charbonnier, edge, ssim, vgg"),
        ({"losses": {"l1": 1.0, "vgg": -0.1}}, "losses: vgg: expected a number, at least 0, got -0.1"),
        ({"losses": {"l1": "much"}}, "losses: l1: expected a number, at least 0, got 'much'"),
        ({"losses": {"l1": True}}, "losses: l1: expected a number, at least 0, got True"),
        ({"losses": {"l1": float("nan")}}, "losses: l1: expected a number, at least 0, got nan"),
        ({"losses": {"l1": 0.0, "ssim": 0}}, "losses: expected at least one weight above 0, got {'l1': 0.0, 'ssim': 0}"),
        ({"losses": {}}, "losses: expected at least one weight above 0, got {}"),
        ({"warmup_epochs": -1.0}, "warmup_epochs: expected at least 0, got -1.0"),
        ({"resize": "fit"}, "batch_size: expected 1.*got 2"),
        ({"val_pairs": None}, "val_pairs: required; give --val-pairs PATH"),
        ({"train_pairs": Path("nowhere.jsonl")}, "train_pairs: no such file: nowhere.jsonl"),
        (
            {"train_pairs": Path("🏠/caf\udce9.jsonl")},
            r"train_pairs: expected a path in UTF-8, as config.toml is; got '🏠/caf\\udce9",
        ),
        ({"out": Path("caf\udce9")}, r"out: expected a path in UTF-8, as config.toml is; got '.*caf\\udce9'"),
    ],
)
def test_rejects_settings(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        check_config(make_config(**changes))


def test_accepts_many_workers_and_the_largest_seed(make_config):
    check_config(make_config(workers=64, seed=2**64 - 1))


@pytest.mark.parametrize("prediction", ["x0", "v", "noise"])
def test_a_bridge_takes_losses_of_photos_where_it_makes_photos(make_config, prediction):
    bridge = {"objective": "bridge", "prediction": prediction}
    check_config(make_config(**bridge, losses={"l1": 1.0, "charbonnier": 1.0}))
    config = make_config(**bridge, losses={"l1": 1.0, "vgg": 0.1, "edge": 0.05, "ssim": 0.1})
    if prediction == "x0":
        check_config(config)
    else:
        with pytest.raises(UserError, match=f"losses: vgg, edge, ssim: .* prediction = {prediction} makes no photos"):
            check_config(config)


def test_rejects_what_toml_cannot_hold():
    with pytest.raises(UserError, match="TOML cannot hold None"):
        dump_config(TrainConfig(model_args={"dim": None}))

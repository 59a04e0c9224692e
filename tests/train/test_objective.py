import math

import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.cli import main
from autohdr.enhance import enhance
from autohdr.errors import UserError
from autohdr.evaluate import count_macs
from autohdr.models import Sampler, create_model, load_checkpoint
from autohdr.train.checkpoint import load_state, save_state
from autohdr.train.loop import Loop, train
from autohdr.train.objective import Objective, parameter_groups
from autohdr.train.run import prepare

BRIDGE = {"model": "mamba_diffusion_nano", "model_args": {"dim": 8, "num_groups": 2}, "objective": "bridge", "sample_steps": 2}
SMALL_BRIDGE = BRIDGE | {"lr": 1e-3}


@pytest.mark.parametrize("prediction", ["x0", "v", "noise"])
def test_a_bridge_trains_and_comes_back_as_a_model_of_photos(make_config, pair_files, tmp_path, prediction):
    summary = train(make_config(**SMALL_BRIDGE, prediction=prediction, noise_scale=0.1, epochs=1))
    model = load_checkpoint(summary.out / "checkpoint_best.safetensors")
    assert isinstance(model, Sampler) and not model.training
    assert (model.bridge.prediction, model.bridge.noise_scale, model.steps) == (prediction, 0.1, 2)
    assert (model.config.name, model.metadata["epoch"]) == ("mamba_diffusion_nano", 1)
    assert math.isfinite(summary.best["val_psnr"])
    assert count_macs(model) > 0
    assert len(enhance([pair_files[1].parent / "0_src.png"], tmp_path / "enhanced", model, progress=False).written) == 1


def test_a_bridge_resumes_bitwise(make_config, monkeypatch):
    train(make_config("whole", **SMALL_BRIDGE))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        assert train(make_config("parts", **SMALL_BRIDGE)).interrupted
    train(make_config("parts", **SMALL_BRIDGE), resume=True)
    whole, parts = (load_state(make_config(run).out / STATE)["model"] for run in ("whole", "parts"))
    assert same(whole, parts)


def test_draws_depend_on_epoch_and_pair_alone(make_config):
    config = make_config(**SMALL_BRIDGE, prediction="noise")
    network = create_model(config.model, **config.model_args)
    objective, images = Objective(config, network), torch.rand(3, 3, 16, 16)
    together = objective.predict(network, images, images, 0, [4, 0, 2])[1]
    assert torch.equal(objective.predict(network, images[:1], images[:1], 0, [2])[1][0], together[2])
    assert not torch.equal(objective.predict(network, images[:1], images[:1], 1, [2])[1][0], together[2])
    assert not torch.equal(together[0], together[1])


def test_direct_and_bridge_are_one_flag(make_config):
    summary = train(make_config(**(SMALL_BRIDGE | {"objective": "direct"}), epochs=1))
    assert not isinstance(load_checkpoint(summary.out / "checkpoint_best.safetensors"), Sampler)


def test_refuses_a_bridge_of_a_network_without_time(make_config):
    config = make_config(objective="bridge")
    with pytest.raises(UserError, match="objective: a bridge needs a model with a time embedding; restormer_nano has none"):
        train(config)
    assert not config.out.exists()
    with pytest.raises(UserError, match="sample_steps: expected at most 1000, got 1001"):
        train(make_config(**(BRIDGE | {"sample_steps": 1001})))


@pytest.mark.parametrize("model", ["restormer_nano", "mamba_diffusion_nano", "restormer_official", "nafnet_nano", "swinir_nano"])
def test_only_matrices_and_convolutions_decay(model):
    with torch.device("meta"):
        network = create_model(model, **({"dual_attention": True} if "mamba" in model else {}))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in parameter_groups(network, 0.1))
    assert [group["weight_decay"] for group in parameter_groups(network, 0.1)] == [0.1, 0]
    assert decay | rest == set(names.values()) and not decay & rest
    scales = (
        "bias",
        "temperature",
        "A_log",
        ".D",
        ".beta",
        ".gamma",
        "gamma1",
        "gamma2",
        "gamma3",
        "dt_proj.weight",
        "relative_position_bias_table",
    )
    expected = {n for n in names.values() if n.endswith(scales) or ".norm" in n or n.startswith("norm")}
    assert rest == expected and expected


def test_float16_trains(make_config):
    summary = train(make_config(epochs=8, precision="float16"))
    state = load_state(summary.out / STATE)
    assert state["history"][-1]["train_l1"] < 0.6 * state["history"][0]["train_l1"]
    assert state["scaler"]["scale"] == 2.0**16
    assert {weight.dtype for weight in state["model"].values()} == {torch.float32}


def test_an_overflow_in_float16_skips_the_step_and_halves_the_scale(make_config):
    config = make_config(precision="float16")
    run = prepare(config)
    model, (first, second, _) = run.learner.model, (groups := run.batches.groups(0))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = run.batches.read(groups, 0)
    hook = model.output.weight.register_hook(lambda gradient: gradient * math.inf)
    result = run.step(first, batches, epoch=0, step=0, lr=1e-3)
    assert result.fault is None and result.norm == math.inf
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert run.learner.scaler.get_scale() == 2.0**15
    hook.remove()
    run.step(second, batches, epoch=0, step=1, lr=1e-3)
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_float16_resumes_with_its_scale(make_config):
    config = make_config(epochs=1, precision="float16")
    train(config)
    path = config.out / STATE
    state = load_state(path)
    save_state(path, state | {"scaler": state["scaler"] | {"scale": 8.0}})
    run = prepare(config, resume=True)
    Loop(run).resume()
    assert run.learner.scaler.get_scale() == 8.0


def test_steps_on_the_command_line(make_config, pair_files, tmp_path, capsys):
    direct, bridge = (train(make_config(o, **(SMALL_BRIDGE | {"objective": o}), epochs=1)).out for o in ("direct", "bridge"))
    photo, out = str(pair_files[1].parent / "0_src.png"), str(tmp_path / "enhanced")

    def run(folder, steps):
        weights = str(folder / "checkpoint_best.safetensors")
        return main(["enhance", photo, "--checkpoint", weights, "--out", out, "--steps", steps, "--on-exists", "overwrite"])

    assert [run(bridge, "1"), run(bridge, "0"), run(direct, "1")] == [0, 2, 2]
    assert "a checkpoint that was trained as a bridge" in capsys.readouterr().err

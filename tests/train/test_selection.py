"""Fine-tuning: what is frozen stays as it is, and what matches a pattern learns at a rate of its own."""

import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.errors import UserError
from autohdr.models import create_model
from autohdr.plan import OPTIMIZER, plan
from autohdr.train.checkpoint import load_state
from autohdr.train.checks import check_config
from autohdr.train.loop import train
from autohdr.train.objective import parameter_groups
from autohdr.train.run import prepare
from autohdr.train.selection import freeze

FROZEN = ["encoder*", "patch_embed*"]


def frozen(name):
    return name.startswith(("encoder", "patch_embed"))


@pytest.mark.parametrize("model", ["restormer_nano", "mamba_diffusion_nano"])
def test_a_frozen_networks_other_gradients_are_the_same(model):
    """Also where what is frozen lies within a block whose forward and backward pass are kernels of their own."""
    torch.manual_seed(0)
    network, source = create_model(model), torch.rand(1, 3, 16, 16)
    (network(source) - 0.5).abs().mean().backward()
    wanted = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    patterns = ["*norm*", "*conv*", "encoder*"] if model == "restormer_nano" else ["*A_log", "*proj*", "*conv*"]
    freeze(network, patterns)
    network.zero_grad()
    (network(source) - 0.5).abs().mean().backward()
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert 0 < len(trained) < len(wanted)
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (name not in trained or name not in wanted)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name])


def test_a_run_leaves_alone_what_is_frozen_and_goes_on_bitwise(make_config, monkeypatch):
    settings = {"freeze": FROZEN, "lr_groups": {"output*": 0.5}, "ema": 0.9, "batch_size": 3}
    run = prepare(make_config(**settings))
    start = {name: weight.detach().clone() for name, weight in run.learner.model.named_parameters()}
    trained = sum(weight.numel() for name, weight in start.items() if not frozen(name))
    assert f" parameters, {trained:,} of them trained, cpu" in run.describe()
    whole = train(make_config("whole", **settings))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        train(make_config("parts", **settings))
    train(make_config("parts", **settings), resume=True)
    states = [load_state(out / STATE) for out in (whole.out, make_config("parts").out)]
    assert same(*([state[key] for key in ("model", "ema", "optimizer", "rng")] for state in states))
    for weights in (states[0]["model"], states[0]["ema"]["model"]):
        assert {name for name, weight in start.items() if torch.equal(weights[name], weight)} == set(filter(frozen, start))
    assert not any(map(frozen, states[0]["optimizer"]["state"]))
    with pytest.raises(UserError, match="--resume: freeze: the run in .* has .*, got "):
        train(make_config("parts", **settings | {"freeze": []}), resume=True)


def test_groups_learn_at_their_own_rates(make_config):
    """The first step of AdamW moves each weight by its rate, whatever the gradient. The first pattern counts."""
    factors = {"output*": 0.25, "*output*": 8.0, "encoder_level1*": 2.0}
    run = prepare(make_config(lr_groups=factors, weight_decay=0.0, clip=0.0))
    before = {name: weight.detach().clone() for name, weight in run.learner.model.named_parameters()}
    groups = run.batches.groups(0)
    run.step(groups[0], run.batches.read(groups, 0), epoch=0, step=0, lr=1e-3)
    for name, weight in run.learner.model.named_parameters():
        factor = 0.25 if name.startswith("output") else 2.0 if name.startswith("encoder_level1") else 1.0
        assert abs(weight - before[name]).max().item() == pytest.approx(factor * 1e-3, rel=0.02), name


def test_no_group_is_empty_and_each_decays_or_not():
    network = create_model("restormer_nano")
    groups = parameter_groups(network, 0.1, {"output*": 0.5})
    assert [(group["weight_decay"], group["lr_factor"]) for group in groups] == [(0.1, 1.0), (0.1, 0.5), (0.0, 1.0)]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"freeze": ["encoder*", "decodr*"]},
            "freeze: expected patterns .*got 'decodr\\*', which none matches; .*begin with patch_embed, enc",
        ),
        ({"freeze": ["*"]}, r"freeze: expected at least one parameter to train; \* match all \d+"),
        ({"lr_groups": {"head*": 2.0}}, "lr_groups: expected patterns .*got 'head\\*', which none matches"),
        ({"freeze": FROZEN, "lr_groups": {"encoder*": 2.0}}, "lr_groups: .*got 'encoder\\*', which none matches"),
    ],
)
def test_rejects_patterns_before_anything_is_written(make_config, changes, message):
    config = make_config(**changes)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not config.out.exists()


@pytest.mark.parametrize("factor", [0, -1.0, True, "2", float("inf")])
def test_rejects_factors(make_config, factor):
    with pytest.raises(UserError, match="lr_groups: encoder.*: expected a number above 0, got "):
        check_config(make_config(lr_groups={"encoder*": factor}))


def test_the_plan_leaves_out_what_is_frozen():
    network = create_model("restormer_nano")
    freeze(network, ["encoder*"])
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    assert plan(network, 32, mode="training").parts[OPTIMIZER] == 2 * trained

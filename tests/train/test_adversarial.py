"""The adversarial loss: the discriminator against plain PyTorch, and runs with it: resumed, spoiled, taken back."""

import copy
import csv
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from runs import STATE, blank_curve, interrupt_at_step, patch_steps, same  # noqa: F401  blank_curve is a fixture
from test_guards import entries, everything, scale_sources
from torch import nn

from autohdr.errors import UserError
from autohdr.train import adversarial
from autohdr.train.adversarial import BETAS, LR, Adversary, Discriminator
from autohdr.train.checkpoint import load_state, previous
from autohdr.train.checks import check_config
from autohdr.train.config import LOSSES
from autohdr.train.distributed import Ranks
from autohdr.train.loop import train
from autohdr.train.rehearsal import rehearse

WITH = {"l1": 1.0, "adversarial": 0.01}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The discriminator of these runs has an eighth of the channels."""
    monkeypatch.setattr(adversarial, "WIDTH", 4)


@pytest.fixture
def adversary():
    torch.manual_seed(0)
    return Adversary(1.0, 1, torch.device("cpu"))


def images(batch=3, side=32):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(batch, 3, side, side, generator=generator) for _ in range(2))


def test_a_number_of_the_discriminator_sees_70_by_70_pixels():
    image = torch.rand(1, 3, 128, 128, requires_grad=True)
    numbers = Discriminator().eval()(image)
    assert numbers.shape == (1, 1, 14, 14)
    numbers[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_the_smallest_image():
    least = LOSSES["adversarial"]
    assert Discriminator()(torch.rand(1, 3, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        Discriminator()(torch.rand(1, 3, least - 1, least - 1))


def test_it_can_only_be_so_steep(adversary):
    """The spectral norm: each layer's matrix has the largest singular value 1, once the vectors have come to rest."""
    gradient = [torch.zeros_like(weight) for weight in adversary.network.parameters()]
    for _ in range(100):
        for weight, zero in zip(adversary.network.parameters(), gradient, strict=True):
            weight.grad = zero
        adversary.step(0.0, Ranks())
    for layer in [layer for layer in adversary.network if isinstance(layer, nn.Conv2d)]:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_a_step_is_plain_pytorchs(adversary):
    """Hinge losses, their gradients, and AdamW: a copy of the discriminator, trained by hand on whole batches."""
    plain, (output, target) = copy.deepcopy(adversary.network), images()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    for number in range(3):
        plain.train(number > 0)
        plain(target)  # one power iteration of the spectral norm, after each step
        plain.eval()
        output.requires_grad_()
        wanted = -plain(output).mean()
        (slope,) = torch.autograd.grad(wanted, output)
        numbers = plain(torch.cat((target, output.detach())))
        own = F.relu(1 - numbers[:3]).mean() + F.relu(1 + numbers[3:]).mean()
        optimizer.zero_grad()
        own.backward()
        optimizer.step()

        adversary.forget()
        loss, losses = adversary.judge(output, target, 0, 1.0)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(loss, output)[0], slope)
        torch.testing.assert_close(losses, {"adversarial": wanted.detach(), "discriminator": own.detach()})
        assert adversary.step(losses["discriminator"].item(), Ranks()) is None
        output = output.detach()
    for weight, expected in zip(adversary.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


def test_shares_add_up_to_the_step(adversary):
    output, target = images(4)
    gradients = []
    for parts in (((slice(4), 1.0),), ((slice(1), 0.25), (slice(1, 4), 0.75))):
        adversary.forget()
        for part, share in parts:
            adversary.judge(output[part], target[part], 0, share)
        gradients.append([weight.grad for weight in adversary.network.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_discriminator_that_learns_tells_the_two_apart(adversary):
    output, target = images()
    for _ in range(30):
        adversary.forget()
        _, losses = adversary.judge(output * 0.5, target, 0, 1.0)
        adversary.step(losses["discriminator"].item(), Ranks())
    assert losses["discriminator"] < 1.6  # 2 is what it has who cannot tell


def test_before_its_start_the_run_is_the_same_bit_by_bit(make_config):
    """And with a weight of 0: the discriminator learns and is in the logs, and changes nothing."""
    train(make_config("plain", epochs=1, ema=0.9))
    train(make_config("watched", epochs=1, ema=0.9, losses={"l1": 1.0, "adversarial": 0.0}))
    late = train(make_config("late", epochs=2, ema=0.9, losses=WITH, adversarial_start=2, warmup_epochs=0, log_every=1))
    plain, watched = (load_state(make_config(run).out / STATE) for run in ("plain", "watched"))
    for key in ("model", "ema", "optimizer"):
        assert same(plain[key], watched[key])
    assert "adversary" not in plain and plain["rng"].keys() == watched["rng"].keys()
    steps = entries(late.out, "step")
    assert [line["adversarial"] is None for line in steps] == [line["discriminator"] is None for line in steps]
    assert [line["discriminator"] is None for line in steps] == [True] * 3 + [False] * 3
    assert [line["loss"] == line["l1"] for line in steps] == [True] * 3 + [False] * 3
    for line in (late.out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    rows = list(csv.DictReader((late.out / "log.csv").open()))
    assert rows[0]["train_discriminator"] == "nan" and 1 < float(rows[1]["train_discriminator"]) < 3
    for line in steps[3:]:
        assert line["loss"] == pytest.approx(line["l1"] + 0.01 * line["adversarial"], rel=1e-5)


def test_resume_is_bitwise(make_config, monkeypatch):
    """In mid-epoch, after the discriminator has begun: its weights, moments and the spectral norm's vectors too."""
    settings = {"epochs": 2, "ema": 0.9, "losses": WITH, "adversarial_start": 2, "precision": "bfloat16"}
    train(make_config("whole", **settings))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 5)
        assert train(make_config("parts", **settings)).interrupted
    train(make_config("parts", **settings), resume=True)
    states = [load_state(make_config(run).out / STATE) for run in ("whole", "parts")]
    for key in ("model", "ema", "optimizer", "adversary", "guard"):
        assert same(states[0][key], states[1][key])
    before = load_state(previous(make_config("whole").out / STATE))
    assert not same(states[0]["adversary"], before["adversary"])
    assert any(name.endswith("_u") for name in states[0]["adversary"]["model"])


def test_a_bad_gradient_of_the_discriminator_skips_its_step_alone(make_config, monkeypatch, capsys):
    seen = {}

    def step(make, learner, number):
        before = [copy.deepcopy(learner.adversary.state_dict()), copy.deepcopy(learner.model.state_dict())]
        weight = next(learner.adversary.network.parameters())
        hook = weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf)) if number == 3 else None
        result = make()
        if hook:
            hook.remove()
        after = [learner.adversary.state_dict(), learner.model.state_dict()]
        seen[number] = same(before[0], after[0]), same(before[1], after[1])
        return result

    patch_steps(monkeypatch, step)
    summary = train(make_config(losses=WITH, log_every=1))
    assert [number for number, (discriminator, _) in seen.items() if discriminator] == [3]
    assert not any(model for _, model in seen.values()) and not summary.lost
    (entry,) = entries(summary.out, "discriminator skipped")
    assert (entry["step"], entry["epoch"], len(entry["sources"])) == (3, 1, 2)
    assert re.search("step 3: the discriminator's loss or gradient is not finite .*: its step skipped", capsys.readouterr().out)
    assert all(value.isfinite().all() for value in load_state(summary.out / STATE)["adversary"]["model"].values())


def test_two_bad_steps_take_the_discriminator_back_too(make_config, monkeypatch):
    """Bit for bit to the state kept; a bad step of the network leaves the discriminator out as well."""
    scale_sources(monkeypatch, {9, 10}, 100)
    states, vectors = {}, {}

    def step(make, learner, number):
        states[number - 1] = everything(learner)
        vectors[number - 1] = len(learner.adversary.tensors())
        return make()

    patch_steps(monkeypatch, step)
    out = train(make_config(epochs=4, losses=WITH, spike_window=4, snapshot_every=4)).out
    (entry,) = entries(out, "rolled back")
    assert (entry["step"], entry["to"]) == (10, 5)
    assert same(states[10], states[5]) and not same(states[8][-vectors[8] :], states[5][-vectors[5] :])


def test_ruined_weights_of_the_discriminator_are_put_back(make_config, monkeypatch):
    """The network's loss is then not finite, and the second such step goes back."""

    def ruin(make, learner, number):
        if number == 8:
            for weight in learner.adversary.network.parameters():
                weight.data.fill_(math.nan)
        return make()

    patch_steps(monkeypatch, ruin)
    summary = train(make_config(epochs=4, losses=WITH, save_every=1))
    assert summary.lost == {"a loss that is not finite": 2, "going back after two bad steps in a row": 6}
    assert all(value.isfinite().all() for value in load_state(summary.out / STATE)["adversary"]["model"].values())


def test_refuses(make_config):
    with pytest.raises(UserError, match="adversarial_start: expected at most 2, the last epoch, .*; got 3"):
        train(make_config(losses=WITH, adversarial_start=3))
    with pytest.raises(UserError, match="adversarial_start: expected at least 1, got 0"):
        train(make_config(losses=WITH, adversarial_start=0))
    with pytest.raises(UserError, match="expected training pairs .* at least 24 pixels, as the loss adversarial needs"):
        train(make_config(losses=WITH, size=16))
    bridge = {"model": "mamba_diffusion_nano", "model_args": {"dim": 8, "num_groups": 2}, "objective": "bridge"}
    with pytest.raises(UserError, match="losses: adversarial: expected l1 and charbonnier alone"):
        train(make_config(**bridge, prediction="v", losses=WITH))
    check_config(make_config(adversarial_start=3))  # of no concern without the loss


def test_a_rehearsal_has_the_discriminator_in_it(make_config, monkeypatch):
    seen = []
    monkeypatch.setattr(Adversary, "step", lambda self, loss, ranks: seen.append(loss))
    rehearse(make_config(losses=WITH, adversarial_start=2))
    assert len(seen) == 2 and all(map(math.isfinite, seen))

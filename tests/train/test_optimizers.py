"""AdamW, Adan and Muon in the trainer: what each weight gets, and that their state is in the checkpoints."""

import importlib.util

import pytest
import torch
from runs import STATE, TINY, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture
from test_loop import outcome

from autohdr.errors import UserError
from autohdr.models import create_model
from autohdr.train.checkpoint import load_state
from autohdr.train.checks import check_config
from autohdr.train.loop import train
from autohdr.train.objective import parameter_groups
from autohdr.train.optimizers import make_optimizer

OTHERS = ["adan", "muon"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_in_two_parts(make_config, monkeypatch, name):
    """Bitwise, in mid-epoch; and it learns."""
    settings = {"optimizer": name, "epochs": 3, "weight_decay": 0.1, "ema": 0.9, "freeze": ["encoder_level1*"]}
    whole = train(make_config("whole", **settings))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 4)
        train(make_config("parts", **settings))
    train(make_config("parts", **settings), resume=True)
    assert same(outcome(whole.out), outcome(make_config("parts").out))
    losses = [row["train_l1"] for row in load_state(whole.out / STATE)["history"]]
    assert losses[-1] < losses[0]


def test_muon_takes_what_mixes_channels():
    """As torch.optim.Muon does it, as matrices, in half precision. The rest gets torch's AdamW."""
    model, plain = (create_model("restormer_nano", **TINY) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    optimizer = make_optimizer("muon", parameter_groups(model, 0.1), 1e-3, fused=False)
    reference = make_optimizer("adamw", parameter_groups(plain, 0.1), 1e-3, fused=False)
    generator, kinds = torch.Generator().manual_seed(0), {True: 0, False: 0}
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    before = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    optimizer.step()
    reference.step()
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        muon = "momentum_buffer" in optimizer.state[weight]
        kinds[muon] += 1
        assert muon == (weight.dim() > 1 and weight.shape[0] > 1 and weight.shape[1] > 1), name
        if muon:
            other = torch.nn.Parameter(before[name].flatten(1).clone())
            other.grad = plain.get_parameter(name).grad.flatten(1)
            torch.optim.Muon([other], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
            moved = (other - before[name].flatten(1)).norm()
            assert (weight.flatten(1) - other).norm() < 0.03 * moved, name
        else:
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-7)
    assert min(kinds.values()) > 10


def test_a_branch_of_another_optimiser_begins_without_moments(make_config):
    parent = train(make_config("parent")).out
    assert train(make_config("tuned", branch=parent, optimizer="adan", epochs=3)).epochs == 3
    moments = load_state(make_config("tuned").out / STATE)["optimizer"]["state"]
    assert all("previous_grad" in state for state in moments.values())


def test_refuses_what_it_cannot_have(make_config, monkeypatch):
    with pytest.raises(UserError, match="optimizer: expected adamw with parallel = fsdp, got 'muon'"):
        check_config(make_config(optimizer="muon", parallel="fsdp"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer: adan needs pytorch_optimizer.*pip install pytorch_optimizer"):
        check_config(make_config(optimizer="adan"))

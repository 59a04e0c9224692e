import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture
from torch import nn

from autohdr import metrics
from autohdr.data.pairs import PairDataset, read_pairs
from autohdr.models import load_checkpoint
from autohdr.train.checkpoint import load_state
from autohdr.train.ema import Average
from autohdr.train.loop import train


def test_the_average_is_the_recurrence():
    network = nn.Linear(3, 2)
    average = Average(network, 0.5)
    expected = network.weight.detach().double()
    for step in range(1, 20):
        with torch.no_grad():
            network.weight += step
        average.update()
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * network.weight.detach().double()
    torch.testing.assert_close(average.tensors[0].double(), expected, rtol=1e-5, atol=0)


def test_the_weights_come_back_bit_for_bit():
    network = nn.Linear(3, 2)
    average = Average(network, 0.9)
    with torch.no_grad():
        network.weight.mul_(3)
    own, averaged = network.weight.clone(), average.tensors[0].clone()
    assert not torch.equal(own, averaged)
    with pytest.raises(ZeroDivisionError), average.applied():
        assert torch.equal(network.weight, averaged)
        raise ZeroDivisionError
    assert torch.equal(network.weight, own) and torch.equal(average.tensors[0], averaged)


def test_validation_and_the_files_of_weights_are_of_the_average(make_config, pair_files):
    summary = train(make_config(ema=0.9, epochs=3))
    state = load_state(summary.out / STATE)
    assert state["ema"]["updates"] == 9 and not same(state["ema"]["model"], state["model"])
    assert same(load_checkpoint(summary.out / "checkpoint_last.safetensors").state_dict(), state["ema"]["model"])
    model = load_checkpoint(summary.out / "checkpoint_best.safetensors")
    with torch.no_grad():
        samples = [(item["src"][None], item["tar"][None]) for item in PairDataset(read_pairs(pair_files[1]), 32)]
        values = [metrics.psnr(model(source).clamp(0, 1), target).item() for source, target in samples]
    torch.testing.assert_close(summary.best["val_psnr"], sum(values) / len(values), rtol=1e-5, atol=0)


def test_it_does_not_touch_training(make_config):
    train(make_config("with", ema=0.9))
    train(make_config("without"))
    with_, without = (load_state(make_config(run).out / STATE) for run in ("with", "without"))
    assert same(with_["model"], without["model"]) and same(with_["optimizer"], without["optimizer"])

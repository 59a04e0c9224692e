"""Training with CUDA graphs, through the stand-in of tests/recorded_graphs.py."""

import pytest
import torch
from recorded_graphs import recorded  # noqa: F401  a fixture
from runs import STATE, blank_curve  # noqa: F401  blank_curve is a fixture

from autohdr.errors import UserError
from autohdr.models.graphs import REPEATS
from autohdr.train.checkpoint import load_state
from autohdr.train.distributed import Ranks
from autohdr.train.learner import Learner
from autohdr.train.loop import train


def assert_near(run, plain):
    for name, weight in load_state(plain / STATE)["ema"]["model"].items():
        torch.testing.assert_close(load_state(run / STATE)["ema"]["model"][name], weight, msg=name)


def test_a_run_ends_where_it_ends_without(make_config, recorded):  # noqa: F811
    """Gradients of several batches and a last one alone, clipped; an average, a validation after each epoch, and another size."""
    stages = [{"epochs": 3, "size": 24}, {"epochs": 3}]
    settings = {"epochs": 6, "stages": stages, "accumulate": 2, "ema": 0.9, "clip": 0.1}
    plain = train(make_config("plain", **settings)).out
    assert not recorded
    run = train(make_config("graphs", cuda_graphs=True, **settings)).out
    assert [graph.replays for graph in recorded] == [2 + 9 - REPEATS] * 4  # forward and backward of each stage
    assert_near(run, plain)


def test_a_smaller_last_batch_is_plain(make_config, recorded):  # noqa: F811
    settings = {"epochs": 5, "batch_size": 4, "ema": 0.5}
    plain = train(make_config("plain", **settings)).out
    run = train(make_config("graphs", cuda_graphs=True, **settings)).out
    assert not recorded  # of 4 and of 2 pairs in turn
    assert_near(run, plain)


def test_a_run_without_a_gpu_of_its_own_is_refused(make_config):
    with pytest.raises(UserError, match="cuda_graphs: expected a GPU, got device 'cpu'"):
        train(make_config(cuda_graphs=True))
    with pytest.raises(UserError, match="cuda_graphs: expected one process, got 2"):
        Learner(make_config(cuda_graphs=True), Ranks(count=2))
    with pytest.raises(UserError, match="cuda_graphs: expected compile = false"):
        train(make_config(cuda_graphs=True, compile=True))

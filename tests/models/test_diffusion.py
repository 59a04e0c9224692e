import math

import pytest
import torch
from torch import nn

from autohdr.models.diffusion import STEPS, Bridge, Sampler, cosine_schedule
from autohdr.models.network import Network, NetworkConfig

PREDICTIONS = ("x0", "v", "noise")
BETAS, KEPT = cosine_schedule()


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_for(image, seed=9):
    return torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=image.dtype)


@pytest.fixture
def pair():
    """Target, source, t and noise of six images, from the first step to the last."""
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    target, source = images(6, 3, 5, 4), images(6, 3, 5, 4, seed=1) * 0.3
    return target, source, t, noise_for(target)


class Oracle(nn.Module):
    """A network that knows the target, and counts its calls."""

    def __init__(self, bridge, target, source):
        super().__init__()
        self.bridge, self.target, self.source, self.times = bridge, target, source, []

    def forward(self, x, t):
        self.times.append(t[0].item())
        kept = KEPT[t][:, None, None, None]
        added = (x - self.source - kept.sqrt() * (self.target - self.source)) / (1 - kept).sqrt()
        wanted = self.bridge.wanted(self.target, self.source, t, added / self.bridge.noise_scale)
        return wanted if self.bridge.prediction == "x0" else x + wanted


class Darker(Network):
    """A network whose output depends on all it is given."""

    def __init__(self):
        super().__init__(NetworkConfig("darker"))

    def forward(self, x, t):
        return x * 0.9 - t[:, None, None, None] * 1e-4


@pytest.mark.parametrize("step", [0, 1, 499, 900])
def test_schedule_is_the_papers_formula(step):
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert KEPT[step].item() == pytest.approx(f(step + 1) / f(0), rel=1e-9)
    assert BETAS[step].item() == pytest.approx(1 - f(step + 1) / f(step), rel=1e-6)


def test_schedule_falls_to_almost_nothing():
    assert len(BETAS) == len(KEPT) == STEPS == 1000
    assert BETAS[-1] == 0.999 and BETAS.min() > 0
    assert KEPT[0] > 0.9999 and 0 < KEPT[-1] < 1e-8
    assert (KEPT.diff() < 0).all()


def test_marginals():
    """Mean and standard deviation of x_t over many draws of the noise."""
    bridge, t = Bridge(noise_scale=0.2), torch.tensor([300])
    target, source = images(1, 3, 2, 2), images(1, 3, 2, 2, seed=1)
    noise = noise_for(torch.zeros(20_000, 3, 2, 2, dtype=torch.float64))
    x = bridge.diffuse(target.expand_as(noise), source.expand_as(noise), t.expand(20_000), noise)
    torch.testing.assert_close(x.mean(0, keepdim=True), source + KEPT[300].sqrt() * (target - source), atol=0.01, rtol=0)
    torch.testing.assert_close(x.std(0), (0.2 * (1 - KEPT[300]).sqrt()).expand(3, 2, 2), atol=0.01, rtol=0)


def test_ends_at_the_target_and_at_the_source(pair):
    target, source, _, noise = pair
    bridge = Bridge()
    first, last = (torch.full((6,), t) for t in (0, 999))
    torch.testing.assert_close(bridge.diffuse(target, source, first, noise), target, atol=0.01, rtol=0)
    torch.testing.assert_close(bridge.diffuse(target, source, last, noise), source + 0.05 * noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_split_inverts_diffuse(pair, prediction):
    target, source, t, noise = pair
    bridge = Bridge(prediction, noise_scale=0.3)
    x = bridge.diffuse(target, source, t, noise)
    start, added = bridge.split(bridge.wanted(target, source, t, noise), x, source, t)
    torch.testing.assert_close(start, target, atol=1e-9, rtol=0)
    torch.testing.assert_close(added, noise, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_split_of_any_prediction_makes_x_again(pair, prediction):
    _, source, t, noise = pair
    bridge, x = Bridge(prediction), images(6, 3, 5, 4, seed=2)
    start, added = bridge.split(noise, x, source, t)
    torch.testing.assert_close(bridge.diffuse(start, source, t, added), x, atol=1e-9, rtol=1e-9)


def test_a_black_source_makes_it_the_usual_process(pair):
    target, source, t, noise = pair
    bridge, kept = Bridge("v", noise_scale=1.0), KEPT[t][:, None, None, None]
    black = torch.zeros_like(source)
    torch.testing.assert_close(bridge.diffuse(target, black, t, noise), kept.sqrt() * target + (1 - kept).sqrt() * noise)
    torch.testing.assert_close(bridge.wanted(target, black, t, noise), kept.sqrt() * noise - (1 - kept).sqrt() * target)


def test_levels_are_float32_for_half_precision_images(pair):
    target, source, t, noise = (x.bfloat16() if x.is_floating_point() else x for x in pair)
    assert Bridge().diffuse(target, source, t, noise).dtype == torch.float32


def test_example_is_what_diffuse_and_wanted_say():
    bridge, target, source = Bridge("v"), images(64, 3, 2, 2).float(), images(64, 3, 2, 2, seed=1).float()
    x, t, wanted = bridge.example(target, source, torch.Generator().manual_seed(5))
    again = bridge.example(target, source, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip((x, t, wanted), again, strict=True))
    assert t.min() >= 0 and t.max() < STEPS and len(t.unique()) > 32
    start, added = bridge.split(wanted, x, source, t)
    torch.testing.assert_close(start, target, atol=1e-4, rtol=0)
    assert added.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predict_takes_the_networks_difference(prediction):
    x, t = images(2, 3, 4, 4), torch.tensor([3, 700])
    identity = Bridge(prediction).predict(lambda x, t: x, x, t)
    assert torch.equal(identity, x if prediction == "x0" else torch.zeros_like(x))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_sampling_with_an_oracle_gives_the_target(prediction, steps):
    target, source = images(2, 3, 5, 4), images(2, 3, 5, 4, seed=1)
    bridge = Bridge(prediction)
    oracle = Oracle(bridge, target, source)
    torch.testing.assert_close(bridge.sample(oracle, source, steps), target, atol=1e-6, rtol=0)
    assert len(oracle.times) == steps == len(set(oracle.times))
    assert oracle.times[0] == 999 and oracle.times == sorted(oracle.times, reverse=True)


def test_one_step_is_one_call_at_the_source():
    source = images(2, 3, 5, 4)
    calls = []

    def network(x, t):
        calls.append((x, t))
        return x * 0.5

    out = Bridge().sample(network, source, steps=1, seed=3)
    ((x, t),) = calls
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(x, source + 0.05 * noise)
    assert t.tolist() == [999, 999] and torch.equal(out, (x * 0.5).clamp(0, 1))


def test_a_network_that_predicts_v_0_leaves_the_source():
    source = images(1, 3, 5, 4)
    torch.testing.assert_close(Bridge("v").sample(lambda x, t: x, source, steps=1), source, atol=1e-4, rtol=0)


def test_each_step_follows_ddim():
    """Two steps spelt out in the coordinates of the paper."""
    source, network, bridge = images(1, 3, 5, 4) * 0.8 + 0.1, Darker(), Bridge(noise_scale=0.01)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0)).double()
    a, b = KEPT[999].sqrt(), KEPT[499].sqrt()
    x = source + 0.01 * noise
    start = network(x, torch.tensor([999])).clamp(0, 1)
    added = (x - source - a * (start - source)) / (1 - a**2).sqrt()
    x = source + b * (start - source) + (1 - b**2).sqrt() * added
    torch.testing.assert_close(bridge.sample(network, source, steps=2), network(x, torch.tensor([499])).clamp(0, 1))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_are_fixed_by_the_seed(prediction):
    source, bridge = images(2, 3, 5, 4), Bridge(prediction)
    torch.manual_seed(1)
    first = bridge.sample(Darker(), source, 4, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, bridge.sample(Darker(), source, 4, seed=7))
    assert not torch.equal(first, bridge.sample(Darker(), source, 4, seed=8))
    assert first.isfinite().all() and first.min() >= 0 and first.max() <= 1 and not first.requires_grad


def test_sampler_is_the_bridge_as_a_module():
    source, bridge = images(1, 3, 5, 4), Bridge()
    assert torch.equal(Sampler(Darker(), bridge, 4, seed=2)(source), bridge.sample(Darker(), source, 4, seed=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "eps"}, "prediction must be 'x0', 'v' or 'noise', got 'eps'"),
        ({"noise_scale": 0}, "noise_scale must be a number above 0, got 0"),
        ({"noise_scale": math.nan}, "noise_scale must be a number above 0, got nan"),
    ],
)
def test_rejects_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Bridge(**settings)


@pytest.mark.parametrize("steps", [0, 1001])
def test_rejects_an_impossible_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be 1 to 1000, got {steps}"):
        Bridge().sample(Darker(), images(1, 3, 2, 2), steps)

"""CUDA graphs of networks, through a stand-in that records and replays on the CPU; tests/kernels/test_gpu.py has real ones."""

import warnings

import pytest
import torch
from recorded_graphs import RecordedGraph, recorded  # noqa: F401  recorded is a fixture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autohdr.errors import UserError
from autohdr.models import create_model
from autohdr.models.graphs import REPEATS, Graphed

CPU = torch.device("cpu")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, image):
        return image + self.second(self.first(image).tanh())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Convolutions()


@pytest.fixture
def restormer():
    torch.manual_seed(0)
    settings = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0, "num_heads": [1, 1, 1, 1]}
    return create_model("restormer_nano", **settings)


def photos(count, height=16, width=24, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 3, height, width, generator=generator) for _ in range(count)]


def gradients(network, called, image, precision=torch.float32):
    """[output, every gradient], as a step takes them."""
    network.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = called(image)
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in network.parameters())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_forward_is_replayed_once_a_shape_repeats(network, recorded):  # noqa: F811
    graphed = Graphed(network, CPU)
    images = photos(REPEATS + 4)
    with torch.inference_mode():
        outputs = [graphed(image) for image in images]
        assert len(recorded) == 1 and recorded[0].replays == 2 + 4  # twice to compare
        assert same(outputs, [network(image) for image in images])  # none was overwritten by a later replay


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["network", "restormer"])
def test_training_steps_are_replayed_and_follow_the_weights(request, recorded, name, precision):  # noqa: F811
    network = request.getfixturevalue(name)
    graphed, optimizer = Graphed(network, CPU), torch.optim.AdamW(network.parameters(), lr=1e-2)
    for number, image in enumerate(photos(REPEATS + 3)):
        expected = [t.clone() for t in gradients(network, network, image, precision)]
        for actual, wanted in zip(gradients(network, graphed, image, precision), expected, strict=True):
            assert (actual - wanted).norm() <= 1e-4 * wanted.norm(), number
        optimizer.step()
    assert [graph.replays for graph in recorded] == [5, 5]  # forward and backward


def test_gradients_add_up_over_replays(network, recorded):  # noqa: F811
    graphed, images = Graphed(network, CPU), photos(REPEATS + 3)
    sums = []
    for called in (network, graphed):
        for image in images[:REPEATS]:
            called(image)
        network.zero_grad()
        for image in images[REPEATS:]:
            called(image).square().mean().backward()
        sums.append([p.grad for p in network.parameters()])
    assert len(recorded) == 2
    for actual, expected in zip(sums[1], sums[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_another_autocast_is_another_kind(network, recorded):  # noqa: F811
    graphed = Graphed(network, CPU)
    for image in photos(REPEATS + 1):
        gradients(network, graphed, image, torch.bfloat16)
    assert same(gradients(network, graphed, image), gradients(network, network, image))
    assert [graph.replays for graph in recorded] == [3, 3]


def test_a_graph_of_inference_mode_is_for_that_alone(network, recorded):  # noqa: F811
    """Outside of it no copy may go into what it has allocated."""
    graphed, images = Graphed(network, CPU), photos(REPEATS + 2)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert same([graphed(image) for image in images], [network(image) for image in images])
    assert len(recorded) == 3


def test_one_graph_at_a_time_of_what_repeats(network, recorded):  # noqa: F811
    graphed = Graphed(network, CPU)
    (wide,), (tall,), (odd,) = photos(1), photos(1, 24, 16), photos(1, batch=2)
    for _ in range(2 * REPEATS):
        gradients(network, graphed, wide)
        gradients(network, graphed, tall)
    assert not recorded
    for _ in range(REPEATS + 1):
        gradients(network, graphed, wide)
    gradients(network, graphed, odd)  # a last batch, after which the graph is still there
    gradients(network, graphed, wide)
    assert [graph.replays for graph in recorded] == [4, 4]
    network.eval()
    with torch.no_grad():  # which needs the memory
        assert torch.equal(graphed(tall), network(tall))
    network.train()
    gradients(network, graphed, wide)
    assert graphed._graph is None and len(recorded) == 2
    for _ in range(REPEATS + 1):
        gradients(network, graphed, tall)
    assert len(recorded) == 4 and recorded[0].replays == 4


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("tanh", "what the network adds to the image"),
        ("tanh_backward", "the gradient of first.weight"),
        ("convolution_backward", "the gradient of first.weight"),
    ],
)
def test_a_wrong_replay_is_found_and_not_used(network, recorded, monkeypatch, broken, reason):  # noqa: F811
    graphed, images = Graphed(network, CPU), photos(REPEATS + 3)
    monkeypatch.setattr(RecordedGraph, "broken", broken)
    for image in images[:REPEATS]:
        graphed(image)
    with pytest.warns(UserWarning, match=rf"cuda_graphs: going on without, as at \[1, 3, 16, 24\] in float32: {reason}"):
        first = gradients(network, graphed, images[-3])
    assert same([t.clone() for t in first], gradients(network, network, images[-3]))
    replays = [graph.replays for graph in recorded]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in images[-2:]:
            gradients(network, graphed, image)
    assert [graph.replays for graph in recorded] == replays


class Waits(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return image * self.weight if image.sum().item() else image


class Counts(nn.Module):
    """A pass that adds to what the pass before left."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, image):
        self.count += 1
        return image + self.weight * self.count


def test_what_cannot_be_captured_goes_on_without(recorded):  # noqa: F811
    for network, reason in ((Waits(), "operation not permitted when stream is capturing$"), (Counts(), "what the network adds")):
        graphed = Graphed(network, CPU)
        with torch.no_grad():
            for image in photos(REPEATS):
                graphed(image)
            with pytest.warns(UserWarning, match=reason):
                graphed(image)


def test_a_batch_that_is_not_finite_says_nothing_of_the_graph(network, recorded):  # noqa: F811
    graphed, images = Graphed(network, CPU), photos(2 * REPEATS)
    with torch.no_grad():
        for image in images[:REPEATS]:
            graphed(image)
        assert graphed(images[0] * torch.nan).isnan().all() and not recorded
        for image in images:
            graphed(image)
    assert len(recorded) == 1


def test_a_backward_pass_too_late_or_twice_is_refused(network, recorded):  # noqa: F811
    graphed, images = Graphed(network, CPU), photos(REPEATS + 2)
    for image in images[:-1]:
        early = graphed(image)
    graphed(images[-1])
    with pytest.raises(RuntimeError, match="a later pass has overwritten what this backward pass needs"):
        early.sum().backward()
    late = graphed(images[-1]).sum()
    late.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a later pass has overwritten"):
        late.backward()


def test_frozen_weights_and_images_with_gradients(network, recorded):  # noqa: F811
    graphed = Graphed(network, CPU)
    network.first.requires_grad_(False)
    for image in photos(REPEATS + 1):
        gradients(network, graphed, image)
    assert len(recorded) == 2
    image.requires_grad_()
    expected = torch.autograd.grad(network(image).sum(), image)
    assert same(torch.autograd.grad(graphed(image).sum(), image), expected)
    assert [graph.replays for graph in recorded] == [3, 3]


def test_a_network_on_a_cpu_is_refused(network):
    with pytest.raises(UserError, match="cuda_graphs: expected a GPU, got device 'cpu'"):
        Graphed(network, CPU)


class FromTheHost(TorchDispatchMode):
    """The calls that take a tensor on the CPU to another device, and so can't be captured."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **kwargs or {})
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if function.name() in ("aten::_to_copy", "aten::copy_") and "cpu" in devices and "meta" in made:
            self.calls.append(function.name())
        return out


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("restormer_nano", "nafnet_nano", "swinir_nano", "mamba_diffusion_nano", "lite")),
        ("mamba_diffusion_nano", {"time_embedding": True}),
    ],
)
def test_no_family_s_passes_need_the_host(name, settings):
    """On the meta device, which has no values to wait for and no memory that is the CPU's."""
    with torch.device("meta"):
        network, image, time = create_model(name, **settings), torch.empty(1, 3, 64, 48), torch.zeros(1, dtype=torch.int64)
    with FromTheHost() as found:
        output = network(image, time) if settings else network(image)
        output.sum().backward()
    assert not found.calls and output.shape == image.shape
    with FromTheHost() as found:
        image + torch.tensor([0.5]).to("meta")
    assert found.calls

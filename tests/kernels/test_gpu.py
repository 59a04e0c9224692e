"""What only a GPU can show: CUDA graphs of ops and of networks, the caller's stream, and the tensors' device."""

import pytest
import torch
from backend import BACKEND, DEVICE
from calls import call as call_of

from autohdr.kernels import OPS, backends, set_backend
from autohdr.models import create_model
from autohdr.models.graphs import REPEATS, ROUNDING, Graphed

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


@pytest.fixture(params=OPS)
def call(request):
    """(function, tensors, gradient of its result) of each op that the backend has."""
    if backends(request.param)[BACKEND] != "available":
        pytest.skip(backends(request.param)[BACKEND])
    return call_of(request.param, "LARGE")


def results(function, tensors, dy):
    """[y, every gradient]."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_cuda_graph(call):
    """Forward and backward captured once, replayed on other values in the same tensors."""
    function, tensors, dy = call
    expected = results(function, tensors, dy)
    static, static_dy = [torch.zeros_like(t) for t in tensors], torch.zeros_like(dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(function, static, static_dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(function, static, static_dy)
    for into, value in zip([*static, static_dy], [*tensors, dy], strict=True):
        into.copy_(value)
    for _ in range(2):  # the second time over what the first one left
        graph.replay()
        assert_equal(captured, expected)


def test_current_stream(call):
    """The inputs come to be on the caller's stream, long after the host has gone on: on another stream they would be NaN yet."""
    function, tensors, dy = call
    expected = results(function, tensors, dy)
    late, late_dy = [torch.full_like(t, torch.nan) for t in tensors], torch.full_like(dy, torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for into, value in zip([*late, late_dy], [*tensors, dy], strict=True):
            into.copy_(value)
        actual = results(function, late, late_dy)
    side.synchronize()
    assert_equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_device_of_the_tensors(call):
    function, tensors, dy = call
    expected = results(function, tensors, dy)
    with torch.cuda.device(0):
        actual = results(function, [t.to("cuda:1") for t in tensors], dy.to("cuda:1"))
    assert all(a.device.index == 1 for a in actual)
    assert_equal([a.to(e.device) for a, e in zip(actual, expected, strict=True)], expected)


@pytest.fixture
def network():
    set_backend(BACKEND)
    settings = {"dim": 16, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}
    yield create_model("restormer_nano", **settings).to(DEVICE, memory_format=torch.channels_last)
    set_backend("auto")


def images(count):
    return [torch.rand(2, 3, 64, 48, device=DEVICE).contiguous(memory_format=torch.channels_last) for _ in range(count)]


def forward(network, called, image, half):
    """[what the network adds to the image]."""
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, half):
        return [called(image) - image]


def training_step(network, called, image, half):
    """[the same, every gradient]."""
    network.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, half):
        output = called(image)
    (output - 0.5).abs().mean().backward()
    return [output.detach() - image, *(weight.grad.clone() for weight in network.parameters())]


def assert_near(actual, expected):
    """Some of PyTorch's own kernels add up in another order in each call."""
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= ROUNDING * e.norm()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("passes", [forward, training_step])
def test_a_whole_network_is_a_cuda_graph(network, passes, half):
    graphed, optimizer = Graphed(network, torch.device(DEVICE)), torch.optim.SGD(network.parameters(), lr=1e-2)
    for image in images(REPEATS + 4):
        assert_near(passes(network, graphed, image, half), passes(network, network, image, half))
        if passes is training_step:
            optimizer.step()
    assert graphed._graph


@pytest.mark.parametrize("passes", [forward, training_step])
def test_reduce_overhead(network, passes):
    """torch.compile's own CUDA graphs. In float32: it rounds to bfloat16 less often."""
    torch.compiler.reset()
    compiled = torch.compile(network, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for image in images(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(passes(network, compiled, image, False), passes(network, network, image, False))

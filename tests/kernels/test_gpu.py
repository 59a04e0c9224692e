"""What only a GPU can show: capture into CUDA graphs, the caller's stream, and the tensors' device."""

import pytest
import torch
from backend import BACKEND, DEVICE
from calls import call as call_of

from autohdr.kernels import OPS, backends

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

"""What only a GPU can show: capture into CUDA graphs, the caller's stream, and the tensors' device."""

import pytest
import test_causal_conv1d
import test_gdfn
import test_mdta
import test_selective_scan
import torch
from backend import BACKEND, DEVICE

from autohdr import kernels

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


def image_call(tests, shape):
    tensors, dy, keywords = tests.arguments(shape, torch.float32)
    return (lambda *leaves: tests.op(*leaves, **keywords, backend=BACKEND)), tensors, dy


def sequence_call(op, tensors, keywords, dy):
    def call(*leaves):
        return op(**dict(zip(tensors, leaves, strict=True)), **keywords, backend=BACKEND)

    return call, list(tensors.values()), dy


def scan_call(shape):
    tensors, keywords, (d_out, _) = test_selective_scan.arguments(shape)
    return sequence_call(kernels.selective_scan, tensors, keywords | {"return_last_state": False}, d_out)


CALLS = {
    "mdta": lambda: image_call(test_mdta.TestMdta, (2, 96, 2, 37, 29, True)),
    "gdfn": lambda: image_call(test_gdfn.TestGdfn, (2, 96, 255, 37, 29, True)),
    "causal_conv1d": lambda: sequence_call(kernels.causal_conv1d, *test_causal_conv1d.arguments((2, 64, 700, 4, "bias"))),
    "selective_scan": lambda: scan_call((2, 64, 700, 16, 1, "D z bias softplus")),
}


@pytest.fixture(params=CALLS)
def call(request):
    """(function, tensors, gradient of its result) of each op that the backend has."""
    if kernels.backends(request.param)[BACKEND] != "available":
        pytest.skip(kernels.backends(request.param)[BACKEND])
    return CALLS[request.param]()


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

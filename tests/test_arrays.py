"""The kernels for arrays are those for tensors, and without them arrays become tensors."""

import numpy as np
import pytest
import torch

from autohdr import _C, _C_arrays, arrays, kernels
from autohdr.arrays import apply_edit

SHAPES = [(2, 5, 7, 10), (1, 300, 200, 33), (1, 1, 1, 2)]


def problem(shape, dtype=np.float32):
    """x [batch, 3, height, width], channels-last, curves and matrix, which leave [0, 1] here and there."""
    batch, height, width, knots = shape
    rng = np.random.default_rng(0)
    x = rng.random((batch, height, width, 3)) * 1.3 - 0.1
    if dtype != np.float32:
        x = (x.clip(0, 1) * np.iinfo(dtype).max).round()
    curves = np.linspace(0, 1, knots) ** 0.6 + 0.1 * rng.random((batch, 3, knots))
    matrix = np.eye(3, 4) + 0.3 * rng.random((batch, 3, 4)) - 0.1
    return x.astype(dtype).transpose(0, 3, 1, 2), curves.astype(np.float32), matrix.astype(np.float32)


def by_tensors(problem):
    return kernels.apply_edit(*map(torch.from_numpy, problem)).numpy()


@pytest.fixture(params=[name for name in _C.build_info()["cpu_isas_here"] if "vnni" not in name])  # which has 8 bits more
def isa(request):
    before = _C.build_info()["cpu_isa"]
    for module in (_C, _C_arrays):
        module.use_cpu_isa(request.param)
    yield
    for module in (_C, _C_arrays):
        module.use_cpu_isa(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_same_bits_as_of_tensors(shape, dtype, isa, monkeypatch):
    edit = problem(shape, dtype)
    for threads in (1, 3):
        monkeypatch.setattr(arrays, "threads_wanted", lambda threads=threads: threads)
        edited = apply_edit(*edit)
        assert edited.dtype == dtype and edited.shape == edit[0].shape
        np.testing.assert_array_equal(edited, by_tensors(edit))


def test_any_strides():
    x, curves, matrix = problem((1, 40, 30, 5), np.uint8)
    for view in (x[:, :, ::3, ::-1], np.ascontiguousarray(x)):
        edited = apply_edit(view, curves, matrix)
        np.testing.assert_array_equal(edited, by_tensors((np.ascontiguousarray(view), curves, matrix)))


def test_without_compiled_kernels_arrays_become_tensors(monkeypatch):
    edit = problem(SHAPES[0])
    compiled = apply_edit(*edit)
    monkeypatch.setattr(arrays, "_kernels", None)
    np.testing.assert_array_equal(apply_edit(*edit), compiled)


def test_refuses_what_it_would_read_past():
    x, curves, matrix = problem(SHAPES[0])
    for wrong in (
        (x[:, :2], curves, matrix),
        (x, curves[:1], matrix),
        (x, curves[..., :1], matrix),
        (x, curves, matrix[..., :3]),
    ):
        with pytest.raises(ValueError, match="apply_edit: .* must be a contiguous"):
            apply_edit(*wrong)
    with pytest.raises(ValueError, match="apply_edit: x must be float32, uint8 or uint16"):
        apply_edit(x.astype(np.float64), curves, matrix)


@pytest.mark.parametrize(("set_to", "threads"), [("3", 3), ("2,1", 2), ("0", 7), ("", 7)])
def test_threads_are_as_many_as_torch_would_take(monkeypatch, set_to, threads):
    assert arrays.threads_wanted() == torch.get_num_threads()
    monkeypatch.delitem(arrays.sys.modules, "torch")
    monkeypatch.setattr(arrays, "cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    assert arrays.threads_wanted() == threads

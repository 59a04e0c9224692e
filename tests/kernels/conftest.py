"""Fixtures of the kernels' tests."""

import ctypes
import dataclasses
import importlib
import os
import sys

import numpy as np
import pytest
import torch
from backend import BACKEND, EMULATED, INTERPRETED, SLOW
from torch.utils._pytree import tree_leaves

from autohdr import _C
from autohdr.kernels import OPS, declare

if SLOW:  # the backend takes CPU tensors
    backends = importlib.import_module("autohdr.kernels.backends")  # the package has a function of that name
    backends._DEVICES[BACKEND] = "cpu"
    backends._REASONS[BACKEND] = ""

# A reference that rounds float32 to TF32, as PyTorch's convolutions do on a GPU, would let every error pass.
torch.backends.cudnn.allow_tf32 = False

if EMULATED:
    LIBRARY = os.environ["AUTOHDR_EMULATED_LIBRARY"]
    torch.ops.load_library(LIBRARY)  # takes the place of the CPU kernels
    signatures = ctypes.CDLL(LIBRARY).autohdr_signatures
    signatures.restype = ctypes.c_char_p
    not_emulated = [s for s in _C.signatures() if "cuda" not in OPS[declare.KERNELS[s[1]][0]]]
    declare.check_signatures(not_emulated + [tuple(line.split("\t")) for line in signatures().decode().splitlines()])

    @pytest.fixture(autouse=True, scope="module")
    def kernels_have_run():
        launches = ctypes.c_ulong.in_dll(ctypes.CDLL(LIBRARY), "autohdr_emulated_launches")
        before = launches.value
        yield
        assert launches.value > before

elif INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched, convert_float = interpreter._patch_lang, set(), interpreter._convert_float
    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def call(self, *args, **kwargs):
        """A function called by a kernel, without patching triton.language again each time, which takes longer than most do."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    def convert(values, of, to, rounding_mode):
        """float32 to bfloat16 by rounding to nearest as a GPU does; the interpreter cuts off."""
        if to.name != "bf16" or of.name != "fp32":
            return convert_float(values, of, to, rounding_mode)
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()

    def known_numpy_type(of):
        """The same, without a table of all types each time."""
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    init_block, init_tensor, blocks, tensors = tl.block_type.__init__, tl.tensor.__init__, {}, {}

    def known_block(self, element_ty, shape):
        """The same, which every operation of a kernel does, once for each type: a third of the time."""
        key = element_ty.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def known_tensor(self, handle, type):
        """The same once for each type, but for the values."""
        if type.name not in tensors:
            init_tensor(self, None, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    tl.block_type.__init__, tl.tensor.__init__ = known_block, known_tensor
    interpreter.InterpretedFunction.__call__, interpreter._convert_float = call, convert
    interpreter._get_np_dtype = known_numpy_type
    # Of sums of integers it finds whether they overflow, and then looks whether anybody asked: a quarter of the time.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    def place(storage):
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    def known_places(self, args_dev, kwargs):
        """The same, and notes where the tensors of the launch lie."""
        found = init_args(self, args_dev, kwargs)
        places[:] = {place(t.untyped_storage()) for t in tree_leaves(found) if isinstance(t, torch.Tensor)}
        return found

    def inside(access, of_mask):
        """The same where it touches the memory of one tensor of the launch and no other, which a GPU may not notice."""

        def run(self, pointers, *more):
            touched = pointers.data[more[of_mask].data]
            if touched.size:
                first, end = int(touched.min()), int(touched.max()) + pointers.get_element_ty().primitive_bitwidth // 8
                if not any(a <= first and end <= b for a, b in places):
                    raise IndexError(f"{access.__name__}: {first:#x} to {end:#x} is not within a tensor of the launch")
            return access(self, pointers, *more)

        return run

    init_args, places = interpreter.GridExecutor._init_args_hst, []
    interpreter.GridExecutor._init_args_hst = known_places
    for name, of_mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        setattr(type(builder), name, inside(getattr(type(builder), name), of_mask))
    importlib.import_module("autohdr.kernels.selective_scan.declaration").CHUNK = 8  # for the same paths with fewer tokens
    for name in declare.KERNELS:
        declare.register_triton(name, "cpu")

    @pytest.fixture(autouse=True, scope="module")
    def kernels_have_run(request):
        yield
        assert f"autohdr.kernels.{request.module.__name__.removeprefix('test_')}.triton_impl" in sys.modules


@pytest.fixture
def tf32(monkeypatch):
    """PyTorch may multiply float32 as TF32. Of the emulation that has no cuBLAS to tell, the environment says so."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    monkeypatch.setenv("AUTOHDR_TF32", "1")
    yield
    torch.set_float32_matmul_precision(before)


ISAS = _C.build_info()["cpu_isas_here"]


def with_isa(name):
    before = _C.build_info()["cpu_isa"]
    _C.use_cpu_isa(name)
    yield
    _C.use_cpu_isa(before)


@pytest.fixture(params=[name for name in ISAS if "vnni" not in name] if BACKEND == "cpu" else [BACKEND])
def isa(request):
    """Each instruction set that runs here in turn, but for those that differ in 8 bits alone; no matter to any other backend than
    cpu."""
    yield from with_isa(request.param) if BACKEND == "cpu" else [None]


@pytest.fixture(params=ISAS)
def int8_isa(request):
    """Each instruction set that runs here in turn."""
    yield from with_isa(request.param)

"""The machine's own ceilings, which the roofline is drawn under: bytes copied, and products of large matrices."""

import pytest
import torch
from measuring import DEVICE, DTYPES, relative_error

BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}[DEVICE]
SIDES = {"cpu": {"float32": 2048}, "cuda": {"float32": 8192, "bfloat16": 8192}}[DEVICE]


def test_copy(timed):
    source = torch.randint(1 << 62, (BYTES // 8,), device=DEVICE)
    target = torch.empty_like(source)
    facts = {"op": "copy", "shape": str(BYTES), "mode": "forward", "backend": "torch", "dtype": "float32"}
    timed(lambda: [target.copy_(source)], lambda actual: float(not torch.equal(actual[0], source)), 0, **facts)


@pytest.mark.parametrize("dtype", SIDES)
def test_matmul(timed, dtype):
    torch.manual_seed(0)
    side = SIDES[dtype]
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPES[dtype]) for _ in range(2))
    expected = a[:64].double() @ b.double()
    facts = {"op": "matmul", "shape": f"{side}×{side}×{side}", "mode": "forward", "backend": "torch", "dtype": dtype}
    limit = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    timed(lambda: [a @ b], lambda actual: relative_error([actual[0][:64]], [expected]), limit, **facts)

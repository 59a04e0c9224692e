"""Which backend these tests run: AUTOHDR_TEST_BACKEND, cpu (the default), cuda or triton.

Without a GPU, cuda stands for the same sources run by tests/emulation, triton for its interpreter: slowly, on CPU tensors.
test_emulated_cuda.py and test_triton.py start these tests that way.
"""

import os

import torch

BACKEND = os.environ.get("AUTOHDR_TEST_BACKEND", "cpu")
DEVICE = "cuda" if BACKEND != "cpu" and torch.cuda.is_available() else "cpu"
SLOW = BACKEND != "cpu" and DEVICE == "cpu"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def raw_op(name: str):
    """The dispatcher's op behind the public function."""
    return getattr(torch.ops.autohdr, name + "_triton" * (BACKEND == "triton")).default

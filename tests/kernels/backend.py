"""Which backend these tests run: AUTOHDR_TEST_BACKEND, cpu (the default), cuda or triton.

Without a GPU, cuda means the emulation of CUDA (tests/emulation) on CPU tensors, and triton its interpreter;
test_emulated_cuda.py and test_interpreted_triton.py start them.
"""

import os

import torch

BACKEND = os.environ.get("AUTOHDR_TEST_BACKEND", "cpu")
DEVICE = "cuda" if BACKEND != "cpu" and torch.cuda.is_available() else "cpu"
PLACE = str(torch.empty(0, device=DEVICE).device)  # as error messages name it
EMULATED = BACKEND == "cuda" and DEVICE == "cpu"
INTERPRETED = BACKEND == "triton" and DEVICE == "cpu"
SLOW = BACKEND != "cpu" and DEVICE == "cpu"
# What all backends of an op share, its registration and what the compiler makes of it, is asked of the CPU kernels alone.
OPCHECKS = ["test_schema", "test_faketensor"] + ([] if SLOW else ["test_autograd_registration", "test_aot_dispatch_dynamic"])
COMPILED = [] if SLOW else ["auto", BACKEND]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def raw_op(name: str):
    """The dispatcher's op behind the public function."""
    return getattr(torch.ops.autohdr, name + "_triton" * (BACKEND == "triton")).default

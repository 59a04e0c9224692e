"""Other runtimes on a CPU, for the benchmarks that put ours beside them."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from run import MALLOCS

Runs = dict[str, Callable[[], Any]]


def under_tuned_malloc(**more: str) -> None:
    """Starts the program again under the tuned malloc of run.py, and with more of the environment, unless it has them."""
    wanted = MALLOCS["tuned"] | more
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def session(file: Path | bytes, threads: int, *, spins: bool, profile: str = "") -> onnxruntime.InferenceSession:
    """spins: threads wait for work in a loop, which is quicker where nothing else runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile or options.profile_file_prefix
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def in_runtimes(file: Path | bytes, threads: int, given: dict[str, np.ndarray], *, spins: bool) -> Runs:
    """What an ONNX program makes of its inputs, by the runtimes that there are, in float32 where it does not say otherwise."""
    running = session(file, threads, spins=spins)
    runs: Runs = {"ONNX Runtime": lambda: running.run(None, given)[0]}
    if importlib.util.find_spec("openvino"):
        core = importlib.import_module("openvino").Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        program = core.read_model(file)
        program.reshape({name: list(array.shape) for name, array in given.items()})
        compiled = core.compile_model(program, "CPU", settings)
        runs["OpenVINO"] = lambda: compiled(given)[0]
    return runs

"""What 8-bit products gain on a CPU, by the runtimes that have them, against our float32. Prints JSON.

    python benchmarks/int8.py [--models restormer_nano restormer_tiny] [--size 384] [--threads 1 2] [--rounds 5] [--inner-loops]

models: ONNX Runtime (of the extra `onnx`) and, where it is installed, OpenVINO run a model's ONNX program of one size in float32,
with its 1×1 convolutions in 8 bits, and with all of its convolutions: weights per channel, activations calibrated on the sample
photos, the first and the last layer kept. Eager PyTorch runs channels-last. `difference`: the mean from float32, of 255.
parts: ONNX Runtime's own profile of its programs on one thread, milliseconds a pass by kind of operator.
inner loops: `rates`, multiply-accumulates a second of a product's inner loop on one core (int8_products.cpp, compiled by g++),
by registers of 32 bytes, and where the processor has AVX512-VNNI, of 64. Of each model's passes in float32 on one thread, by
the samples of Linux' perf: `share`, what our products take, `pytorch`, what PyTorch's own layers do, dense 3×3 convolutions
most of all, and `rate`, that of our products. How many times as fast the model could be, if making 8 bits of numbers took no
time, by 1 / (1 - share + share / times), of its products and `with pytorch`: `like float32`, if those in 8 bits gain what the
inner loop does; `full rate`, if they reach its rate; `free`, if they take no time.
products: a 1×1 product of [pixels, C] to 3·C channels alone, as the levels of restormer_base have it: from float32 to float32,
8 bits within, and from 8 bits to int32 or 8 bits, which a layer between float32 ones never is.

What is compared runs in turn, `rounds` times, under a malloc that keeps large blocks. Of the milliseconds, `fastest` are the
shortest, and `processor` the median of the time on the processor, which other processes disturb least.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import re
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import floors
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from problems import LEVELS
from run import commit, processor
from runtimes import Runs, in_runtimes, session, under_tuned_malloc
from torch import Tensor

from autohdr import _C, create_model
from autohdr.data.images import read_rgb
from autohdr.demo import SAMPLES
from autohdr.kernels.backends import default_backend


def timed(runs: Runs, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, all in turn after one call to warm up."""
    wall, cpu = {name: [] for name in runs}, {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin, used = time.perf_counter(), time.process_time()
            run()
            if turn:
                wall[name].append(1e3 * (time.perf_counter() - begin))
                cpu[name].append(1e3 * (time.process_time() - used))
    return {name: {"fastest": round(min(wall[name]), 2), "processor": round(statistics.median(cpu[name]), 2)} for name in runs}


def photos(size: int) -> list[Tensor]:
    found = [torch.from_numpy(read_rgb(path)).permute(2, 0, 1)[None] for path in sorted(SAMPLES.parent.glob("*_src.jpg"))]
    return [F.interpolate(photo, (size, size), mode="bilinear", antialias=True) for photo in found]


class Photos(CalibrationDataReader):
    def __init__(self, images: list[Tensor]):
        self.images: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image.numpy()}


def programs(model: torch.nn.Module, images: list[Tensor], folder: Path) -> dict[str, Path]:
    """The model in float32, and in 8 bits in two ways."""
    files = {kind: folder / f"{kind}.onnx" for kind in ("float32", "int8 1×1", "int8 convolutions")}
    with torch.no_grad(), default_backend("reference"):
        program = torch.export.export(model, (images[0],))
        written = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=["image"], output_names=["edited"])
    assert written is not None
    written.save(files["float32"])
    graph = onnx.load(files["float32"]).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    # The two halves of a 1×1 weight after each upsampling are no constants in the graph: these stay as well.
    sides = {n.name: shapes[n.input[1]][2:] for n in graph.node if n.op_type == "Conv" and n.input[1] in shapes}
    convolutions = list(sides)[1:-1]
    pointwise = [name for name in convolutions if sides[name] == [1, 1]]
    for kind, nodes in {"int8 1×1": pointwise, "int8 convolutions": convolutions}.items():
        formats: dict[str, Any] = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        # Without VNNI two products are added up in 16 bits, which weights of 8 would overflow.
        formats |= {"quant_format": QuantFormat.QDQ, "reduce_range": True, "nodes_to_quantize": nodes}
        quantize_static(files["float32"], files[kind], Photos(images), op_types_to_quantize=["Conv"], **formats)
    return files


def parts(file: Path, image: np.ndarray, rounds: int, folder: Path) -> dict[str, float]:
    """The kinds of operators that take a hundredth of the time at least."""
    running = session(file, 1, spins=False, profile=str(folder / "profile"))
    for _ in range(rounds):
        running.run(None, {"image": image})
    spent: Counter[str] = Counter()
    for event in json.loads(Path(running.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 1e3 / rounds
    return {kind: round(ms, 1) for kind, ms in spent.most_common() if ms >= 0.01 * spent.total()}


def of_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model, images = create_model(name).eval().requires_grad_(False), photos(options.size)
    given = {"image": images[0].numpy()}
    image = images[0].contiguous(memory_format=torch.channels_last)

    def eager() -> Tensor:
        with default_backend("reference"):
            return model(image)

    found: dict[str, Any] = {"model": name, "size": options.size}
    with TemporaryDirectory() as folder, torch.inference_mode():
        files = programs(model, images, Path(folder))
        for threads in options.threads:
            torch.set_num_threads(threads)
            runs: Runs = {"autohdr float32": lambda: model(image), "eager float32": eager}
            for kind, file in files.items():
                runs |= {f"{runtime} {kind}": run for runtime, run in in_runtimes(file, threads, given, spins=False).items()}
            found[f"{threads} threads, ms"] = timed(runs, options.rounds)
        wanted = model(image)
        differences = {name: float((torch.as_tensor(np.array(run())) - wanted).abs().mean()) for name, run in runs.items()}
        found["difference"] = {name: round(255 * value, 4) for name, value in differences.items()}
        found["parts"] = {kind: parts(file, given["image"], options.rounds, Path(folder)) for kind, file in files.items()}
    return found


def inner_loops() -> dict[str, float]:
    with TemporaryDirectory() as folder:
        program, source = Path(folder) / "int8_products", Path(__file__).with_name("int8_products.cpp")
        subprocess.run(["g++", "-O3", "-mavx2", "-mfma", "-std=c++17", source, "-o", program], check=True)
        return json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def of_inner_loops(name: str, rates: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """What the best rate in 8 bits could make of a model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, image = create_model(name).eval().requires_grad_(False), photos(options.size)[0]
    image, passes = image.contiguous(memory_format=torch.channels_last), 0
    with TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "perf.data"
        model(image)
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "997", "-p", str(os.getpid()), "-o", file]
        with subprocess.Popen(record) as running:
            while not file.exists() or not file.stat().st_size:
                time.sleep(0.1)
            begin = time.process_time()
            while (spent := time.process_time() - begin) < 3 or not passes:
                model(image)
                passes += 1
            running.send_signal(signal.SIGINT)
        report = ["perf", "report", "-i", file, "--stdio", "-t", "\t", "-F", "sample,dso,symbol"]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout.splitlines()
    samples: Counter[str] = Counter()
    for count, library, symbol in (line.split("\t") for line in lines if line.strip() and not line.startswith("#")):
        ours = "_C." in library and re.search(r"::(product_vecs|outer|outer_few)\b", symbol)
        kind = "share" if ours else "pytorch" if re.search(r"libtorch_cpu|JIT|\[unknown|anon", library) else "rest"
        samples[kind] += int(count)
    share, pytorch = (samples[kind] / samples.total() for kind in ("share", "pytorch"))
    row = {"op": name, "shape": f"1×{options.size}×{options.size}", "dtype": "float32", "mode": "inference"}
    rate = passes * sum(work.products for work in floors.work(row)) / (share * spent)
    wide = "avx512 " if _C.build_info()["cpu_isa"] == "avx512vnni" else ""
    kinds = ["vnni"] if wide else rates.keys() & {"uint8", "uint7", "vnni"}
    best = max(rates[wide + kind] for kind in kinds)
    times = {"like float32": best / rates[f"{wide}float32"], "full rate": best / rate, "free": math.inf}

    def bounds(part: float) -> dict[str, float]:
        return {case: round(1 / (1 - part + part / gain), 2) for case, gain in times.items()}

    found: dict[str, Any] = {"share": round(share, 3), "pytorch": round(pytorch, 3), "rate": float(f"{rate:.3g}")}
    return found | {"products": bounds(share), "with pytorch": bounds(share + pytorch)}


def quantized_product(weight: np.ndarray, x: Tensor, scale: float) -> bytes:
    """ONNX of x [pixels, C] · weight [C, N] in 8 bits: from float32 to float32, or from uint8 to uint8."""
    node, inputs = onnx.helper.make_node, {"s": np.float32(scale), "z": np.uint8(128), "ys": np.float32(4 * scale)}
    scales = np.abs(weight).max(0) / 63  # see programs()
    inputs |= {"w": np.rint(weight / scales).astype(np.int8), "ws": scales, "wz": np.zeros(len(scales), np.int8)}
    within = x.dtype == torch.uint8
    q, p = ("x", "y") if within else ("q", "p")
    nodes = [
        node("DequantizeLinear", [q, "s", "z"], ["a"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["b"], axis=1),
        node("MatMul", ["a", "b"], ["c"]),
        node("QuantizeLinear", ["c", "ys", "z"], [p]),
    ]
    if not within:
        nodes = [node("QuantizeLinear", ["x", "s", "z"], [q]), *nodes, node("DequantizeLinear", [p, "ys", "z"], ["y"])]
    kind = onnx.TensorProto.UINT8 if within else onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(n, kind, [len(x), weight.shape[i]]) for i, n in enumerate("xy")]
    initializers = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in inputs.items()]
    graph = onnx.helper.make_graph(nodes, "product", ends[:1], ends[1:], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def of_product(channels: int, pixels: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    x, weight = torch.randn(pixels, channels), torch.randn(3 * channels, channels) / channels**0.5
    scale = float(x.abs().max()) / 127
    q, q_weight = (x / scale).round().to(torch.int8), (64 * weight).round().clamp(-63, 63).to(torch.int8).t().contiguous()
    shifted = (q.to(torch.int16) + 128).to(torch.uint8)
    packed, scales = torch.ops.onednn.qlinear_prepack(q_weight.t().contiguous(), None), torch.full((3 * channels,), 1 / 64)
    zeros = torch.zeros(3 * channels, dtype=torch.int64)

    def onednn(rows: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            rows, scale, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    def quantized() -> Tensor:
        return onednn(torch.ops.quantized_decomposed.quantize_per_tensor(x, scale, 128, 0, 255, torch.uint8))

    found: dict[str, Any] = {"channels": channels, "pixels": pixels}
    for threads in options.threads:
        torch.set_num_threads(threads)
        runs: Runs = {
            "float32": lambda: F.linear(x, weight),
            "int8, PyTorch's oneDNN": quantized,
            "int8, PyTorch's oneDNN, from 8 bits": lambda: onednn(shifted),
            "int8, torch._int_mm, from 8 bits to int32": lambda: torch._int_mm(q, q_weight),
        }
        for given, end in ((x, ""), (shifted, ", from 8 bits to 8")):
            program = quantized_product(weight.t().numpy(), given, scale)
            others = in_runtimes(program, threads, {"x": given.numpy()}, spins=False)
            runs |= {f"int8, {runtime}{end}": run for runtime, run in others.items()}
        found[f"{threads} threads, ms"] = timed(runs, options.rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["restormer_nano", "restormer_tiny"])
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inner-loops", action="store_true", help="these alone")
    options = parser.parse_args()
    under_tuned_malloc(OMP_WAIT_POLICY="passive")
    for name in ("torch.onnx", "root"):  # what they lack that is not needed
        logging.getLogger(name).setLevel(logging.ERROR)
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed
    about = {"processor": processor(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "commit": commit()}
    rates = inner_loops()
    about["inner loops"] = {"rates": rates} | {name: of_inner_loops(name, rates, options) for name in options.models}
    if not options.inner_loops:
        side = options.size
        with torch.inference_mode():
            about["products"] = [of_product(c, side**2 >> 2 * i, options) for i, c in enumerate(LEVELS)]
        about["models"] = [of_model(name, options) for name in options.models]
    print(json.dumps(about, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

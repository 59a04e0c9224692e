"""Measures on this GPU, kernel by kernel, what instructions.py predicts; gpu_check.py runs it and takes its last line."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from machine_code import short_name

PREDICTIONS = Path(__file__).parent / "results" / "instructions.json"
RUNS = 3


def pass_of(row: dict) -> Callable[[], object]:
    """A function that does on this GPU what a row of predictions is of."""
    import problems

    from autohdr import create_model, kernels

    sizes, dtype = [int(n) for n in row["shape"].split("×")], getattr(torch, row["dtype"])
    if row["op"] in kernels.OPS:
        return getattr(problems, row["op"])(*sizes, dtype, "cuda").runner(row["mode"], row["backend"])
    network = create_model(row["op"]).to("cuda", memory_format=torch.channels_last)
    source = torch.rand(1, 3, *sizes, device="cuda").contiguous(memory_format=torch.channels_last)

    def forward() -> torch.Tensor:
        kernels.set_backend(row["backend"])
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return network(source)

    if row["mode"] == "forward":
        return torch.inference_mode()(forward)
    return lambda: (forward().float() - source).abs().mean().backward()


def milliseconds(run: Callable[[], object]) -> Counter:
    """Of each kernel in one call, by its short name."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    found = Counter()
    for event in profiler.key_averages():
        found[short_name(event.key)] += event.self_device_time_total / 1e3 / RUNS
    return found


def compared(row: dict, measured: dict[str, float]) -> list[dict]:
    """Every kernel of a row of predictions beside its measurement; what is not predicted by name is PyTorch's."""
    others = sum(ms for kernel, ms in measured.items() if kernel not in row["bound_by"])
    found = []
    for kernel, (predicted, bound) in row["bound_by"].items():
        took = others if kernel == "PyTorch's own ops" else measured.get(kernel)
        facts = {key: row[key] for key in ("op", "shape", "mode", "dtype", "backend")} | {"kernel": kernel, "bound": bound}
        over = round(took / predicted, 3) if took is not None and predicted else None
        found.append(facts | {"measured_ms": took, "predicted_ms": predicted, "measured_over_predicted": over})
    return found


def fitted(kernels: list[dict]) -> dict[str, float]:
    """By what binds: the factor that makes the sum of the predictions that of the measurements."""
    sums = defaultdict(lambda: [0.0, 0.0])
    for kernel in kernels:
        if kernel["measured_ms"] is not None:
            sums[kernel["bound"]][0] += kernel["measured_ms"]
            sums[kernel["bound"]][1] += kernel["predicted_ms"]
    return {bound: round(measured / predicted, 3) for bound, (measured, predicted) in sums.items() if predicted}


def main() -> None:
    name = torch.cuda.get_device_name()
    results = json.loads(PREDICTIONS.read_text())
    found = []
    for row in results["predictions"]:
        if row["gpu"] not in name:
            continue
        try:
            found += compared(row, milliseconds(pass_of(row)))
        except Exception as error:  # too little memory for one of them
            print(f"{row['op']} {row['shape']} {row['mode']}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    print(json.dumps({"predictions_of": results["commit"], "kernels": found, "fitted": fitted(found)}))


if __name__ == "__main__":
    main()

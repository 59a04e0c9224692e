"""``autohdr doctor``: what is installed, what was compiled, and what can run here."""

import platform
import sys

import torch

import autohdr
from autohdr import kernels
from autohdr.kernels import _extension


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda else "none usable (torch was built without CUDA)"
    names = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        names.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return "; ".join(names)


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _extension_facts() -> list[tuple[str, str]]:
    if _extension.module is None:
        return [("compiled kernels", _extension.reason)]
    info = _extension.module.build_info()
    unusable = [name for name in info["cpu_isas"] if name not in info["cpu_isas_here"]]
    isas = ", ".join(info["cpu_isas"]) + (f" (not on this processor: {', '.join(unusable)})" if unusable else "")
    return [
        ("compiled with", f"g++ {info['compiler']}, torch {info['torch']}"),
        (
            "CUDA kernels",
            f"nvcc {info['cuda']}, architectures {info['cuda_architectures']}" if info["cuda"] != "none" else "none",
        ),
        ("CPU kernels", isas),
        ("CPU kernels use", info["cpu_isa"]),
    ]


def doctor() -> str:
    """The report, as text."""
    facts = [
        ("autohdr", autohdr.__version__),
        ("Python", f"{platform.python_version()}, {sys.platform} {platform.machine()}"),
        ("torch", f"{torch.__version__}, built with CUDA {torch.version.cuda or 'none'}"),
        ("GPU", _gpus()),
        ("threads", str(torch.get_num_threads())),
        ("bfloat16 on CPU", "oneDNN can, on this processor" if _has_bfloat16() else "oneDNN can't, on this processor"),
        *_extension_facts(),
    ]
    lines = [f"{name:<17} {value}" for name, value in facts]
    lines += ["", f"{'op':<15} {'backend':<10} state"]
    for op in kernels.OPS:
        lines += [f"{op:<15} {backend:<10} {state}" for backend, state in kernels.backends(op).items()]
    return "\n".join(lines)

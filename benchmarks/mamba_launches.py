"""The launches of mamba-ssm's selective scan, for instructions.py to predict beside ours. Its kernels are compiled from the
headers of its unpacked source distribution, and called as its selective_scan.cpp calls them, on what problems.py makes."""

import subprocess
from pathlib import Path

import machine_code
import torch
from problems import DSTATE
from warp import Launch

NAME = "mamba_ssm"
HEADERS = Path("csrc/selective_scan")  # in its folder
TYPES = {"bfloat16": "c10::BFloat16", "float16": "c10::Half", "float32": "float"}
# As its setup.py compiles them; PyTorch's headers without those that only its CUDA builds have.
FLAGS = "-O3 -std=c++17 --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda -w".split()
FLAGS += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
SOURCE = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "selective_scan_MODE_kernel.cuh"

constexpr int threads = 128, items = 16;  // for more than 1,024 tokens
#ifdef BACKWARD
using Traits = Selective_Scan_bwd_kernel_traits<threads, items, EVEN, true, true, true, true, TYPE, float>;
template __global__ void selective_scan_bwd_kernel<Traits>(SSMParamsBwd);
constexpr int shared = Traits::kSmemSize + MAX_DSTATE * sizeof(Traits::scan_t) + (threads + 4 * MAX_DSTATE) * sizeof(float);
#else
using Traits = Selective_Scan_fwd_kernel_traits<threads, items, 1, EVEN, true, true, true, TYPE, float>;
template __global__ void selective_scan_fwd_kernel<Traits>(SSMParamsBase);
constexpr int shared = Traits::kSmemSize + MAX_DSTATE * sizeof(Traits::scan_t);
#endif

int main(int, char** arguments) {
  const long batch = atol(arguments[1]), dim = atol(arguments[2]), seqlen = atol(arguments[3]), dstate = atol(arguments[4]);
  SSMParamsBwd p;
  memset(&p, 0, sizeof(p));
  p.batch = batch, p.dim = dim, p.seqlen = seqlen, p.dstate = dstate, p.n_groups = 1, p.dim_ngroups_ratio = dim;
  p.n_chunks = (seqlen + 2047) / 2048, p.is_variable_B = p.is_variable_C = p.delta_softplus = true;
  p.A_d_stride = p.dA_d_stride = dstate, p.A_dstate_stride = p.dA_dstate_stride = 1;
  for (auto s : {&p.B_batch_stride, &p.B_group_stride, &p.C_batch_stride, &p.C_group_stride}) *s = dstate * seqlen;
  for (auto s : {&p.dB_batch_stride, &p.dB_group_stride, &p.dC_batch_stride, &p.dC_group_stride}) *s = dstate * seqlen;
  for (auto s : {&p.B_dstate_stride, &p.C_dstate_stride, &p.dB_dstate_stride, &p.dC_dstate_stride}) *s = seqlen;
  for (auto s : {&p.u_batch_stride, &p.delta_batch_stride, &p.z_batch_stride, &p.out_batch_stride, &p.out_z_batch_stride,
                 &p.dout_batch_stride, &p.du_batch_stride, &p.dz_batch_stride, &p.ddelta_batch_stride}) *s = dim * seqlen;
  for (auto s : {&p.u_d_stride, &p.delta_d_stride, &p.z_d_stride, &p.out_d_stride, &p.out_z_d_stride, &p.dout_d_stride,
                 &p.du_d_stride, &p.dz_d_stride, &p.ddelta_d_stride}) *s = seqlen;
  const long bytes = sizeof(TYPE), sequence = batch * dim * seqlen * bytes, states = batch * dstate * seqlen * bytes;
  char* next = reinterpret_cast<char*>(0x7f0000000000);
  auto place = [&](auto tensor, long size) {
    *tensor = next;
    printf("%p %ld ", next, size);
    next += (size + 511) / 512 * 512;
  };
  for (auto t : {&p.u_ptr, &p.delta_ptr, &p.z_ptr, &p.out_ptr}) place(t, sequence);
  for (auto t : {&p.B_ptr, &p.C_ptr}) place(t, states);
  for (auto t : {&p.D_ptr, &p.delta_bias_ptr}) place(t, 4 * dim);
  place(&p.A_ptr, 4 * dim * dstate);
  place(&p.x_ptr, batch * dim * p.n_chunks * dstate * 8);
#ifdef BACKWARD
  for (auto t : {&p.dout_ptr, &p.du_ptr, &p.dz_ptr, &p.ddelta_ptr}) place(t, sequence);
  for (auto t : {&p.dB_ptr, &p.dC_ptr}) place(t, states / bytes * 4);
  for (auto t : {&p.dD_ptr, &p.ddelta_bias_ptr}) place(t, 4 * dim);
  place(&p.dA_ptr, 4 * dim * dstate);
  const SSMParamsBwd& passed = p;
#else
  place(&p.out_z_ptr, sequence);
  const SSMParamsBase& passed = p;
#endif
  printf("\n%d ", shared);
  for (size_t i = 0; i < sizeof(passed); ++i) printf("%02x", reinterpret_cast<const unsigned char*>(&passed)[i]);
}
"""


def launches(
    folder: Path, shape: tuple[int, int, int], mode: str, dtype: str, architecture: str, into: Path
) -> list[tuple[Launch, list[tuple[int, int]]]]:
    """Of a pass, each with (address, bytes) of its tensors. Their machine code is written as KERNEL.cubin into another folder.

    shape: batch, dim, seqlen, of more than 1,024 tokens.
    """
    batch, dim, seqlen = shape
    assert seqlen > 1024, shape
    into.mkdir(parents=True, exist_ok=True)
    nvcc = str(machine_code.build.toolkit() / "bin" / "nvcc")
    includes = [f"-I{folder / HEADERS}", f"-I{Path(torch.__file__).parent / 'include'}"]
    even = seqlen % 2048 == 0
    found = []
    for kind in ("fwd", "bwd") if mode == "training" else ("fwd",):
        source = into / f"{NAME}_{kind}.cu"
        source.write_text(SOURCE.replace("MODE", kind))
        defined = [f"-DTYPE={TYPES[dtype]}", f"-DEVEN={int(even)}", *["-DBACKWARD"] * (kind == "bwd")]
        command = [nvcc, *FLAGS, f"-arch={architecture}", *defined, *includes, str(source), "-o"]
        name = f"{NAME}_{kind}_{dtype}_{even}_{architecture}"
        program = into / name
        if not program.exists():
            subprocess.run([*command, program.with_suffix(".cubin"), "-cubin"], check=True)
            subprocess.run([*command, program, "-Xlinker", "--unresolved-symbols=ignore-all"], check=True)
        said = subprocess.run([program, *map(str, (*shape, DSTATE))], capture_output=True, text=True, check=True).stdout
        places, (shared, parameters) = (line.split() for line in said.splitlines())
        (symbol,) = machine_code.usage(program.with_suffix(".cubin"))
        kernel = f"{symbol}@{architecture}"
        (into / f"{kernel}.cubin").write_bytes(program.with_suffix(".cubin").read_bytes())
        launch = Launch(kernel, (batch, dim, 1), (128, 1, 1), int(shared), bytes.fromhex(parameters))
        found.append((launch, [(int(a, 16), int(n)) for a, n in zip(places[::2], places[1::2], strict=True)]))
    return found

"""The fused adapter kernel: what it compiles to, and where a GPU is, how fast it runs beside torch and the memory's floor.

    python -m tests.benchmarks.kernels [--widths 1024 4096 5120] [--dims 4 8 16 32] [--compile-only] [--json OUT]

Without a GPU each kernel is compiled ahead of time for sm_80 and sm_90: registers a thread, spills, shared memory, and the bytes that it must move
against the least possible. With one, forward and forward + backward of norm and adapter together are timed against torch eager and
torch.compile, in bf16, and against the time that the bytes alone would take at the card's measured copy speed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.benchmarks.measure import show
from vltrain.ops import triton_adapter
from vltrain.ops.fused import fused_adapter

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
ROWS = 8192
# Types of the arguments, by name; what is not named is an int32, or a constant.
POINTERS = {
    "x": "*bf16", "y": "*bf16", "dy": "*bf16", "dx": "*bf16", "norm_weight": "*bf16", "scale": "fp32", "eps": "fp32",
    **dict.fromkeys(("down", "down_bias", "up", "up_bias", "hidden", "dhidden", "inverse_rms", "shared", "d_down", "d_up", "d_up_bias"), "*fp32"),
}  # fmt: skip
# The kernel, its warps, and further constants.
KERNELS = {
    "forward": (triton_adapter._forward_kernel, 4, {}),
    "backward rows": (triton_adapter._backward_rows_kernel, triton_adapter.BACKWARD_WARPS, {}),
    "backward columns": (triton_adapter._backward_columns_kernel, triton_adapter.BACKWARD_WARPS, {"NEEDS_DX": True}),
}


def compile_all(widths: list[int], dims: list[int]) -> list[dict]:
    """Compiles each kernel for each size, with the norm and without."""
    return [
        {"kernel": name, "norm": norm, "dim": dim, "arch": arch, **_compile(*KERNELS[name], norm, dim, capability)}
        for name in KERNELS for norm in (False, True) for dim in dims for arch, capability in ARCHITECTURES.items()
    ]  # fmt: skip


def _compile(kernel: triton.JITFunction, num_warps: int, more: dict, norm: bool, dim: int, capability: int) -> dict:
    constants = {"NORM": norm, "PRECISION": triton_adapter.input_precision(torch.bfloat16), **triton_adapter.block_sizes(dim), **more}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    aligned = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name == "d"}
    # The innermost stride is 1, which a launch notices by itself.
    unit = {name: 1 for name in ("stride_column", "dy_stride_column") if name in signature}
    signature |= dict.fromkeys(unit, "constexpr")
    source = ASTSource(kernel, signature, {**constants, **unit}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    registers, spills = _resources(compiled.asm["cubin"])
    return {"registers": registers, "spills": spills, "shared_bytes": compiled.metadata.shared, "blocks": triton_adapter.block_sizes(dim)}


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread, which is what spills) as the assembler's own tool reads them off a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def bytes_moved(rows: int, width: int, dim: int, norm: bool, size: int = 2) -> dict[str, float]:
    """Bytes of device memory that the kernels move, and the least that any could.

    The least: x in and y out; dy and x in, dx out; and each weight and gradient once. Ours are more by `hidden` (rows x dim, fp32) and `dhidden`,
    written once and read once each, one number a row for the norm, and the partial sums of the weights' gradients. That a band is read from
    the cache the second time is arithmetic here, not a measurement.
    """
    states, weights = rows * width * size, 4 * (2 * width * dim + width + dim)
    _, shares, _ = triton_adapter.bands(rows, width, size, triton_adapter.CHUNK_COLUMNS)
    small, sums = 4 * rows * (dim + norm), 4 * shares * (2 * width * dim + width)
    least = {"forward": 2 * states + weights, "backward": 3 * states + 2 * weights}
    ours = {"forward": least["forward"] + small, "backward": least["backward"] + 3 * small + 2 * sums}
    return {**ours, **{f"{name}_least": value for name, value in least.items()}, **{f"{name}_ratio": ours[name] / least[name] for name in least}}


def time_all(widths: list[int], dims: list[int]) -> list[dict]:
    """Medians in microseconds on this machine's GPU."""
    copied = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    bytes_per_second = 2 * copied.numel() / (microseconds(lambda: copied.clone()) / 1e6)
    results = []
    for width in widths:
        for dim in dims:
            moved = bytes_moved(ROWS, width, dim, norm=True)
            floors = {f"floor_{name}": 1e6 * moved[f"{name}_least"] / bytes_per_second for name in ("forward", "backward")}
            results.append({"width": width, "dim": dim, "rows": ROWS, **_time_one(width, dim), **floors})
    return results


def _time_one(width: int, dim: int) -> dict[str, float]:
    norm_weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(ROWS, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(shape, device="cuda", requires_grad=True) for shape in ((dim, width), (dim,), (width, dim), (width,))]
    upstream = torch.randn_like(x)

    def eager(states):
        down, down_bias, up, up_bias = (weight.to(torch.bfloat16) for weight in weights)
        z = torch.nn.functional.rms_norm(states, (width,), norm_weight, 1e-6)
        return torch.addmm(z, torch.nn.functional.linear(z, down, down_bias), up.t()) + up_bias

    compiled = torch.compile(eager)
    results = {}
    for name, function in {"fused": lambda states: fused_adapter(states, *weights, norm_weight=norm_weight), "eager": eager, "compile": compiled}.items():
        results[f"{name}_forward"] = microseconds(lambda function=function: function(x.detach()))
        results[f"{name}_both"] = microseconds(lambda function=function: function(x).backward(upstream))
    return results


def microseconds(call: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 5120])
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--compile-only", action="store_true", help="do not time, even where a GPU is")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {"compiled": compile_all(given.widths, given.dims)}
    found["bytes"] = [
        {"width": width, "dim": dim, "norm": norm, **bytes_moved(ROWS, width, dim, norm)} for width in given.widths for dim in given.dims for norm in (False, True)
    ]
    if torch.cuda.is_available() and not given.compile_only:
        found["times"] = time_all(given.widths, given.dims)
    for rows in found.values():
        show(rows)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

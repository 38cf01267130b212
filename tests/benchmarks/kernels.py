"""The fused adapter kernel: what it compiles to, and where a GPU is, how fast it runs beside torch and the memory's
floor.

    python -m tests.benchmarks.kernels [--widths 1024 4096 5120] [--dims 4 16 32] [--norms 0 1] [--archs sm_80 sm_90
    sm_100]
        [--cases bf16 autocast fp32] [--compile-only] [--json OUT]

Each kernel is compiled ahead of time, also without a GPU: registers a thread, spills, shared memory. By default for the
default widths; cases are the states' and the products' dtypes: bf16, fp32 under bf16 autocast, fp32. Then the bytes
that the kernels ask for, against the least possible.
With a GPU, forward and forward + backward of norm and adapter together are timed against torch eager and torch.compile,
in bf16, and against the time that the least bytes alone would take at the card's measured copy speed. The times are the
GPU's own: calls are queued up behind a pause, so that launching them costs nothing, and the cache is emptied before
each.
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
from vltrain.ops import adapter_kernels, triton_adapter
from vltrain.ops.fused import fused_adapter

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
ROWS = 8192
# Dtypes of the states and of the products, which are the result's.
CASES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}
# Arguments by name; what is not named is an int32, or a constant.
OF_STATES = ("x", "dx", "norm_weight")
OF_PRODUCTS = ("y", "dy", "packed", "hidden", "dhidden")
SUMS = ("down_parts", "up_parts", "up_bias_parts", "down_bias_parts", "d_down", "d_up", "d_up_bias", "d_down_bias")
FP32 = ("down", "up", "down_bias", "up_bias", "inverse_rms", "shared", *SUMS)
NOT_SPECIALISED = ("num_rows", "share_rows", "shares", "blocks", "h")
# The kernel, and the constants of those that have no launch of their own.
KERNELS = {
    "pack": (adapter_kernels.pack_kernel, {"C": triton_adapter.PACK_COLUMNS}),
    "forward": (adapter_kernels.forward_kernel, None),
    "backward rows": (adapter_kernels.backward_rows_kernel, None),
    "backward columns": (adapter_kernels.backward_columns_kernel, None),
    "finish": (
        adapter_kernels.finish_kernel,
        {"C": triton_adapter.FINISH_COLUMNS, "PARTS": triton_adapter.FINISH_PARTS},
    ),
}


def compile_all(widths: list[int], dims: list[int], norms: list[int], archs: list[str], cases: list[str]) -> list[dict]:
    """Compiles each kernel once for all sizes that share its code: widths that 16 divides or not, bottlenecks padded to
    the same height."""
    alignments, heights = (
        sorted({width % 16 == 0 for width in widths}),
        sorted({triton_adapter.padded_dim(dim) for dim in dims}),
    )
    return [
        {
            "kernel": name,
            "case": case,
            "norm": bool(norm),
            "height": height,
            "aligned": aligned,
            "arch": arch,
            **_compile(name, CASES[case], bool(norm), height, aligned, ARCHITECTURES[arch]),
        }
        for name in KERNELS
        for case in cases
        for norm in norms
        for height in heights
        for aligned in alignments
        for arch in archs
    ]


def _compile(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], norm: bool, height: int, aligned: bool, capability: int
) -> dict:
    kernel, fixed = KERNELS[name]
    constants = {
        "NORM": norm,
        "BIAS": True,
        "H": height,
        "WIDEN": False,
        "NEEDS_DX": True,
        **(fixed or triton_adapter.launches(*dtypes, height, aligned)[name].constants),
    }
    num_warps = constants.get("num_warps", 4)
    # The innermost stride is 1, which a launch notices by itself.
    constants = {
        key: value
        for key, value in {**constants, "stride_column": 1, "dy_stride_column": 1}.items()
        if key in kernel.arg_names
    }
    states, products = ({torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype] for dtype in dtypes)
    types = {
        **dict.fromkeys(OF_STATES, states),
        **dict.fromkeys(OF_PRODUCTS, products),
        **dict.fromkeys(FP32, "*fp32"),
        "scale": "fp32",
        "eps": "fp32",
    }
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    divisible = [
        number
        for number, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
        or (aligned and signature[argument] == "i32" and argument not in NOT_SPECIALISED)
    ]
    source = ASTSource(kernel, signature, constants, {(number,): [["tt.divisibility", 16]] for number in divisible})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    registers, spills = _resources(compiled.asm["cubin"])
    return {"registers": registers, "spills": spills, "shared_bytes": compiled.metadata.shared, "warps": num_warps}


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread, which is what spills) as the assembler's own tool reads them
    off a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def bytes_moved(rows: int, width: int, dim: int, norm: bool, size: int = 2) -> dict[str, float]:
    """Bytes that the kernels ask of the device's memory in bf16, and the least that any could.

    The least: x in and y out; dy and x in, dx out; and each weight and gradient once. Ours are more by `packed`,
    `hidden` and dhidden, one number a row for the norm, the partial sums of the weights' gradients, and by dy and x (dy
    alone without a norm) once more in backward, of which the cache still holds the last part. That the second reading
    of x in forward comes from the cache is arithmetic here, not a measurement.
    """
    states, weights, height = rows * width * size, 4 * (2 * width * dim + width + dim), triton_adapter.padded_dim(dim)
    shares, _ = triton_adapter.row_shares(
        rows,
        width,
        triton_adapter.launches(torch.bfloat16, torch.bfloat16, height, width % 16 == 0)["backward columns"],
    )
    packed, small, sums = (
        2 * height * width * size,
        rows * (height * size + 4 * norm),
        4 * shares * (2 * width * height + width),
    )
    least = {"forward": 2 * states + weights, "backward": 3 * states + 2 * weights}
    ours = {
        "forward": least["forward"] + 2 * packed + small,
        "backward": (4 + norm) * states + packed + weights + 4 * small + 2 * sums,
    }
    return {
        **ours,
        **{f"{name}_least": value for name, value in least.items()},
        **{f"{name}_ratio": ours[name] / least[name] for name in least},
    }


def time_all(widths: list[int], dims: list[int]) -> list[dict]:
    """Medians in microseconds on this machine's GPU; `floor_both` is forward's and backward's together."""
    results = []
    for width in widths:
        states = torch.empty(ROWS, width, device="cuda", dtype=torch.bfloat16)
        per_byte = microseconds(states.clone) / (2 * states.numel() * states.element_size())
        for dim in dims:
            moved = bytes_moved(ROWS, width, dim, norm=True)
            floors = {
                "floor_forward": per_byte * moved["forward_least"],
                "floor_both": per_byte * (moved["forward_least"] + moved["backward_least"]),
            }
            results.append({"width": width, "dim": dim, "rows": ROWS, **_time_one(width, dim), **floors})
    return results


def _time_one(width: int, dim: int) -> dict[str, float]:
    norm_weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(ROWS, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [
        torch.randn(shape, device="cuda", requires_grad=True)
        for shape in ((dim, width), (dim,), (width, dim), (width,))
    ]
    upstream = torch.randn_like(x)

    def eager(states):
        down, down_bias, up, up_bias = (weight.to(torch.bfloat16) for weight in weights)
        z = torch.nn.functional.rms_norm(states, (width,), norm_weight, 1e-6)
        return torch.addmm(z, torch.nn.functional.linear(z, down, down_bias), up.t()) + up_bias

    compiled = torch.compile(eager)
    results = {}
    for name, function in {
        "fused": lambda states: fused_adapter(states, *weights, norm_weight=norm_weight),
        "eager": eager,
        "compile": compiled,
    }.items():
        results[f"{name}_forward"] = microseconds(lambda function=function: function(x.detach()))
        results[f"{name}_both"] = microseconds(lambda function=function: function(x).backward(upstream))
    return results


def microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    emptied = torch.empty(2**27, dtype=torch.uint8, device="cuda")  # more than any cache holds
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(10**8)  # some 60 ms, in which the CPU gets ahead
    for start, end in events:
        emptied.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1000 * start.elapsed_time(end) for start, end in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 5120])
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument(
        "--norms", type=int, nargs="+", default=[0, 1], choices=(0, 1), help="1: the RMSNorm before it is taken in"
    )
    parser.add_argument("--archs", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--compile-only", action="store_true", help="do not time, even where a GPU is")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {"compiled": compile_all(given.widths, given.dims, given.norms, given.archs, given.cases)}
    found["bytes"] = [
        {"width": width, "dim": dim, "norm": bool(norm), **bytes_moved(ROWS, width, dim, bool(norm))}
        for width in given.widths for dim in given.dims for norm in given.norms
    ]  # fmt: skip
    if torch.cuda.is_available() and not given.compile_only:
        found["times"] = time_all(given.widths, given.dims)
    for rows in found.values():
        show(rows)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

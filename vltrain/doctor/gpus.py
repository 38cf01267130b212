"""The GPUs: what they are, what is free, and how fast they multiply."""

from __future__ import annotations

import torch

from vltrain.distributed.hardware import cpu_has_fast_bf16, data_sheet_flops, measured_gemm_flops
from vltrain.distributed.rates import keep_rate, own_device
from vltrain.doctor.findings import OK, PROBLEM, WARNING, Finding

GIB = 2**30
PRODUCT_SIZE = 8192
LEAST_FREE = 0.8  # of a GPU's memory, before others are said to use it
LEAST_SPEED = 0.4  # of the data sheet's, before something is said to slow it down


def examine_gpu(index: int, what: str = "GPU") -> Finding:
    """One GPU: name, compute capability, memory, and its bf16 product beside the data sheet's."""
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    numbers = {"free_gib": free / GIB, "total_gib": total / GIB}
    found = f"{name}, compute capability {major}.{minor}, {{free_gib}} of {{total_gib}} GiB free"
    if free < 3 * PRODUCT_SIZE**2 * 2 + GIB:
        return Finding(
            status=PROBLEM,
            what=what,
            found=f"{found}, too little to try it",
            do="end the processes that use it (nvidia-smi)",
            numbers=numbers,
        )
    speed = measured_gemm_flops(torch.bfloat16, PRODUCT_SIZE, place=torch.device("cuda", index))
    torch.cuda.empty_cache()
    keep_rate(name, "bf16", speed)
    numbers["bf16_tflops"] = speed / 1e12
    sheet = data_sheet_flops(name)
    found += ", bf16 {bf16_tflops} TFLOP/s" + (f" (data sheet {sheet / 1e12:.0f})" if sheet else "")
    if major < 8:
        return Finding(
            status=WARNING,
            what=what,
            found=found,
            needed="8.0 for bf16 and flash-attn",
            do="train.precision fp32 is right here",
            numbers=numbers,
        )
    if free < LEAST_FREE * total:
        return Finding(
            status=WARNING, what=what, found=found, do="other processes hold memory (nvidia-smi)", numbers=numbers
        )
    if sheet and speed < LEAST_SPEED * sheet:
        return Finding(
            status=WARNING, what=what, found=found, needed=f"{LEAST_SPEED * sheet / 1e12:.0f} TFLOP/s", numbers=numbers,
            do="look for other processes, a power limit or heat (nvidia-smi -q -d PERFORMANCE)",
        )  # fmt: skip
    return Finding(status=OK, what=what, found=found, numbers=numbers)


def examine_cpu() -> Finding:
    """Products on the CPU, for ranks without a GPU."""
    fp32, bf16 = (
        measured_gemm_flops(dtype, 512, place=torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)
    )
    if not torch.cuda.is_available():
        keep_rate(own_device(), "fp32", fp32)
        keep_rate(own_device(), "bf16", bf16)
    chosen = "bf16" if cpu_has_fast_bf16() else "fp32"
    slow = chosen == "bf16" and bf16 < fp32 / 2
    return Finding(
        status=WARNING if slow else OK, what="CPU products", do="--train.precision fp32" if slow else "",
        found=f"fp32 {{fp32_gflops}} GFLOP/s, bf16 {{bf16_gflops}}; train.precision auto takes {chosen} on the CPU",
        numbers={"fp32_gflops": fp32 / 1e9, "bf16_gflops": bf16 / 1e9},
    )  # fmt: skip

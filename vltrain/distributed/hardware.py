"""What this machine can do: its device, the precision it is fast at, and its peak speed (for MFU)."""

from __future__ import annotations

import logging
import os
import re
import time

import torch

logger = logging.getLogger(__name__)

# Dense FLOP/s of one device in bf16 and in plain fp32, from the vendors' data sheets, by words of the name that torch
# reports.
GPU_PEAK_FLOPS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "H800": (989e12, 67e12),
    "L40S": (362e12, 91.6e12),
    "A40": (150e12, 37.4e12),
    "A10": (125e12, 31.2e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices faster than fp32 ones, as AMX does. AVX512-BF16 alone does not: on a
    Xeon that has it products in bf16 took 1.7 to 2.1 times as long; without either bf16 is some 50 times slower.

    From what the CPU is and not from a measurement, which could come out otherwise the next time.
    """
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        flags = ""
    return "amx_bf16" in flags


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_dtype(
    precision: str, bits: int | None = None, begun: str | None = None, *, place: torch.device | None = None
) -> torch.dtype:
    """The dtype of matrix products for `train.precision` and `model.bits`, and of frozen weights where the bits leave
    it open.

    Args:
        begun: a name of `PRECISIONS` that the run computed in until now: what `auto` goes on meaning on whichever
            machine.
        place: where it is computed; None: on this rank's device.

    fp32 is fp32 everywhere: TF32, which torch allows cuDNN's convolutions unless told otherwise, is switched off.
    """
    torch.backends.cudnn.allow_tf32 = False
    if precision == "auto" and begun in PRECISIONS:
        logger.info("precision: %s (train.precision auto: as the run began)", PRECISIONS[begun])
        return PRECISIONS[begun]
    if precision == "auto" and bits == 16:
        return torch.bfloat16
    if precision == "auto":
        kind = (place or device()).type
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else cpu_has_fast_bf16()
        chosen = torch.bfloat16 if fast else torch.float32
        logger.info(
            "precision: %s (train.precision auto: this %s is %sfast at bf16)", chosen, kind, "" if fast else "not "
        )
        return chosen
    return PRECISIONS[precision]


def limit_threads(local_world_size: int) -> None:
    """Shares the CPU's cores between the ranks of this node. Unset, every rank would take all cores and they would
    thrash."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))


def peak_flops(dtype: torch.dtype) -> float:
    """Peak FLOP/s of this rank's device: the data sheet's for a known GPU, else a measured matrix product.

    fp32 is plain fp32: TF32 stays off, as torch has it, since it keeps 10 bits of what is multiplied, and fp32 is asked
    for to be exact.
    """
    flops = data_sheet_flops(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None
    return measured_gemm_flops(dtype) if flops is None else flops


def data_sheet_flops(name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Dense FLOP/s of a GPU in bf16 or fp32, by the name that torch reports; None for one that is not in the table."""
    place = {torch.bfloat16: 0, torch.float32: 1}[dtype]
    return next((flops[place] for part, flops in GPU_PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def measured_gemm_flops(
    dtype: torch.dtype, size: int = 1024, repeats: int = 5, place: torch.device | None = None
) -> float:
    """FLOP/s of a square matrix product on `place` (None: this rank's device), the best of `repeats`."""
    place = device() if place is None else place
    a = torch.randn(size, size, device=place, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        start = time.perf_counter()
        a @ a
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes() -> int:
    """Most memory this rank has held: on a GPU torch's allocations, on a CPU the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""How the fused adapter's kernels (`vltrain.ops.triton_adapter`) are cut up into programs, by shapes and dtypes
alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

MIN_DOT = 16  # the smallest side of a matrix product on tensor cores
COLUMNS_PROGRAMS = 512  # at least, of the kernel by columns: some for each multiprocessor of the largest cards


class Launch(NamedTuple):
    """How a kernel is cut up: rows of a block, columns of a chunk, warps, and chunks that are on their way at a
    time."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"B": self.rows, "C": self.columns, "STAGES": self.stages, "num_warps": self.warps}


def launches(states: torch.dtype, products: torch.dtype, height: int, aligned: bool) -> dict[str, Launch]:
    """Of each kernel, by the dtypes of states and products, H, and `is_aligned`: among those without spills, in bf16
    the fastest on an H100, all widths and numbers of rows taken together. Single numbers instead of 16 bytes at a time
    take more registers, and so do fp32 products, which run off the tensor cores: smaller blocks."""
    if products == torch.float32 or not aligned:
        by_rows, by_columns = (
            Launch(16, 64 if aligned else 32, 4, 2),
            Launch(16, 32 if products == torch.float32 and not aligned else 64, 4, 2),
        )
        return {"forward": by_rows, "backward rows": by_rows, "backward columns": by_columns}
    narrow = states == torch.bfloat16 and height == MIN_DOT
    return {
        "forward": Launch(32, 128, 2, 4) if height == MIN_DOT else Launch(32, 128, 4, 3),
        "backward rows": Launch(64, 128, 8, 3),
        "backward columns": Launch(64, 32, 4, 3) if narrow else Launch(16, 64, 2, 3),
    }


def padded_dim(dim: int) -> int:
    """H of a bottleneck of `dim`."""
    return max(MIN_DOT, triton.next_power_of_2(dim))


def is_aligned(*states: Tensor) -> bool:
    """Whether the rows of [N, d] tensors can be read 16 bytes at a time, as Triton sees it."""
    return all(
        tensor.stride(1) == 1 and tensor.stride(0) % 16 == tensor.shape[1] % 16 == tensor.data_ptr() % 16 == 0
        for tensor in states
    )


def row_shares(num_rows: int, width: int, launch: Launch) -> tuple[int, int]:
    """(shares that the kernel by columns cuts the rows into, rows of a share, a multiple of its block); by shapes
    alone."""
    wanted = triton.cdiv(COLUMNS_PROGRAMS, triton.cdiv(width, launch.columns))
    share_rows = (
        triton.cdiv(triton.cdiv(num_rows, min(wanted, triton.cdiv(num_rows, launch.rows))), launch.rows) * launch.rows
    )
    return triton.cdiv(num_rows, share_rows), share_rows

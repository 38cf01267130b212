"""`train.deterministic`: the same run on the same machine gives the same bits.

torch then takes deterministic algorithms, or raises where it has none; cuBLAS keeps its workspace fixed; flash-attn
sums the gradient of keys and values in a fixed order. Our own operations need none of it (see `vltrain.ops.rows`, and
the Triton kernel adds without atomics). On a CPU, where one thread sums in order anyway, nothing changes.

Out of its reach: Liger's kernels; another GPU model, library or number of ranks, which sum in another order. What it
costs: slower attention gradients, and convolutions, which happen once an image.
"""

from __future__ import annotations

import hashlib
import os

import torch

from vltrain.errors import InputError

SEED_BITS = 24  # of a recipe's seed that stand as they are in a step's
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # the ones that cuBLAS is deterministic with


def step_seed(seed: int, step: int, rank: int) -> int:
    """What torch's generator is seeded with for a step: the recipe's seed, the step and the rank side by side in 64
    bits; a seed of more than 24 bits is hashed to fit."""
    if seed >> SEED_BITS:
        seed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[: SEED_BITS // 8], "big")
    return (seed << 64 - SEED_BITS) + (step << 16) + rank


def set_determinism(wanted: bool) -> None:
    """Makes this process deterministic, or not. Before anything runs on CUDA, since cuBLAS reads its setting once.

    Raises: InputError if CUBLAS_WORKSPACE_CONFIG is set to something with which cuBLAS is not deterministic.
    """
    if wanted:
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
        if workspace not in CUBLAS_WORKSPACES:
            raise InputError(
                f"CUBLAS_WORKSPACE_CONFIG: found '{workspace}', but train.deterministic needs "
                f"{' or '.join(CUBLAS_WORKSPACES)}; "
                "unset it, or set train.deterministic to false"
            )
        torch.backends.cudnn.benchmark = False
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = str(int(wanted))  # transformers hands it on to flash-attn
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # costs a pass over each new tensor; we read none that is unwritten
    )

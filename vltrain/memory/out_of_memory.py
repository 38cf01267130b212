"""Out of memory, told in words: which pack it was, how large, and what makes packs or the model smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vltrain.batch import Batch
from vltrain.errors import InputError

NAMED_SAMPLES = 8


class OutOfMemory(InputError):
    """A pack that is too large for this machine and this recipe."""


@contextmanager
def oom_context(batch: Batch, *, step: int, rank: int) -> Iterator[None]:
    """Turns running out of memory inside the block into an InputError: names the pack, its tokens, images and samples,
    and gives advice."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        names = ", ".join(batch.sample_ids[:NAMED_SAMPLES])
        more = f" and {len(batch.sample_ids) - NAMED_SAMPLES} more" if len(batch.sample_ids) > NAMED_SAMPLES else ""
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(
            f"step {step}, rank {rank}: out of memory at a pack of {len(batch.input_ids)} tokens and "
            f"{len(batch.pixels)} images "
            f"(samples {names}{more}): {first_line}. Lower data.pack_length or data.max_images (the packs are "
            "made anew), set "
            "train.activation_checkpointing, take model.bits 4 or 8, or a higher ZeRO stage or one with offload "
            "(ds_configs/); "
            "`vltrain plan` says beforehand what fits"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA's has its own class; the CPU's allocator, and libraries' own, raise RuntimeError with a text."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in text
        for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
    )

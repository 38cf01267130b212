"""Answers in fp32 from a model that trains in bf16: `eval.precision: fp32`.

A product of matrices sums in an order that depends on how many rows it has. In bf16 that shows in the third digit of a
logit, so that of two nearly equal tokens either may win, depending on how many questions are answered at once; in fp32
it shows in the seventh. Here frozen weights that are kept in bf16 are widened while answers are made, which loses
nothing, autocast is off, and attention that knows no fp32 gives way to SDPA.

Trade-off: twice as many bytes for each weight in bf16 besides those that are kept, and the speed of fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vltrain.config.schema import Config
from vltrain.distributed.hardware import choose_dtype
from vltrain.models.interface import VisionLanguageModel

HALVES = (torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


def loaded_dtype(config: Config, place: torch.device | None = None) -> torch.dtype:
    """`choose_dtype` of a run that is to answer; the log says so where answers are computed in another."""
    dtype = choose_dtype(config.train.precision, config.model.bits, place=place)
    if config.eval.precision == "fp32" and dtype != torch.float32:
        logger.info("precision of answers: %s (eval.precision fp32)", torch.float32)
    return dtype


@contextmanager
def products_in_fp32(model: VisionLanguageModel, device: torch.device | str) -> Generator[None]:
    """Inside the block the model computes in fp32 with the numbers that its weights have; afterwards it is as it was,
    its tensors the same ones."""
    with widened(model), torch.autocast(torch.device(device).type, enabled=False):
        yield


@contextmanager
def widened(model: VisionLanguageModel) -> Generator[None]:
    """`products_in_fp32` but for autocast, which is a thread's and may be on."""
    halves: list[tuple[Tensor, Tensor]] = [(one, one.data) for one in _floats(model) if one.dtype in HALVES]
    assert not any(hasattr(one, "ds_tensor") for one, _ in halves), (
        "weights that ranks share cannot be widened; vltrain train refuses it"
    )
    settings = model.llm.config
    attention = settings._attn_implementation
    try:
        for one, data in halves:
            one.data = data.float()
        settings._attn_implementation = model.fp32_attention
        yield
    finally:
        settings._attn_implementation = attention
        for one, data in halves:
            one.data = data


def _floats(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()

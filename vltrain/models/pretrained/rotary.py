"""Rotary frequencies: what the config of a LLaMA, or of an LLM with its rotary embedding, means, and what files hold of
them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# How far a frequency may be off by the precision that it was saved in.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def rotary_frequencies(config: Any) -> tuple[Tensor, ...]:
    """The frequencies [d / 2] that a LLaMA of these sizes rotates by, and those that a file may hold of it: before
    scaling, which older releases applied to positions instead. () where blocks have frequencies of several kinds, which
    no file holds."""
    if "rope_theta" not in config.rope_parameters:
        return ()
    plain = copy.deepcopy(config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    with torch.device("cpu"):
        return tuple(LlamaRotaryEmbedding(one).inv_freq for one in (config, plain))


def same_frequencies(found: Tensor, due: Tensor) -> bool:
    """Whether rotary frequencies [d / 2] are those, but for the precision that they were saved in."""
    rounding = ROUNDING.get(found.dtype)
    return (
        rounding is not None
        and found.shape == due.shape
        and torch.allclose(found.double(), due.double().cpu(), rtol=rounding, atol=1e-7)
    )

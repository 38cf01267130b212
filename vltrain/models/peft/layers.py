"""peft's layers, and how to tell them. peft is imported when the first one is made: it loads more than a second of what
most runs have no use for.

LoRA's layer is peft's `lora.Linear`, AdaLoRA's its `SVDLinear`, which has an E besides; an attention with
LLaMA-Adapter's prompts its `AdaptedAttention`.
"""

from __future__ import annotations

import functools
import logging
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

LoraKind: TypeAlias = Literal["lora", "dora", "rslora", "pissa"]
NAME = "default"  # peft's name of a layer's first, here only, update


def has_lora(module: nn.Module) -> bool:
    """Whether it is a linear layer with LoRA."""
    return hasattr(module, "lora_A") and not hasattr(module, "lora_E")


def has_adalora(module: nn.Module) -> bool:
    """Whether it is a linear layer with AdaLoRA."""
    return hasattr(module, "lora_E")


def has_prompts(module: nn.Module) -> bool:
    """Whether it is an attention with prompts."""
    return hasattr(module, "adaption_prompt")


def lora_linear(linear: nn.Module, *, rank: int, alpha: float, dropout: float, kind: LoraKind = "lora") -> nn.Module:
    """A linear layer with LoRA around `linear`, or one of its variants; B is zero, except with `pissa`, which takes A
    B out of the layer's own weight."""
    peft = load_peft()
    on_meta = next(linear.parameters()).is_meta  # an outline, which has no singular values
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
        init_lora_weights="pissa" if kind == "pissa" and not on_meta else True,
    )
    layer = peft.tuners.lora.Linear(linear, NAME, config=settings, r=rank, lora_alpha=alpha)
    for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
        # It reads the layer's weight without calling the layer; ZeRO-3 asks for such.
        magnitude.borrowed_parameters = partial(_parameters_of, linear)
    return layer


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())


def adalora_linear(linear: nn.Module, *, rank: int, alpha: float, dropout: float) -> nn.Module:
    """A linear layer with AdaLoRA around `linear`, of the rank that it starts with; E is zero."""
    # Schedule and target rank are the allocator's; peft's layer has only the first rank, and wants a length of the run
    # to be named.
    peft = load_peft()
    settings = peft.AdaLoraConfig(
        init_r=rank, target_r=max(1, rank - 1), total_step=1, lora_alpha=alpha, lora_dropout=dropout
    )
    return peft.tuners.adalora.SVDLinear(linear, NAME, config=settings, r=rank, lora_alpha=alpha)


def attention_with_prompts(attention: nn.Module, adapter_len: int) -> nn.Module:
    """A LLaMA's attention with `adapter_len` prompts, whose gate is zero."""
    return _prompted_attention()(attention, adapter_len)


def load_peft() -> ModuleType:
    # It imports bitsandbytes where that is installed, which on some CPUs warns of a kernel that it does well without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import peft

    return peft


@functools.cache
def _prompted_attention() -> type[Any]:
    class AdaptedLlamaAttention(load_peft().tuners.adaption_prompt.AdaptedAttention):
        """peft's attention with prompts, around any LLaMA attention.

        Its own constructor asks the query projection's weight for a dtype and the first parameter for a device;
        quantised layers have neither. What it computes is peft's.
        """

        def __init__(self, attention: nn.Module, adapter_len: int) -> None:
            nn.Module.__init__(self)
            self.model_type, self.model, self.adapter_len = "llama", attention, adapter_len
            self.num_heads = attention.config.num_attention_heads
            self.adaption_prompt = nn.Parameter(torch.empty(1, adapter_len, attention.config.hidden_size).normal_())
            self.adaption_gate = nn.Parameter(torch.zeros(1))

    return AdaptedLlamaAttention

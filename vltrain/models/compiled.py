"""torch.compile for the transformer blocks of ViT and LLM; of a stock model for those of its LLM.

Blocks are compiled, not the model: all of a network's share one graph, whose sizes are symbols, so that packs of any
length go through it.
Attention stays out (its calls follow a row's segments), and so do embeddings, neck and the head's loss, whose shapes
differ from pack to pack.
Evaluation, where lengths grow by a token at a time, runs as it is written, by Liger's kernels where those are: in
compiled blocks norms, rotary embedding and SwiGLU are plain operations, which torch.compile fuses.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vltrain.config.schema import Config
from vltrain.errors import InputError
from vltrain.models.architectures import architecture_of
from vltrain.models.interface import VisionLanguageModel
from vltrain.ops.attention import FORWARDS

logger = logging.getLogger(__name__)

GRAPHS = (
    32  # of one piece of a block: with and without gradients, one image or several, one segment or several, each once
)


def require_compilable(config: Config, zero_stage: int) -> None:
    """Raises InputError if `train.compile` is on with something that it was not made for."""
    if not config.train.compile:
        return
    model = config.model
    not_compilable = architecture_of(model).not_compilable(model)
    reasons = {
        "ZeRO 3, which cuts the weights up that a graph would hold": zero_stage == 3,
        str(not_compilable): not_compilable is not None,
        "train.activation_checkpointing, under which the LLM's blocks would stay as they are": (
            config.train.activation_checkpointing
        ),
        f"model.bits {model.bits}": model.bits in (4, 8),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"train.compile: found true together with {reason}; leave one of both out")


def compile_blocks(model: VisionLanguageModel, backend: str = "inductor") -> None:
    """Compiles every block that runs, in place, at its first forward; parameters and their names stay what they are."""
    theirs = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name.startswith("flash_attention_")]
    for name, attention in {**FORWARDS, **dict.fromkeys(theirs, flash_attention_forward)}.items():
        AttentionInterface.register(name, torch.compiler.disable(attention))
    blocks = model.compilable_blocks
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 8 * GRAPHS
    logger.info(
        "%d of %d blocks are compiled, norms, rotary embedding and SwiGLU with them; %sevaluation runs as written",
        len(blocks),
        len(model.blocks),
        "the others and " if len(blocks) < len(model.blocks) else "",
    )
    for block in blocks:
        block.compile(dynamic=True, backend=backend)


def uncompiled(config: Config) -> AbstractContextManager[Any]:
    """A context in which compiled blocks run as they are written."""
    return torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()

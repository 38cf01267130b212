"""Which kernels a run began with: where its recipe leaves the choice open (`auto`), a later life takes them again,
whatever this machine, its packages, its threads or this version would choose. Kernels differ by rounding, so that steps
after a change are no longer those of the undisturbed run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from vltrain.config.model.base import ModelConfig
from vltrain.models.interface import VisionLanguageModel
from vltrain.ops.attention_choice import setting_of
from vltrain.train.checkpoints.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

KEPT = "kernels"
"""Of a checkpoint's `run_state`."""
BEFORE_KEPT = {"attention": "sdpa"}
"""What `auto` chose on CPUs while checkpoints did not say it."""


def chosen_kernels(model: VisionLanguageModel) -> dict[str, str]:
    """The last word of a key of `ModelConfig.KERNELS` -> what it came to, as the setting names it."""
    return {"attention": setting_of(model.llm.config._attn_implementation), "kernels": model.kernels}


def kernels_as_begun(
    model: ModelConfig, checkpoint: Checkpoint | None, given: Collection[str], runs_on: torch.device
) -> ModelConfig:
    """The section with the kernels that the checkpoint's run had, where it says `auto`; each is told.

    Args:
        given: the dotted keys that the recipe or the command line sets: `auto` there chooses anew.
    """
    if checkpoint is None:
        return model
    before = checkpoint.run_state.get(KEPT, BEFORE_KEPT if runs_on.type == "cpu" else {})
    for key in model.KERNELS:
        section, name = key.split(".")
        inner: Any = getattr(model, section)
        if f"model.{key}" in given or getattr(inner, name) != "auto" or name not in before:
            continue
        logger.info("model.%s: %s, as the run began; --model.%s auto chooses anew", key, before[name], key)
        model = replace(model, **{section: replace(inner, **{name: before[name]})})
    return model

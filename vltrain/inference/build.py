"""A recipe and trained weights become a model that answers: what evaluation, questions and servers share."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from vltrain.config.model.base import ModelConfig
from vltrain.config.schema import Config
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.models.build import build_model
from vltrain.models.interface import VisionLanguageModel
from vltrain.train.checkpoints.checkpoint import Checkpoint, load_trainable
from vltrain.train.run.fits import require_qformer_positions, require_tokenizer_fits

logger = logging.getLogger(__name__)

ANYWHERE = ("auto", "torch", "eager", "sdpa")


def anywhere(config: Config) -> Config:
    """The recipe without kernels that only some machines have, which change an answer no more than rounding; what is
    changed is told."""
    model = config.model
    for key in model.KERNELS:
        section, name = key.split(".")
        found = getattr(getattr(model, section), name)
        if found not in ANYWHERE:
            logger.info("model.%s: the run's recipe says %s, answers are made with auto", key, found)
            model = _with(model, section, name, "auto")
    return dataclasses.replace(config, model=model)


def _with(model: ModelConfig, section: str, name: str, value: Any) -> ModelConfig:
    return dataclasses.replace(model, **{section: dataclasses.replace(getattr(model, section), **{name: value})})


def answering_model(
    config: Config, tokenizer: Tokenizer, weights: Checkpoint | None, *, dtype: torch.dtype, place: torch.device
) -> VisionLanguageModel:
    """The model of a recipe on `place`, in evaluation mode.

    Args:
        weights: trained ones; None: those that training begins with.
        dtype: of matrix products, see `vltrain.models.build.build_model`.

    Raises: InputError if tokenizer, template, model and weights do not belong together, and what `build_model` raises.
    """
    outline = build_model(config.model, dtype=dtype, device="meta", runs_on=place)
    require_tokenizer_fits(config, tokenizer, outline)
    require_qformer_positions(config, outline)
    model = build_model(config.model, dtype=dtype, runs_on=place).to(place).eval()
    if weights is not None:
        load_trainable(model, weights)
    return model

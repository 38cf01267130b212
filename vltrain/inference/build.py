"""A recipe and trained weights become a model that answers: what evaluation, questions and servers share."""

from __future__ import annotations

import torch

from vltrain.config import Config
from vltrain.data.tokenizer import Tokenizer
from vltrain.models.build import AnyModel, build_model
from vltrain.train.checkpoint import Checkpoint, load_trainable
from vltrain.train.fits import require_qformer_positions, require_tokenizer_fits


def answering_model(config: Config, tokenizer: Tokenizer, weights: Checkpoint | None, *, dtype: torch.dtype, place: torch.device) -> AnyModel:
    """The model of a recipe on `place`, in evaluation mode.

    Args:
        weights: trained ones; None: those that training begins with.
        dtype: of matrix products, see `vltrain.models.build.build_model`.

    Raises: InputError if tokenizer, template, model and weights do not belong together, and what `build_model` raises.
    """
    outline = build_model(config.model, dtype=dtype, device="meta", runs_on=place)
    require_tokenizer_fits(config, tokenizer, outline)
    require_qformer_positions(config, outline)
    model = build_model(config.model, dtype=dtype, runs_on=place)
    if weights is not None:
        load_trainable(model, weights)
    return model.to(place).eval()

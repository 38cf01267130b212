"""A run's folder becomes a model that can be asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from vltrain.data.tokenizer import load_tokenizer
from vltrain.data.tokenizer_sources import tokenizer_sources
from vltrain.errors import InputError
from vltrain.inference.build import answering_model
from vltrain.inference.model import LoadedModel
from vltrain.inference.run import choose_checkpoint, recipe_of, weights_before, weights_used
from vltrain.recipe import checked_value
from vltrain.train.hardware import choose_dtype, device as own_device
from vltrain.train.made_of import made_of


def load(
    run: str | Path, *, checkpoint: str | Path | None = None, bits: Literal[4, 8, 16, 32] | None = None, device: str | torch.device | None = None
) -> LoadedModel:  # fmt: skip
    """The tuned model of a run, ready to be asked.

    Args:
        run: its folder.
        checkpoint: a checkpoint's folder, `best`, or `none` for the model before tuning; None: the run's newest whole one.
        bits: of the frozen weights, as `model.bits`; None: the recipe's.
        device: where it computes; None: the GPU where there is one, else the CPU.

    Raises: InputError for a folder that is no run, a checkpoint that is missing or damaged, frozen weights or a tokenizer that changed since the
        training, and bits or a device that this machine cannot do.
    """
    folder = Path(run).expanduser()
    config, changed = recipe_of(folder), []
    if bits is not None:
        bits, changed = checked_value("model.bits", bits, "load"), ["model.bits"]
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, bits=bits))
    place = _place(device)
    weights = choose_checkpoint(folder, None if checkpoint is None else str(checkpoint))
    facts = weights_used(folder, config, weights, made_of(config), changed)
    tokenizer = load_tokenizer(*tokenizer_sources(config))
    dtype = choose_dtype(config.train.precision, config.model.bits)
    model = answering_model(config, tokenizer, weights or weights_before(folder, config), dtype=dtype, place=place)
    return LoadedModel(model, tokenizer, config, run=folder, facts=facts, device=place, dtype=dtype)


def _place(device: str | torch.device | None) -> torch.device:
    if device is None:
        return own_device()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"device: found {str(device)!r}, which cannot be used here ({reason}); expected cpu, or cuda where there is a GPU") from None
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device: found {str(device)!r}, expected cpu, cuda or cuda:N")
    return place

"""A run's folder becomes a model that can be asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from vltrain.config.keys import checked_value
from vltrain.config.stages import last_stage
from vltrain.data.reading import recipe_tokenizer, sample_encoder
from vltrain.distributed.hardware import device as own_device
from vltrain.errors import InputError
from vltrain.evaluate.answering.precision import loaded_dtype
from vltrain.inference.build import answering_model, anywhere
from vltrain.inference.model import LoadedModel
from vltrain.inference.run import choose_checkpoint, how_run_was_asked, recipe_of, weights_before, weights_used
from vltrain.train.checkpoints.checkpoint import Checkpoint, load_trainable
from vltrain.train.run.adapters_folder import open_adapters
from vltrain.train.run.made_of import made_of


def load(
    run: str | Path,
    *,
    checkpoint: str | Path | None = None,
    adapters: str | Path | None = None,
    bits: Literal[4, 8, 16, 32] | None = None,
    device: str | torch.device | None = None,
    keep_untuned: bool = False,
) -> LoadedModel:
    """The tuned model of a run, ready to be asked.

    Args:
        run: its folder; or one that `vltrain export --format adapters` wrote.
        checkpoint: a checkpoint's folder, `best`, or `none` for the model before tuning; None: the run's newest whole
            one.
        adapters: a folder of `vltrain export --format adapters`, whose weights are taken in place of a checkpoint's.
        bits: of the frozen weights, as `model.bits`; None: the recipe's.
        device: where it computes; None: the GPU where there is one, else the CPU.
        keep_untuned: keep a copy of the trained weights as they were before tuning, for `LoadedModel.untuned`.

    Raises: InputError for a folder that is no run, a checkpoint that is missing or damaged, frozen weights or a
    tokenizer that changed since the
        training, and bits or a device that this machine cannot do.

    >>> import vltrain
    >>> model = vltrain.load("runs/quickstart", device="cpu")
    >>> answer = model.ask(["shape.png"], "what color is the shape?", max_new_tokens=4)
    >>> len(answer.logprobs) == len(answer.token_ids) <= 4
    True
    """
    folder = last_stage(Path(run).expanduser())
    config, changed = anywhere(recipe_of(folder)), []
    if bits is not None:
        bits, changed = checked_value("model.bits", bits, "load"), ["model.bits"]
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, bits=bits))
    place = _place(device)
    weights = _tuned(folder, checkpoint, adapters)
    facts = weights_used(folder, config, weights, made_of(config), changed)
    asked = how_run_was_asked(folder, config)
    tokenizer = recipe_tokenizer(config)
    dtype = loaded_dtype(config, place)
    before = weights_before(folder, config) if weights is None or keep_untuned else None
    model = answering_model(config, tokenizer, before if keep_untuned else weights or before, dtype=dtype, place=place)
    untuned = (
        {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
        if keep_untuned
        else None
    )
    if untuned is not None and weights is not None:
        load_trainable(model, weights)
    encoder = sample_encoder(config, tokenizer, model)
    return LoadedModel(
        model, encoder, config, run=folder, facts=facts, device=place, dtype=dtype, asked=asked, untuned=untuned
    )


def _tuned(folder: Path, checkpoint: str | Path | None, adapters: str | Path | None) -> Checkpoint | None:
    if adapters is None:
        return choose_checkpoint(folder, None if checkpoint is None else str(Path(checkpoint).expanduser()))
    if checkpoint is not None:
        raise InputError(
            f"adapters: found {str(adapters)!r} beside checkpoint {str(checkpoint)!r}: both say which weights "
            "answer; leave one out"
        )
    return open_adapters(Path(adapters).expanduser())[1]


def _place(device: str | torch.device | None) -> torch.device:
    if device is None:
        return own_device()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a build without CUDA asserts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"device: found {str(device)!r}, which cannot be used here ({reason}); expected cpu, or cuda where "
            "there is a GPU"
        ) from None
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device: found {str(device)!r}, expected cpu, cuda or cuda:N")
    return place

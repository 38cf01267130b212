"""From a recipe's model to a network, of whichever architecture, whose trained parameters are exactly those it means.

Trained parameters are fp32, frozen ones have the dtype asked for; the trainable set is asserted, part by part, before
the model is handed out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vltrain.config.model.base import ModelConfig
from vltrain.models.architectures import architecture_of
from vltrain.models.interface import Place, VisionLanguageModel
from vltrain.models.quantise import QUANTISED_BITS, bitsandbytes, num_weights


@torch.no_grad()
def build_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    device: torch.device | str = "cpu",
    runs_on: torch.device | str | None = None,
    place: Place = None,
) -> VisionLanguageModel:
    """The model of a recipe, in training mode.

    Each unit of the networks (embeddings, a block, the head) gets its weights, is quantised, gets its adapters and is
    placed, in this order, before the next one has weights.

    Args:
        dtype: of matrix products and, where `model.bits` leaves it open, of frozen weights; trained ones are always
            fp32.
        activation_checkpointing: recompute each block in the backward pass.
        device: where it is put; "meta" builds shapes only, to count with, and nothing is quantised.
        runs_on: the device of its forwards, which decides how attention is computed; left out: `device`. What is
            decided is logged, except on "meta": the model that such an outline stands for says it again.
        place: called with each unit that is finished, instead of putting it on `device`; ZeRO-3 cuts it up there.

    Raises: InputError for weights that are missing or do not fit, unknown adapters, and widths that groups do not
    divide.
    """
    return architecture_of(model).build(
        model,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        device=device,
        runs_on=device if runs_on is None else runs_on,
        place=place,
    )


def outline_model(
    model: ModelConfig, runs_on: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> VisionLanguageModel:
    """The model on the meta device, after everything was checked that shows without reading weights: settings, files,
    names, shapes.

    `runs_on` and `dtype` are those of the model that it stands for, see `build_model`: which kernels can run depends on
    both.

    Raises: what `build_model` raises.
    """
    if model.bits in QUANTISED_BITS:
        bitsandbytes()
    architecture_of(model).check_sources(model)
    return build_model(model, dtype=dtype, device="meta", runs_on=runs_on)


def weight_files(model: ModelConfig) -> dict[str, dict[str, Path]]:
    """The files that a recipe's weights are read from, by the setting that names their source and by their name in it;
    none for random weights.

    Raises: InputError as `outline_model`, for sources that are missing or do not fit.
    """
    return architecture_of(model).weight_files(model)


def count_parameters(model: VisionLanguageModel) -> dict[str, tuple[int, int]]:
    """By part: (parameters, trained parameters). A tied weight is counted once."""
    counts: dict[str, tuple[int, int]] = dict.fromkeys(model.PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part = model.part_of(name)
        total, trained = counts[part]
        num = num_weights(parameter)
        counts[part] = (total + num, trained + num * parameter.requires_grad)
    return counts


def count_trained(model: VisionLanguageModel) -> int:
    """How many numbers are trained, also of a model that ZeRO-3 has partitioned."""
    return sum(trained for _, trained in count_parameters(model).values())

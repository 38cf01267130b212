"""Random pictures as a family's own image processor hands them over, made small enough for a small config.

The processor is the family's class with its own defaults; sizes, patches and tiles are those of the config. So no
processor's files are needed, and no picture's format is written down here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto import image_processing_auto

from vltrain.errors import InputError
from vltrain.models.stock.features import POOLED, rows_of

SIZES = ((60, 44), (40, 90), (52, 52))  # width and height in pixels, of each picture
_PROCESSORS: dict[str, Any] = vars(image_processing_auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
_BY_TOWER = {"clip_vision_model": "CLIPImageProcessorPil", "siglip_vision_model": "SiglipImageProcessorPil"}


def image_processor(config: PreTrainedConfig) -> Any:
    """The family's image processor for a small config. Raises InputError for a family that has none, or none that runs
    here."""
    names: dict[str, str] = _PROCESSORS.get(config.model_type) or {}
    vision: Any = getattr(config, "vision_config", config)
    name = names.get("pil") or _BY_TOWER.get(getattr(vision, "model_type", "")) or next(iter(names.values()), None)
    if name is None:
        raise InputError(f"{config.model_type}: transformers has no image processor for it, so it cannot be audited")
    try:
        made = getattr(transformers, name)
        return made(**_settings(made().to_dict(), config))
    except ImportError as error:
        raise InputError(
            f"{config.model_type}: its image processor {name} needs what is not installed here "
            f"({' '.join(str(error).split())[:120]})"
        ) from None


def _settings(default: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Of the processor, where its defaults do not fit the config."""
    vision: Any = getattr(config, "vision_config", config)
    new: dict[str, Any] = {}
    for name, source in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("pooling_kernel_size", "pooling_kernel_size"),
    ):
        value = getattr(vision, source, None) or getattr(config, source, None)
        if default.get(name) is not None and value is not None:
            new[name] = _like(default[name], value)
    side = getattr(vision, "image_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    size = {key: one for key, one in dict(default.get("size") or {}).items() if one is not None}
    counts_pixels = size.keys() == {"shortest_edge", "longest_edge"}  # Qwen-VL's and GLM's: areas
    if side and not counts_pixels:
        tiles = default.get("max_image_size") is not None
        if size:
            new["size"] = dict.fromkeys(size, 2 * side if tiles else side)
        for name in ("crop_size", "max_image_size"):
            keys = [key for key, one in dict(default.get(name) or {}).items() if one is not None]
            if keys:
                new[name] = dict.fromkeys(keys, side)
    if getattr(config, "image_grid_pinpoints", None) and default.get("image_grid_pinpoints"):
        new["image_grid_pinpoints"] = config.image_grid_pinpoints
    if default.get("max_soft_tokens") is not None:
        new["max_soft_tokens"] = 70
    return new


def _like(default: Any, value: Any) -> Any:
    """A size in the form in which the processor has it: a number, or by height and width."""
    value = value[0] if isinstance(value, (list, tuple)) else value
    if isinstance(default, dict):
        return {key: value for key, one in default.items() if one is not None}
    return [value, value] if isinstance(default, (list, tuple)) else value


def pictures(seed: int = 0) -> list[Image.Image]:
    """Random pictures of different shapes."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


def tensors_of(processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the processor makes of images, all at once."""
    made = processor(images=list(images), return_tensors="pt")
    return {name: one for name, one in made.items() if isinstance(one, Tensor)}


def tokens_of(core: Any, tensors: dict[str, Tensor]) -> int:
    """How many vectors the model makes of them."""
    known = inspect.signature(core.get_image_features).parameters
    with torch.no_grad():
        output = core.get_image_features(
            **{name: one for name, one in tensors.items() if name in known}, return_dict=True
        )
    return len(rows_of(output[POOLED]))

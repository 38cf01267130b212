"""Images of a batch, each encoded once, in the places where they are shown: what `get_image_features` gives, cut by
image and put together anew for `mm_encoder_outputs`.

Families give features of another kind each: a list or tuple of [n, d] per image (LLaVA, Qwen-VL), one tensor
[tiles, n, d] (InternVL, Gemma 3), a list with all in one (SmolVLM), further layers beside them (Qwen3-VL's deepstack).
One rule holds for all: the rows of the images one after another. They are cut by the images' token counts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vltrain.batch import ImageInputs
from vltrain.errors import InputError
from vltrain.ops.rows import take_rows
from vltrain.ops.transfer import to_device

POOLED, DEEP = "pooler_output", "deepstack_features"


def encode(core: Any, images: ImageInputs) -> Any:
    """The family's output for N images at once. Segment boundaries and the text never reach the tower.

    Raises: InputError if it has another number of rows than the images have placeholders.
    """
    known = inspect.signature(core.get_image_features).parameters
    output = core.get_image_features(
        **{name: value for name, value in images.tensors.items() if name in known}, return_dict=True
    )
    found, expected = len(rows_of(output[POOLED])), int(images.tokens.sum())
    if found != expected:
        raise InputError(
            f"model.stock.processor: it writes {expected} placeholders for {len(images.tokens)} images, but the "
            f"model makes {found} vectors of them; take the processor that belongs to the model"
        )
    return output


def rows_of(features: Any) -> Tensor:
    """The vectors of all images one after another, [sum of tokens, d]."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([rows_of(one) for one in features])


def placed(output: Any, tokens: Tensor, slots: Tensor) -> Any:
    """The output with the features of K image runs instead of N images.

    Args:
        tokens: int64 [N] on the CPU, rows of each image.
        slots: int64 [K] on the CPU, which image stands at each run; K > 0.
    """
    ends = tokens.cumsum(0)
    spans = [torch.arange(int(ends[slot] - tokens[slot]), int(ends[slot])) for slot in slots.tolist()]
    lengths = [len(span) for span in spans]
    index = to_device(torch.cat(spans), rows_of(output[POOLED]).device)

    def anew(features: Any) -> Any:
        shown = take_rows(rows_of(features), index)
        if isinstance(features, Tensor):
            return shown.view(-1, *features.shape[1:])
        return type(features)(shown.split(lengths))

    shown = type(output)(**{POOLED: anew(output[POOLED])})
    if output.get(DEEP) is not None:
        shown[DEEP] = [anew(layer) for layer in output[DEEP]]
    return shown


def unseen(output: Any) -> Tensor:
    """A zero with a graph through all features: for images that no run shows, which are there for other ranks'
    sake."""
    layers = [output[POOLED], *(output.get(DEEP) or ())]
    return torch.stack([rows_of(layer).sum() for layer in layers]).sum() * 0.0

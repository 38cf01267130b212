"""Images of a batch, each encoded once, in the places where they are shown: what `get_image_features` gives, cut by
image and put together anew for `mm_encoder_outputs`.

Families give features of another kind each: a list or tuple of [n, d] per image (LLaVA, Qwen-VL), one tensor
[tiles, n, d] (InternVL, Gemma 3), a list with all in one (SmolVLM), further layers beside them (Qwen3-VL's deepstack).
One rule holds for all: the rows of the images one after another. They are cut by the images' token counts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vltrain.batch import ImageInputs
from vltrain.errors import InputError
from vltrain.ops.rows import take_rows
from vltrain.ops.transfer import to_device

POOLED, DEEP = "pooler_output", "deepstack_features"


@dataclass(frozen=True)
class Features:
    """What a model made of N images.

    output  of the family's `get_image_features`
    tokens  int64 [N] on the CPU, rows of each image
    """

    output: Any
    tokens: Tensor

    def placed(self, slots: Tensor) -> Any:
        """The output with the features of K image runs instead of N images. `slots`: int64 [K], which image stands at
        each run. With none of them (images that are there for other ranks' sake) it still depends on the features, so
        that what is computed from it has a graph wherever other ranks' has."""
        ends = self.tokens.cumsum(0)
        spans = [torch.arange(int(ends[slot] - self.tokens[slot]), int(ends[slot])) for slot in slots.tolist()]
        lengths = [len(span) for span in spans] or [0]
        index = to_device(torch.cat([*spans, torch.empty(0, dtype=torch.int64)]), rows_of(self.output[POOLED]).device)

        def anew(features: Any) -> Any:
            shown = take_rows(rows_of(features), index)
            if isinstance(features, Tensor):
                inner = features.shape[1:]
                return shown.reshape(shown.numel() // max(1, inner.numel()), *inner)
            return type(features)(shown.split(lengths))

        shown = type(self.output)(**{POOLED: anew(self.output[POOLED])})
        if self.output.get(DEEP) is not None:
            shown[DEEP] = [anew(layer) for layer in self.output[DEEP]]
        return shown


def encode(core: Any, images: ImageInputs) -> Features:
    """The family's features of N images at once. Segment boundaries and the text never reach the tower.

    Raises: InputError if they have another number of rows than the images have placeholders.
    """
    known = inspect.signature(core.get_image_features).parameters
    given = {name: value for name, value in images.tensors.items() if name in known}
    output = core.get_image_features(**given, return_dict=True)
    found, expected = len(rows_of(output[POOLED])), int(images.tokens.sum())
    if found != expected:
        raise InputError(
            f"model.stock.processor: it writes {expected} placeholders for {len(images.tokens)} images, but the "
            f"model makes {found} vectors of them; take the processor that belongs to the model"
        )
    return Features(output, images.tokens)


def rows_of(features: Any) -> Tensor:
    """The vectors of all images one after another, [sum of tokens, d]."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([rows_of(one) for one in features])

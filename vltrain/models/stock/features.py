"""Images of a batch, each encoded once, in the places where they are shown: what `get_image_features` gives, cut by
image and put together anew for `mm_encoder_outputs`.

Families give features of another kind each: a list or tuple of [n, d] per image (LLaVA, Qwen-VL), one tensor
[tiles, n, d] (InternVL, Gemma 3), a list with all in one (SmolVLM), further layers beside them (Qwen3-VL's deepstack).
One rule holds for all: the rows of the images one after another. They are cut by the images' token counts.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vltrain.batch import ImageFeatures, ImageInputs
from vltrain.errors import InputError
from vltrain.ops.rows import take_rows
from vltrain.ops.transfer import to_device

Form: TypeAlias = str | list[int]
POOLED, DEEP = "pooler_output", "deepstack_features"


@dataclass(frozen=True)
class Features:
    """What a model made of N images.

    layers  of the family's pooled output and its further layers: [sum of tokens, d] each, image after image
    forms   how its forward takes each of them: `list` or `tuple` of one tensor [n, d] an image, or the inner sizes of
            one tensor [tiles, n, d]
    tokens  int64 [N] on the CPU, rows of each image
    """

    layers: tuple[Tensor, ...]
    forms: tuple[Form, ...]
    tokens: Tensor

    @classmethod
    def kept(cls, features: ImageFeatures) -> Features:
        """The same from what `as_kept` gave."""
        return cls(features.rows.unbind(1), tuple(features.form), features.lengths)

    def as_kept(self) -> ImageFeatures:
        """As rows [layers, d]."""
        return ImageFeatures(rows=torch.stack(self.layers, dim=1), lengths=self.tokens, form=list(self.forms))

    def placed(self, slots: Tensor) -> Any:
        """The output of `get_image_features` with the features of K image runs instead of N images. `slots`: int64 [K],
        which image stands at each run. With none of them (images that are there for other ranks' sake) it still depends
        on the features, so that what is computed from it has a graph wherever other ranks' has."""
        ends = self.tokens.cumsum(0)
        spans = [torch.arange(int(ends[slot] - self.tokens[slot]), int(ends[slot])) for slot in slots.tolist()]
        lengths = [len(span) for span in spans] or [0]
        index = to_device(torch.cat([*spans, torch.empty(0, dtype=torch.int64)]), self.layers[0].device)

        def anew(rows: Tensor, form: Form) -> Any:
            shown = take_rows(rows, index)
            if isinstance(form, str):
                return {"list": list, "tuple": tuple}[form](shown.split(lengths))
            return shown.reshape(shown.numel() // max(1, math.prod(form)), *form)

        pooled, *deep = map(anew, self.layers, self.forms)
        output: Any = BaseModelOutputWithPooling(pooler_output=pooled)
        if deep:
            output[DEEP] = deep
        return output


def encode(core: Any, images: ImageInputs) -> Features:
    """The family's features of N images at once. Segment boundaries and the text never reach the tower.

    Raises: InputError if they have another number of rows than the images have placeholders.
    """
    known = inspect.signature(core.get_image_features).parameters
    given = {name: value for name, value in images.tensors.items() if name in known}
    output = core.get_image_features(**given, return_dict=True)
    every = [output[POOLED], *(output.get(DEEP) or ())]
    layers = tuple(map(rows_of, every))
    found, expected = len(layers[0]), int(images.tokens.sum())
    if found != expected:
        raise InputError(
            f"model.stock.processor: it writes {expected} placeholders for {len(images.tokens)} images, but the "
            f"model makes {found} vectors of them; take the processor that belongs to the model"
        )
    return Features(layers, tuple(map(_form_of, every)), images.tokens)


def _form_of(features: Any) -> Form:
    return list(features.shape[1:]) if isinstance(features, Tensor) else type(features).__name__


def rows_of(features: Any) -> Tensor:
    """The vectors of all images one after another, [sum of tokens, d]."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat([rows_of(one) for one in features])

"""Answers of a small vision-language model to a padded batch, by the way that runs answer: `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vltrain.audit.pieces import Piece
from vltrain.audit.small.pictures import tensors_of
from vltrain.audit.small.sizes import VOCABULARY
from vltrain.audit.subject import RESERVED, outputs_of_calls
from vltrain.batch import ImageInputs
from vltrain.data.pictures import Pictures
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.models.interface import VisionLanguageModel
from vltrain.schema import Segment


class _Made(Protocol):
    processor: Any
    pictures: list[Image.Image]
    tokens: list[int]


class Shown:
    """What generation asks of an `ImageReader`; a picture is its number among those made."""

    counts_matter = False

    def __init__(self, made: _Made) -> None:
        self.made = made

    def stack(self, pictures: Sequence[np.ndarray], counts: Sequence[int]) -> ImageInputs:
        """The tensors of pictures by their numbers."""
        numbers = [int(one[0]) for one in pictures]
        tensors = tensors_of(self.made.processor, [self.made.pictures[one] for one in numbers])
        return ImageInputs(tensors=tensors, tokens=torch.tensor([self.made.tokens[one] for one in numbers]))

    def blank(self) -> np.ndarray:
        """The first picture."""
        return np.array([0])


def decode(model: VisionLanguageModel, shown: Shown, prompts: Sequence[Piece], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy answers to all prompts in one batch, as `vltrain.audit.subject.Subject` has it. `prompts`: in
    the order in which `generate` takes them, by length and images."""
    asked = [_segment(piece, place, shown.made.tokens) for place, piece in enumerate(prompts)]
    reader: Any = shown
    with torch.no_grad(), outputs_of_calls(model.llm.lm_head) as logits:
        answers = generate(
            model,
            asked,
            Pictures(reader, lambda name: np.array([int(name)])),
            sampling=Sampling(max_new_tokens=steps),
            stop_ids=(),
            vocab_size=VOCABULARY - RESERVED,  # text alone
            batch_size=len(asked),
            device="cpu",
        )
    return torch.tensor(answers), torch.stack(logits, 1)


def _segment(piece: Piece, place: int, tokens: list[int]) -> Segment:
    positions = piece.position_ids if piece.position_ids.ndim == 2 else piece.position_ids[None]
    return Segment(
        sample_id=str(place),
        input_ids=piece.input_ids.numpy().astype(np.int32),
        loss_mask=np.zeros(len(piece.input_ids), bool),
        images=tuple(map(str, piece.images)),
        position_ids=positions.numpy().astype(np.int32),
        blocks=piece.blocks.numpy().astype(np.int32),
        image_tokens=np.array([tokens[one] for one in piece.images], np.int32),
    )

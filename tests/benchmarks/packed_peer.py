"""Packed multimodal training as it is written elsewhere: several samples in a row, positions that restart, a dense mask
of the row for SDPA, logits of every position, and each sample's images encoded for it.

It trains the recipe's model with transformers' Trainer, a pack a step, in rows as full as ours: what is compared is
not the packer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.benchmarks.peers import Held, peer_model, training_arguments
from tests.benchmarks.samples import Samples
from vltrain.config.schema import Config
from vltrain.data.images import decode_image
from vltrain.data.packing import pack_lengths
from vltrain.models.mmt.model import MultimodalModel
from vltrain.schema import IGNORE_INDEX, Segment


class DenselyPackedModel(nn.Module):
    """The recipe's model on one packed row, with transformers' own loss over all logits."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        row_mask: Tensor,
        labels: Tensor,
        pixels: list[Tensor],
        **more: Any,
    ) -> Any:
        """`input_ids`, `position_ids`, `labels` [1, T], not shifted; `row_mask` bool [1, 1, T, T]; `pixels`: by sample
        that shows images, uint8 [N, 3, H, W]."""
        shown = [self.model.encode_images(one) for one in pixels]
        visual = torch.cat(shown) if shown else self.model.encode_images(torch.empty(0, 3, 1, 1))
        embeds = self.model.embed(input_ids[0], visual, torch.arange(len(visual), device=input_ids.device))
        return self.model.llm(
            inputs_embeds=embeds[None],
            attention_mask=row_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=False,
            **more,
        )


class PackCollator:
    """One pack, a list of samples, to the row that `DenselyPackedModel` takes."""

    def __init__(self, samples: Samples, image_size: int, max_image_pixels: int) -> None:
        self._pictures, self._image_size, self._max_image_pixels = samples.pictures, image_size, max_image_pixels

    def __call__(self, packs: list[list[Segment]]) -> dict[str, Any]:
        [segments] = packs
        lengths = torch.tensor([len(segment.input_ids) for segment in segments])
        owner = torch.repeat_interleave(torch.arange(len(segments)), lengths)
        row_mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        input_ids = torch.from_numpy(np.concatenate([one.input_ids for one in segments]).astype(np.int64))
        labelled = torch.from_numpy(np.concatenate([one.loss_mask for one in segments]))
        return {
            "input_ids": input_ids[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
            "row_mask": row_mask[None, None],
            "labels": input_ids.masked_fill(~labelled, IGNORE_INDEX)[None],
            "pixels": [torch.stack([self._decoded(name) for name in one.images]) for one in segments if one.images],
        }

    def _decoded(self, name: str) -> Tensor:
        return torch.from_numpy(decode_image(self._pictures[name], self._image_size, self._max_image_pixels, name))


def packs_of(samples: Samples, pack_length: int) -> list[list[Segment]]:
    """The samples in packs of at most so many tokens, by our packer."""
    order, starts = pack_lengths(np.array([len(one.input_ids) for one in samples.segments]), pack_length)
    return [
        [samples.segments[number] for number in order[first:last].tolist()]
        for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]


def packing_trainer(config: Config, samples: Samples, dtype: torch.dtype, *, pack_length: int, folder: Path) -> Held:
    """transformers' Trainer on packed rows, one a step."""
    model = DenselyPackedModel(peer_model(config, dtype))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**training_arguments(config, dtype, 1, folder)),
        train_dataset=packs_of(samples, pack_length),  # pyright: ignore[reportArgumentType] it has a length and items
        data_collator=PackCollator(samples, model.model.image_size, config.data.max_image_pixels),
    )
    return Held(trainer, model)

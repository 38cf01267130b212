"""Its network, and how it is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.third_architecture.settings import ProjectorConfig
from vltrain.batch import Batch
from vltrain.models.backbones.llm import (
    empty_language,
    llm_blocks,
    llm_units,
    packed_hidden_states,
    packed_losses,
    prepare_llm,
)
from vltrain.models.backbones.towers import empty_tower, tower_units
from vltrain.models.flops import Flops, llm_flops
from vltrain.models.interface import Architecture, LossOutput, Place, VisionLanguageModel
from vltrain.models.materialise import RandomWeights
from vltrain.models.pretrained.readers import language_config, tower_config
from vltrain.models.random import seeded
from vltrain.ops.rows import owners, place_rows, take_rows
from vltrain.schema import IMAGE_TOKEN, SQUARE


class Projector(VisionLanguageModel):
    """Mean patch, matrix, LLaMA. A modality token is a vector of zeros."""

    PARTS = ("projector", "vision", "llm")
    BRIDGE = "projector"
    framing = SQUARE

    def __init__(self, vision: Any, projector: nn.Linear, llm: Any) -> None:
        super().__init__()
        self.vision, self.projector, self.llm = vision, projector, llm

    @property
    def visual_tokens(self) -> int:
        return 1

    @property
    def image_size(self) -> int:
        return self.vision.config.image_size

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.vision.encoder.layers, *llm_blocks(self.llm)]

    @classmethod
    def part_of(cls, name: str) -> str:
        return name.partition(".")[0]

    def flops(self) -> Flops:
        per_token, per_pair, per_label = llm_flops(self.llm, True)
        return Flops(per_token=per_token + per_pair / 2, per_pair=per_pair / 2, per_image=1e6, per_label=per_label)

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 127.5 - 1

    def encode_images(self, pixels: Tensor) -> Tensor:
        if len(pixels) == 0:
            return self.projector.weight.new_empty(0, 1, self.projector.out_features)
        states = self.vision(pixel_values=self.normalise(pixels)).last_hidden_state
        return self.projector(states[:, 1:].mean(dim=1, keepdim=True))

    def embed(self, input_ids: Tensor, visual: Tensor, image_slots: Tensor) -> Tensor:
        embeds = self.llm.model.embed_tokens(input_ids.clamp(min=0)) * (input_ids >= 0)[:, None]
        if len(visual) == 0:
            return embeds
        shown = take_rows(visual, image_slots).flatten(0, 1).to(embeds.dtype)
        return place_rows(embeds, shown, input_ids == IMAGE_TOKEN)

    def forward(self, batch: Batch) -> LossOutput:
        visual = self.encode_images(batch.pixels)
        embeds = self.embed(batch.input_ids, visual, batch.image_slots) + 0.0 * self.projector.weight.sum()
        hidden = packed_hidden_states(self.llm, embeds, batch.position_ids, batch.segment_lengths)
        owner = owners(batch.segment_lengths, hidden.device)
        return LossOutput(*packed_losses(self.llm.lm_head, hidden, batch, owner))


@torch.no_grad()
def build(
    model: ProjectorConfig,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool,
    device: torch.device | str,
    runs_on: torch.device | str,
    place: Place,
) -> Projector:
    """The network of a recipe, in training mode."""
    on_meta = torch.device(device).type == "meta"
    with torch.device("meta" if on_meta else "cpu"):
        vision = empty_tower(tower_config("model.projector", None, model.projector.vision), "sdpa")
        llm = empty_language(language_config("model.projector", None, model.projector.llm), "sdpa")
        prepare_llm(llm, activation_checkpointing, None, "torch")
        for part, network, units in (("vision", vision, tower_units(vision)), ("llm", llm, llm_units(llm))):
            weights = RandomWeights(network, model.seed, part)
            for name, unit in units:
                if not on_meta:
                    weights.fill(name, unit, dtype)
                unit.requires_grad_(False)
                if place is not None:
                    place(unit)
        with seeded(model.seed, "projector"):
            projector = nn.Linear(vision.config.hidden_size, llm.config.hidden_size)
    if place is not None:
        place(projector)
    built = Projector(vision, projector, llm)
    return (built if on_meta or place is not None else built.to(device)).train()


ARCHITECTURE = Architecture(
    build=build, check_sources=lambda model: None, weight_files=lambda model: {}, not_compilable=lambda model: "a mock"
)

"""An `mmt` model: transformers' tower and LLM, and what the paper puts between them, written down once more."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.audit.samples import MIXED, segment_of
from vltrain.audit.subject import Made, Reference, reloaded
from vltrain.audit.subjects.squares import loaded_by, square_pictures
from vltrain.config.model.mmt import MmtConfig, VisionConfig
from vltrain.models.backbones.table import language_of, tower_of
from vltrain.models.build import build_model
from vltrain.models.mmt.merge import merge_adapters
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Segment


class MmtReference(Reference):
    """`section`: how the tower is read; `size`: of a square in pixels."""

    def __init__(self, section: VisionConfig, size: int, tower: Any, neck: nn.Module, modality: nn.Embedding, llm: Any):
        super().__init__()
        self.section, self.size = section, size
        self.tower, self.neck, self.modality, self.llm = tower, neck, modality, llm
        self.load = loaded_by(size)

    def train(self, mode: bool = True) -> MmtReference:
        """The tower stays in evaluation mode: while training, DINOv3's moves its positions at random."""
        super().train(mode)
        self.tower.eval()
        return self

    @property
    def num_apart(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] a view
        """The modality token, where it decides and no other token sees it."""
        return int(self.routing is not None)

    def features(self, name: str) -> Tensor:
        """What of the tower becomes visual tokens of a picture alone, [V, d], from transformers' own forward."""
        config, family = self.tower.config, tower_of(self.tower.config)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (family.mean, family.std))
        pixels = ((torch.from_numpy(self.load(name)).float() / 255 - mean) / std)[None]
        states: list[Tensor] = []
        handles = [
            block.register_forward_hook(
                lambda module, given, output: states.append(output if isinstance(output, Tensor) else output[0])
            )
            for block in self.tower.get_submodule(family.layers)
        ]
        side = self.size // config.patch_size
        given: dict[str, Any] = {"pixel_values": pixels}
        if hasattr(config, "num_patches") and family.embed is not None:  # NaFlex: rows of pixels, channels last
            rows = F.unfold(pixels, config.patch_size, stride=config.patch_size).transpose(1, 2)
            rows = rows.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
            mask, shapes = torch.ones(1, side**2, dtype=torch.int64), torch.tensor([[side, side]])
            given = {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        try:
            output = self.tower(**given)
        finally:
            for handle in handles:
                handle.remove()
        if self.section.tokens == "pooler":
            return output.pooler_output
        if self.section.tokens == "cls":
            return torch.cat([state[:, 0] for state in states[self.section.tap_every - 1 :: self.section.tap_every]])
        blocks = self.section.blocks or max(1, len(states) - 1)
        patches = states[blocks - 1][0, family.has_cls + family.registers(config) :]
        grid = patches.T.reshape(1, -1, side, side)
        return F.avg_pool2d(grid, self.section.pool).flatten(2)[0].T

    def predictions(self, segment: Segment) -> Tensor:
        ids = torch.from_numpy(segment.input_ids).long()
        table = self.llm.get_input_embeddings()
        embeds = torch.stack([self.modality.weight[int(one == IMAGE_MODALITY_TOKEN)] if one < IMAGE_TOKEN
                              else table(one.clamp(min=0)) for one in ids])  # fmt: skip
        if segment.images:
            shown = torch.cat([self.neck(self.features(name)) for name in segment.images])
            embeds = embeds.index_put(((ids == IMAGE_TOKEN).nonzero()[:, 0],), shown)
        predicted = torch.from_numpy(segment.loss_mask)[1:]
        if self.routing is None:
            return self.llm(inputs_embeds=embeds[None], use_cache=False).logits[0, :-1][predicted]
        with self.routing.deciding():
            self.llm.model(inputs_embeds=self.modality.weight[:, None], use_cache=False)
        with self.routing.decided((ids[:1] == IMAGE_MODALITY_TOKEN).long()):
            places = torch.arange(1, len(ids))[None]
            logits = self.llm(inputs_embeds=embeds[None, 1:], position_ids=places, use_cache=False).logits[0]
        return logits[:-1][predicted[1:]]


def make(section: MmtConfig) -> Made:
    """Of a small section."""
    model: Any = build_model(section)
    vision, llm = model.vision.clip, model.llm
    tower = tower_of(vision.config).network._from_config(copy.deepcopy(vision.config), attn_implementation="eager")
    language = language_of(llm.config).network._from_config(copy.deepcopy(llm.config), attn_implementation="eager")
    neck, modality = copy.deepcopy(model.neck), copy.deepcopy(model.modality_embedding)
    reference = MmtReference(section.vision, model.image_size, tower, neck, modality, language).train()
    segments = [
        segment_of(
            shape,
            number,
            [model.visual_tokens] * 3,
            IMAGE_TOKEN,
            front=[IMAGE_MODALITY_TOKEN if any(isinstance(run, str) for run in shape) else TEXT_MODALITY_TOKEN],
        )
        for number, shape in enumerate(MIXED)
    ]

    def folded() -> Reference:
        merge_adapters(model)
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            again = (
                reloaded(type(tower), vision.config, vision.state_dict(), first),
                reloaded(type(language), llm.config, llm.state_dict(), second),
            )
        return MmtReference(section.vision, model.image_size, again[0], model.neck, model.modality_embedding, again[1])

    return Made(
        kind=f"mmt of {vision.config.model_type} and {llm.config.model_type}",
        model=model,
        reference=reference,
        roots=[(vision, tower), (model.neck, neck), (model.modality_embedding, modality), (llm, language)],
        segments=segments,
        pictures=square_pictures(model.image_size),
        folded=folded,
    )

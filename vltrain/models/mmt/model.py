"""The whole model: a packed row of text and images in, the sum of its label losses out.

    pixels --tower--> [N, V, d_vision] --neck--> visual tokens [N, V, d]
    input_ids --embed, placeholders replaced--> [T, d] --LLM, segments isolated--> [T, d] --head at label positions-->
    loss

One forward serves every kind of row, so that ranks never differ in which parameters a backward reaches: a row with
pixels runs the ViT even if no token shows an image, and a filler without labels still has a graph through every trained
parameter. Their gradients are exact zeros, not missing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vltrain.batch import Batch, ImageFeatures, ImageInputs
from vltrain.models.adapters import Routing
from vltrain.models.backbones.llm import llm_blocks, packed_hidden_states, packed_losses
from vltrain.models.backbones.towers import tower_blocks
from vltrain.models.flops import Flops
from vltrain.models.interface import ImagePart, LossOutput, VisionLanguageModel, weights_below
from vltrain.models.mmt.flops import count_flops, tower_flops
from vltrain.models.mmt.visual_tokens import VisualTokens
from vltrain.models.peft.lora import is_peft_parameter
from vltrain.ops.rows import owners, place_rows, take_rows
from vltrain.ops.transfer import to_device
from vltrain.schema import IGNORE_INDEX, IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN


class MultimodalModel(VisionLanguageModel):
    """ViT with visual tokens, neck, modality embedding and LLM (Eq. 3-5).

    `routing` is there if the LLM has routed adapters. Then a segment's modality token decides for its segment and no
    other token may attend to it: see `vltrain.models.adapters.routing`.
    """

    PARTS = ("adapter", "peft", "neck", "modality", "vision", "llm")
    BRIDGE = "neck"

    def __init__(
        self,
        vision: VisualTokens,
        neck: nn.Module,
        modality_embedding: nn.Embedding,
        llm: Any,
        routing: Routing | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.framing = vision.framing
        self.neck = neck
        self.modality_embedding = modality_embedding  # row 0: text, row 1: image
        self.llm = llm
        self.routing = routing

    @property
    def visual_tokens(self) -> int:
        return self.vision.num_tokens

    @property
    def blocks(self) -> list[nn.Module]:
        return [*tower_blocks(self.vision.clip), *self.llm_blocks]

    @property
    def llm_blocks(self) -> list[nn.Module]:
        return llm_blocks(self.llm)

    @property
    def compilable_blocks(self) -> list[nn.Module]:
        return [*self.vision.live_blocks, *self.llm_blocks]

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @classmethod
    def part_of(cls, name: str) -> str:
        if ".adapter." in name:
            return "adapter"
        if is_peft_parameter(name):
            return "peft"
        root = name.split(".", 1)[0]
        part = {"modality_embedding": "modality"}.get(root, root)
        assert part in cls.PARTS, f"parameter '{name}' belongs to no part"
        return part

    def normalise(self, pixels: Tensor) -> Tensor:
        return self.vision.normalise(pixels)

    def flops(self) -> Flops:
        return count_flops(self.vision, self.neck, self.modality_embedding, self.llm)

    def encode_images(self, pixels: Tensor | ImageFeatures) -> Tensor:
        """uint8 [N, 3, H, W] or features -> visual tokens [N, V, d]. Without images no ViT pass happens."""
        if len(pixels) == 0:
            return self.llm.model.embed_tokens.weight.new_empty(0, self.visual_tokens, self.llm.config.hidden_size)
        if isinstance(pixels, ImageFeatures):
            return self.neck(pixels.rows.unflatten(0, (-1, self.visual_tokens)))
        return self.neck(self.vision(pixels))

    def image_part(self) -> ImagePart:
        vision = self.vision
        facts = {
            "tokens": [type(vision).__name__, vision.num_live, vision.num_tokens, vision.image_size],
            "config": vision.clip.config.to_dict(),
            "attention": vision.clip.config._attn_implementation,
        }
        return ImagePart(weights=weights_below(self, "vision"), facts=facts, flops_per_image=tower_flops(vision))

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """The ViT's states that become visual tokens, V rows [d_vision] an image."""
        states = self.vision(pixels)
        return ImageFeatures(rows=states.flatten(0, 1), lengths=torch.full((len(states),), states.shape[1]))

    def embed(self, input_ids: Tensor, visual: Tensor, image_slots: Tensor) -> Tensor:
        """The LLM's input: token embeddings, with the vectors that belong there in the placeholders' places.

        Args:
            input_ids: int64 [T], placeholders below zero.
            visual: [N, V, d] from `encode_images`; an image that no slot refers to gets a gradient of zero.
            image_slots: int64 [K], which image stands at the k-th image run.

        Returns: [T, d].
        """
        embeds = self.llm.model.embed_tokens(input_ids.clamp(min=0))
        text_modality, image_modality = self.modality_embedding(torch.arange(2, device=input_ids.device)).to(
            embeds.dtype
        )
        embeds = torch.where((input_ids == TEXT_MODALITY_TOKEN)[:, None], text_modality, embeds)
        embeds = torch.where((input_ids == IMAGE_MODALITY_TOKEN)[:, None], image_modality, embeds)
        if len(visual) == 0:
            return embeds
        shown = take_rows(visual, image_slots).flatten(0, 1).to(embeds.dtype)  # [K * V, d]
        return place_rows(embeds, shown, input_ids == IMAGE_TOKEN)

    def forward(self, batch: Batch) -> LossOutput:
        """Losses of one packed row. Under bf16 the caller runs it inside `torch.autocast`."""
        if batch.input_ids.device.type == "cpu":
            self._check(batch)
        assert not isinstance(batch.pixels, ImageInputs), "squares"
        embeds = self.embed(batch.input_ids, self.encode_images(batch.pixels), batch.image_slots)
        owner = owners(batch.segment_lengths, embeds.device)
        hidden = self._hidden_states(embeds, batch.position_ids, batch.segment_lengths, owner)
        return LossOutput(*packed_losses(self.llm.lm_head, hidden, batch, owner))

    def _hidden_states(self, embeds: Tensor, position_ids: Tensor, segment_lengths: Tensor, owner: Tensor) -> Tensor:
        if self.routing is None:
            return packed_hidden_states(self.llm, embeds, position_ids, segment_lengths)
        starts = segment_lengths.cumsum(0) - segment_lengths
        # The decision token and the rest of its segment, isolated from each other.
        split = torch.stack([torch.ones_like(segment_lengths), segment_lengths - 1], dim=1).flatten()
        with self.routing.packed(to_device(starts, embeds.device), owner):
            return packed_hidden_states(self.llm, embeds, position_ids, split[split > 0])

    @property
    def trains_on_text(self) -> bool:
        return self.modality_embedding.weight.requires_grad or super().trains_on_text

    @torch.no_grad()
    def decide_routing(self) -> None:
        """Lets routed adapters decide for both modalities, for `language_model` calls to come. Once after each change
        of weights.

        Runs the LLM on two tokens: under ZeRO-3 a collective. Without routed adapters it does nothing.
        """
        if self.routing is not None:
            device = self.modality_embedding.weight.device
            embeds = self.modality_embedding(torch.arange(2, device=device))[:, None]
            with self.routing.deciding():
                self.llm.model(inputs_embeds=embeds.to(self.llm.model.embed_tokens.weight.dtype), use_cache=False)

    def language_model(self, embeds: Tensor, modality: Tensor, **arguments: Any) -> Any:
        """The LLM's blocks on a batch, for generation: transformers' `llm.model`, routed where there are routed
        adapters.

        Args:
            embeds: [B, L, d]. With `routing` they hold no modality token: it decides (`decide_routing`) but is not
                seen.
            modality: int64 [B], of each row: 0 text, 1 image.
            arguments: of transformers' `LlamaModel.forward`.
        """
        with nullcontext() if self.routing is None else self.routing.decided(modality):
            return self.llm.model(inputs_embeds=embeds, **arguments)

    def _check(self, batch: Batch) -> None:
        """The loader's promises that the forward relies on. On a device the checks would wait for it."""
        num_labels, num_tokens = int((batch.labels != IGNORE_INDEX).sum()), len(batch.input_ids)
        assert num_labels == batch.num_label_tokens, f"{num_labels} labels, the batch says {batch.num_label_tokens}"
        assert int(batch.segment_lengths.sum()) == num_tokens, (
            f"segments of {batch.segment_lengths.tolist()} in a row of {num_tokens}"
        )
        starts = batch.segment_lengths.cumsum(0) - batch.segment_lengths
        if self.routing is not None:
            first = batch.input_ids[starts]
            assert ((first == TEXT_MODALITY_TOKEN) | (first == IMAGE_MODALITY_TOKEN)).all(), (
                "a segment that starts with no modality token"
            )
        places, shown = int((batch.input_ids == IMAGE_TOKEN).sum()), len(batch.image_slots) * self.visual_tokens
        assert places == shown, (
            f"{places} visual places for {len(batch.image_slots)} images of {self.visual_tokens} tokens"
        )

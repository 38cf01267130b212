"""InstructBLIP: a batch of questions with images in, the sum of their label losses out.

    pixels --ViT, norm--> [N, P, d_v]
    queries [V, d_q] + the prompt's tokens --Q-Former, looks at an image--> [K, V, d_q] --projection--> [K, V, d]
    LLaMA:  a packed row, V visual tokens in front of each prompt, segments isolated --head at label positions--> loss
    T5:     padded rows of visual tokens and prompt --encoder--> ... --decoder over the answers, head--> loss

transformers' modules do the computing (ViT, Q-Former, LLM); what is between them is ours, so that an image that several
questions show is encoded once, that placeholders are counted, and that losses are exact sums. Every batch with pixels
runs ViT and Q-Former even if no question shows an image, so that ranks never differ in which parameters a backward
reaches. Trade-off: no generate() of transformers', since answers come from `vltrain.evaluate`; and a wait for the
device per attention mask, since transformers looks whether any text is padded.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
    LlamaForCausalLM,
)

from vltrain.batch import Batch, ImageFeatures, ImageInputs
from vltrain.models.backbones.llm import llm_blocks, packed_hidden_states
from vltrain.models.flops import Flops
from vltrain.models.instructblip.flops import count_flops, vision_flops
from vltrain.models.interface import ImagePart, InstructionSizes, LossOutput, VisionLanguageModel, weights_below
from vltrain.models.peft.low_rank import is_low_rank, orthogonality
from vltrain.models.pretrained.preprocessor import Preprocessing
from vltrain.models.quantise import num_weights
from vltrain.ops.rows import nonzero_indices, owners, place_rows, segment_sums, take_rows
from vltrain.ops.transfer import to_device
from vltrain.schema import IGNORE_INDEX, IMAGE_TOKEN


class QueryTokens(nn.Module):
    """The learned queries, in a module of their own so that ZeRO-3 gathers them: [1, V, d_q] -> [num, V, d_q]."""

    def __init__(self, tokens: nn.Parameter) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, num: int) -> Tensor:
        return self.tokens.expand(num, -1, -1)


class InstructBlip(VisionLanguageModel):
    """The parts of transformers' `InstructBlipForConditionalGeneration`, under shorter names (`THEIR_NAMES`)."""

    THEIR_NAMES = {
        "vision": "vision_model",
        "queries.tokens": "query_tokens",
        "qformer": "qformer",
        "projection": "language_projection",
        "llm": "language_model",
    }
    PARTS = ("peft", "bridge", "qformer", "vision", "llm")
    BRIDGE = "Q-Former"
    ranks = "segments"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: InstructBlipForConditionalGeneration,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.framing = preprocessing.framing
        self.config = network.config
        self.vision: InstructBlipVisionModel = network.vision_model
        self.queries = QueryTokens(network.query_tokens)
        self.qformer: InstructBlipQFormerModel = network.qformer
        self.projection: nn.Linear = network.language_projection
        self.llm: Any = network.language_model
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)

    @classmethod
    def their_name(cls, name: str) -> str:
        """The name in transformers' model of a parameter of that name here."""
        for ours, theirs in cls.THEIR_NAMES.items():
            if name == ours or name.startswith(f"{ours}."):
                return theirs + name.removeprefix(ours)
        raise AssertionError(f"'{name}' is no parameter of an InstructBLIP")

    @property
    def visual_tokens(self) -> int:
        return self.config.num_query_tokens

    @property
    def llm_blocks(self) -> list[nn.Module]:
        return [*self.llm.encoder.block, *self.llm.decoder.block] if self.is_encoder_decoder else llm_blocks(self.llm)

    @property
    def image_size(self) -> int:
        return self.config.vision_config.image_size

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the LLM is a T5."""
        return not isinstance(self.llm, LlamaForCausalLM)

    @property
    def writes(self) -> Literal["decoder-only", "encoder-decoder"]:
        return "encoder-decoder" if self.is_encoder_decoder else "decoder-only"

    @property
    def instruction(self) -> InstructionSizes:
        sizes: Any = self.config.qformer_config
        return InstructionSizes(sizes.vocab_size, sizes.max_position_embeddings)

    @property
    def fp32_attention(self) -> str:
        """A T5's is transformers' own, and knows fp32."""
        return self.llm.config._attn_implementation if self.is_encoder_decoder else super().fp32_attention

    @classmethod
    def part_of(cls, name: str) -> str:
        if is_low_rank(name):
            return "peft"
        root = name.split(".", 1)[0]
        part = "bridge" if root in ("queries", "projection") or name.startswith("vision.post_layernorm.") else root
        assert part in cls.PARTS, f"parameter '{name}' belongs to no part"
        return part

    def reference_size(self) -> int:
        """Of full Q-Former tuning, the paper's 100%: Q-Former, queries, projection, and the norm behind the ViT."""
        counted = (self.qformer, self.queries, self.projection, self.vision.post_layernorm)
        return sum(
            num_weights(value)
            for module in counted for name, value in module.named_parameters() if not is_low_rank(name)
        )  # fmt: skip

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.vision.encoder.layers, *self.llm_blocks]

    @property
    def template(self) -> str:
        """The name of the template (`vltrain.data.text.conversation`) that this LLM reads."""
        return "instructblip_t5" if self.is_encoder_decoder else "instructblip"

    def flops(self) -> Flops:
        return count_flops(self)

    def encode_images(self, pixels: Tensor | ImageFeatures) -> Tensor:
        """uint8 [N, 3, H, W] or features -> the ViT's normed states [N, P, d_v]. Without images no ViT pass happens."""
        if len(pixels) == 0:
            return self.projection.weight.new_empty(0, 0, self.config.vision_config.hidden_size)
        if isinstance(pixels, ImageFeatures):
            return self.vision.post_layernorm(pixels.rows.unflatten(0, (len(pixels), -1)))
        return self.vision(pixel_values=self.normalise(pixels)).last_hidden_state

    def image_part(self) -> ImagePart:
        """The ViT without the norm behind it, which is always trained."""
        config: Any = self.vision.config
        facts = {"config": config.to_dict(), "attention": config._attn_implementation}
        weights = weights_below(self, "vision.embeddings", "vision.encoder")
        return ImagePart(weights=weights, facts=facts, flops_per_image=vision_flops(self)[0])

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """The ViT's states before the norm behind it, P rows [d_v] an image."""
        states = self.vision.encoder(inputs_embeds=self.vision.embeddings(self.normalise(pixels))).last_hidden_state
        return ImageFeatures(rows=states.flatten(0, 1), lengths=torch.full((len(states),), states.shape[1]))

    def ask_images(self, states: Tensor, slots: Tensor, instruction_ids: Tensor) -> Tensor:
        """The visual tokens of K (image, prompt) pairs.

        Args:
            states: [N, P, d_v] from `encode_images`.
            slots: int64 [K], which image is asked.
            instruction_ids: int64 [K, I], what it is asked, -1 where padded.

        Returns: [K, V, d]. With no pair at all but an image, the Q-Former runs for nothing, and the result (still
        empty) depends on it.
        """
        if len(states) == 0:
            return states.new_empty(0, self.visual_tokens, self.projection.out_features)
        idle = len(slots) == 0
        if idle:
            slots, instruction_ids = slots.new_zeros(1), instruction_ids.new_zeros(1, 2)
        is_text = instruction_ids >= 0
        mask = torch.cat([is_text.new_ones(len(slots), self.visual_tokens), is_text], dim=1).long()
        found = self.qformer(
            input_ids=instruction_ids.clamp(min=0),
            attention_mask=mask,
            query_embeds=self.queries(len(slots)),
            encoder_hidden_states=take_rows(states, slots),
        ).last_hidden_state[:, : self.visual_tokens]
        visual = self.projection(found)
        return visual[:0] if idle else visual

    def look(self, states: Tensor, slots: Tensor, instruction_ids: Tensor) -> tuple[Tensor, Tensor]:
        """An image is looked at anew for every prompt."""
        visual = self.ask_images(states, slots, instruction_ids)
        return visual, torch.arange(len(visual), device=slots.device)

    def token_embeddings(self, input_ids: Tensor) -> Tensor:
        """[..., d]; what is below zero gets some vector, to be replaced."""
        table = self.llm.shared if self.is_encoder_decoder else self.llm.model.embed_tokens
        return table(input_ids.clamp(min=0))

    def embed(self, input_ids: Tensor, visual: Tensor, image_slots: Tensor) -> Tensor:
        """The LLM's input [T, d]: token embeddings, with `visual` [K, V, d] in the places of its image runs, run `k`
        showing `image_slots[k]`."""
        embeds = self.token_embeddings(input_ids)
        if len(image_slots) == 0:
            return embeds
        shown = take_rows(visual, image_slots).flatten(0, 1).to(embeds.dtype)
        return place_rows(embeds, shown, input_ids == IMAGE_TOKEN)

    def forward(self, batch: Batch, *, penalise: bool = False) -> LossOutput:
        """Losses of one packed row, or of the padded rows made of one. Under bf16 the caller runs it inside
        `torch.autocast`.

        penalise: also AdaLoRA's orthogonality term, which needs all of its factors at once.
        """
        if batch.input_ids.device.type == "cpu":
            self._check(batch)
        owner = owners(batch.segment_lengths, batch.input_ids.device)
        runs = nonzero_indices(batch.input_ids == IMAGE_TOKEN, len(batch.image_slots) * self.visual_tokens)[
            :: self.visual_tokens
        ]
        assert not isinstance(batch.pixels, ImageInputs), "squares"
        visual = self.ask_images(
            self.encode_images(batch.pixels), batch.image_slots, batch.instruction_ids[owner[runs]]
        )
        embeds = self.embed(batch.input_ids, visual, torch.arange(len(visual), device=visual.device))
        if len(batch.pixels) and not len(visual):
            embeds = embeds + visual.sum() * 0.0  # the graph of what ran for nothing, through the LLM as on other ranks
        if self.is_encoder_decoder:
            hidden, labels, owner = self._decode(batch, embeds)
        else:
            states = packed_hidden_states(self.llm, embeds, batch.position_ids, batch.segment_lengths)
            labelled = nonzero_indices(batch.labels != IGNORE_INDEX, batch.num_label_tokens)
            hidden, labels, owner = states[labelled], batch.labels[labelled], owner[labelled]
        loss_sum, token_losses = self.llm.lm_head(hidden, labels)
        if batch.is_filler:
            loss_sum = loss_sum * 0.0
        segment_losses = segment_sums(token_losses, owner, len(batch.segment_lengths))
        return LossOutput(loss_sum, segment_losses, orthogonality(self) if penalise else None)

    def _decode(self, batch: Batch, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T5 on the rows of a batch: (final states of the L label positions [L, d], labels int64 [L], their rows int64
        [L])."""
        device = embeds.device
        answers = batch.label_lengths
        starts = batch.segment_lengths.cumsum(0) - batch.segment_lengths
        prompts = batch.segment_lengths - answers
        read, is_read = (to_device(part, device) for part in padded_rows(starts, prompts))
        said, is_said = padded_rows(starts + prompts, answers)
        rows, columns = (to_device(part, device) for part in is_said.nonzero(as_tuple=True))
        targets = batch.input_ids[to_device(said, device)].clamp(min=0)
        encoded = self.llm.encoder(inputs_embeds=embeds[read], attention_mask=is_read.long()).last_hidden_state
        states = self.decoder_states(self.shifted(targets), encoded, is_read.long())
        return states[rows, columns], targets[rows, columns], rows

    def shifted(self, targets: Tensor) -> Tensor:
        """What T5's decoder reads to predict `targets` int64 [S, L]: its start token, then all but the last."""
        first = getattr(self.llm.config, "decoder_start_token_id", None)
        start = targets.new_full((len(targets), 1), self.llm.config.pad_token_id if first is None else first)
        return torch.cat([start, targets[:, :-1]], dim=1)

    def decoder_states(self, input_ids: Tensor, encoded: Tensor, mask: Tensor, **arguments: Any) -> Tensor:
        """T5's decoder on int64 [S, L] -> states [S, L, d] ready for the head. `arguments`: of transformers'
        T5Stack."""
        arguments.setdefault("use_cache", False)
        states = self.llm.decoder(
            input_ids=input_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask, **arguments
        ).last_hidden_state
        return states * self.llm.config.d_model**-0.5 if self.llm.config.scale_decoder_outputs else states

    def _check(self, batch: Batch) -> None:
        """The loader's promises that the forward relies on. On a device the checks would wait for it."""
        num_labels, num_tokens = int((batch.labels != IGNORE_INDEX).sum()), len(batch.input_ids)
        assert num_labels == batch.num_label_tokens == int(batch.label_lengths.sum()), (
            f"{num_labels} labels, the batch says {batch.num_label_tokens}"
        )
        assert int(batch.segment_lengths.sum()) == num_tokens, (
            f"segments of {batch.segment_lengths.tolist()} in a row of {num_tokens}"
        )
        shown, due = int((batch.input_ids == IMAGE_TOKEN).sum()), len(batch.image_slots) * self.visual_tokens
        assert shown == due, f"{shown} visual places for {len(batch.image_slots)} images of {self.visual_tokens} tokens"
        assert batch.instruction_ids.shape[0] == len(batch.segment_lengths) and batch.instruction_ids.shape[1] > 0, (
            "segments without instruction"
        )


def padded_rows(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Spans of a row as rows of their own: (int64 [S, L], which place of the row each one is, 0 where padded; bool [S,
    L], where it is not).

    L is the longest of `lengths` int64 [S], at least 1.
    """
    columns = torch.arange(max(int(lengths.max()), 1))
    is_real = columns < lengths[:, None]
    return torch.where(is_real, starts[:, None] + columns, 0), is_real

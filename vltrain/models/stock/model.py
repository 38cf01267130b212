"""A vision-language model of transformers on packed rows: text and images in, the sum of the label losses out.

    images --get_image_features--> vectors of each distinct image, once
    input_ids --the family's own forward, images handed in, segments isolated--> [T, d] --head at labels--> loss

transformers' modules do the computing; what is ours is that images are encoded apart, so that no segment boundary
reaches the tower, that segments do not see each other, and that losses are exact sums. A row with images runs the tower
even if no token shows one, so that ranks never differ in which parameters a backward reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.batch import Batch, ImageInputs
from vltrain.models.flops import Flops
from vltrain.models.interface import LossOutput, VisionLanguageModel
from vltrain.models.stock.features import encode, placed, unseen
from vltrain.models.stock.flops import count_flops
from vltrain.models.stock.parts import Parts, holders, part_of, parts_of
from vltrain.ops.attention import packing_arguments
from vltrain.ops.rows import nonzero_indices, segment_sums
from vltrain.ops.transfer import to_device
from vltrain.schema import IGNORE_INDEX, SQUARE


@dataclass(frozen=True)
class Decoder:
    """The LLM as the other rooms ask for it. model: its blocks, of transformers'; lm_head: its `LossHead`."""

    model: Any
    lm_head: Any

    @property
    def config(self) -> Any:
        return self.model.config


class StockModel(VisionLanguageModel):
    """A model of transformers, prepared: its decoder's attention keeps segments apart, its head computes losses.

    `network` is transformers' own module under its own names, with adapters and low-rank updates in it.
    """

    PARTS = ("adapter", "peft", "projector", "vision", "llm")
    BRIDGE = "projector"
    ranks = "segments"
    framing = SQUARE

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    @property
    def parts(self) -> Parts:
        return parts_of(self.network)

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def llm(self) -> Decoder:  # pyright: ignore[reportIncompatibleVariableOverride] a view, not a module of its own
        return Decoder(self.network.get_decoder(), self.network.get_output_embeddings())

    @property
    def vision(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] as `llm`
        return self.network.get_encoder("image")

    @property
    def blocks(self) -> list[nn.Module]:
        parts = self.parts
        return [*parts.tower_blocks, *parts.decoder_blocks]

    @classmethod
    def part_of(cls, name: str) -> str:
        return part_of(name)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Parameters of modules below that are read without calling these: images are encoded by a method of the core,
        not by its forward. ZeRO-3 has to gather them for this module."""
        parts = self.parts
        return [
            parameter
            for _, module in holders(self.network, parts) if module is not parts.decoder and module is not parts.tower
            for parameter in module.parameters(recurse=False)
        ]  # fmt: skip

    def flops(self) -> Flops:
        return count_flops(self.parts)

    def encode_images(self, pixels: ImageInputs) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What `get_image_features` gives for N images together; None without images, and then no tower runs."""
        return encode(self.parts.core, pixels) if len(pixels) else None

    def forward(self, batch: Batch) -> LossOutput:
        """Losses of one packed row. Under bf16 the caller runs it inside `torch.autocast`."""
        assert isinstance(batch.pixels, ImageInputs), "pixels of a stock model come from its own processor"
        if batch.input_ids.device.type == "cpu":
            self._check(batch, batch.pixels)
        features = self.encode_images(batch.pixels)
        hidden = self._hidden_states(batch, features, batch.pixels.tokens)
        labelled = nonzero_indices(batch.labels != IGNORE_INDEX, batch.num_label_tokens)
        loss_sum, token_losses = self.llm.lm_head(hidden[labelled], batch.labels[labelled])
        if batch.is_filler:
            loss_sum = loss_sum * 0.0
        if features is not None and not len(batch.image_slots):
            loss_sum = loss_sum + unseen(features)
        owner = torch.repeat_interleave(torch.arange(len(batch.segment_lengths)), batch.segment_lengths)
        segment_losses = segment_sums(
            token_losses, to_device(owner, hidden.device)[labelled], len(batch.segment_lengths)
        )
        return LossOutput(loss_sum, segment_losses)

    def _hidden_states(self, batch: Batch, features: Any, tokens: Tensor) -> Tensor:
        """Final states [T, d] of the row, its segments isolated from each other."""
        decoder = self.llm.model
        arguments: dict[str, Any] = packing_arguments(
            decoder.config._attn_implementation,
            batch.segment_lengths,
            batch.input_ids.device,
            decoder.get_input_embeddings().weight.dtype,
            **({"blocks": batch.blocks} if batch.blocks.numel() else {}),
        )
        if features is not None and len(batch.image_slots):
            arguments["mm_encoder_outputs"] = {"image": placed(features, tokens, batch.image_slots.cpu())}
        outputs = self.parts.core(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids.unsqueeze(-2),
            use_cache=False,
            **arguments,
        )
        return outputs.last_hidden_state[0]

    def _check(self, batch: Batch, images: ImageInputs) -> None:
        """The loader's promises that the forward relies on. On a device the checks would wait for it."""
        num_labels, num_tokens = int((batch.labels != IGNORE_INDEX).sum()), len(batch.input_ids)
        assert num_labels == batch.num_label_tokens, f"{num_labels} labels, the batch says {batch.num_label_tokens}"
        assert int(batch.segment_lengths.sum()) == num_tokens == batch.position_ids.shape[-1], (
            f"segments of {batch.segment_lengths.tolist()} in a row of {num_tokens}"
        )
        places = int((batch.input_ids == self.config.image_token_id).sum())
        shown = int(images.tokens[batch.image_slots].sum())
        assert places == shown, f"{places} visual places for image runs of {shown} tokens"

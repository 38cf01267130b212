"""A vision-language model of transformers on packed rows: text and images in, the sum of the label losses out.

    images --get_image_features--> vectors of each distinct image, once
    input_ids --the family's own forward, images handed in, segments isolated--> [T, d] --head at labels--> loss

transformers' modules do the computing; what is ours is that images are encoded apart, so that no segment boundary
reaches the tower, that segments do not see each other, and that losses are exact sums. A row with images runs the tower
even if no token shows one, so that ranks never differ in which parameters a backward reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from vltrain.batch import Batch, ImageFeatures, ImageInputs
from vltrain.errors import InputError
from vltrain.families.table import family_of
from vltrain.models.backbones.llm import packed_losses
from vltrain.models.flops import Flops
from vltrain.models.interface import ImagePart, LossOutput, VisionLanguageModel
from vltrain.models.stock.features import Features, encode
from vltrain.models.stock.flops import count_flops, image_flops
from vltrain.models.stock.parts import Parts, holders, part_of, parts_of
from vltrain.models.stock.reach import Reach, reach_of
from vltrain.ops.attention import packing_arguments
from vltrain.ops.rows import owners
from vltrain.schema import IGNORE_INDEX, SQUARE


@dataclass(frozen=True)
class Decoder:
    """The LLM as the other rooms ask for it. model: its blocks, of transformers'; lm_head: its `LossHead`."""

    model: Any
    lm_head: Any

    @property
    def config(self) -> Any:
        return self.model.config


class ImageEncoder(nn.Module):
    """A core's `get_image_features`, which is a method and no forward: a module of its own, without parameters, so that
    ZeRO-3 gathers what the method reads."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self._network = [network]  # whose parameters are not this module's

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """Parameters that the core and what leads to the tower hold themselves, such as LLaVA-NeXT's newline."""
        [network] = self._network
        parts = parts_of(network)
        called = (parts.tower, parts.decoder)
        around = [module for _, module in holders(network, parts) if module not in called]
        return [parameter for module in around for parameter in module.parameters(recurse=False)]

    def forward(self, images: ImageInputs) -> Features:
        """See `vltrain.models.stock.features.encode`."""
        return encode(self._network[0].base_model, images)


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
        self.image_encoder = ImageEncoder(network)

    @property
    def writes(self) -> Literal["whole model"]:
        return "whole model"

    @property
    def template(self) -> str:
        return "processor"

    @property
    def parts(self) -> Parts:
        return parts_of(self.network)

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def visual_tokens(self) -> int:
        """Of an image of the size that the tower was made for; others take more or fewer."""
        return max(1, self._reach.tokens)

    @property
    def image_token(self) -> int:
        return self.config.image_token_id

    def nominal_images(self, count: int) -> ImageInputs:
        if not self._reach.tensors:
            raise InputError(
                f"a model of type {self.config.model_type!r}: how much memory its images take cannot be told without "
                f"a picture from its processor (tried {'; '.join(self._reach.misfits) or 'nothing, as it takes none'})"
            )
        return self._reach.images(count)

    @property
    def _reach(self) -> Reach:
        return reach_of(self.config)

    @property
    def llm(self) -> Decoder:  # pyright: ignore[reportIncompatibleVariableOverride] a view, not a module of its own
        return Decoder(self.network.get_decoder(), self.network.get_output_embeddings())

    @property
    def vision(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] as `llm`
        return self.network.get_encoder("image")

    @property
    def trains_on_text(self) -> bool:
        return any(
            parameter.requires_grad
            for module in (self.llm.model, self.llm.lm_head)
            for parameter in module.parameters()
        )

    @property
    def llm_blocks(self) -> list[nn.Module]:
        return list(self.parts.decoder_blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        parts = self.parts
        return [*parts.tower_blocks, *parts.decoder_blocks]

    @property
    def compilable_blocks(self) -> list[nn.Module]:
        """The LLM's alone: what goes through a tower's changes its shape with the size of each image, and how a family
        cuts it up changes with it."""
        return self.llm_blocks

    @classmethod
    def part_of(cls, name: str) -> str:
        return part_of(name)

    def flops(self) -> Flops:
        return count_flops(self.parts)

    def encode_images(self, pixels: ImageInputs | ImageFeatures) -> Any:
        """`Features` of N images together; None without images, and then no tower runs."""
        if len(pixels) == 0:
            return None
        return Features.kept(pixels) if isinstance(pixels, ImageFeatures) else self.image_encoder(pixels)

    def image_part(self) -> ImagePart:
        """All but decoder and head."""
        parts = self.parts
        others = {*parts.decoder.parameters(), *parts.decoder.buffers(), *parts.head.parameters()}
        every = (*self.named_parameters(), *self.named_buffers())
        return ImagePart(
            weights=frozenset(name for name, weight in every if weight not in others),
            facts={"config": self.config.to_dict(), "attention": parts.tower.config._attn_implementation},
            flops_per_image=image_flops(parts)[0],
        )

    def image_features(self, pixels: ImageInputs) -> ImageFeatures:
        """What the projector leaves, the further layers of some families beside it: rows [layers, d]."""
        return self.encode_images(pixels).as_kept()

    def look(self, states: Any, slots: Tensor, instruction_ids: Tensor) -> tuple[Any, Tensor]:
        return states, slots

    def read(self, input_ids: Tensor, features: Features | None, slots: Tensor, **arguments: Any) -> Tensor:
        """The family's own forward without its head.

        Args:
            input_ids: int64 [B, L], the model's own, an image's tokens included.
            features, slots: of the images that they show, int64 [K], run by run; None: no rank shows any.
            arguments: of transformers' forward: positions, masks, a cache.

        Returns: final states [B, L, d].
        """
        if features is not None:
            arguments["mm_encoder_outputs"] = {"image": features.placed(slots)}
        return self.parts.core(input_ids=input_ids, **arguments).last_hidden_state

    def token_types(self, input_ids: Tensor, blocks: Tensor) -> dict[str, Tensor]:
        """The argument that says which tokens are an image's, or a prefix's, for a forward that is not of a packed row:
        transformers takes a missing one for text, and says nothing.

        Args: `input_ids` and `blocks` int64 [B, L], see `vltrain.batch.Batch`.
        """
        family = family_of(self.config.model_type)
        if family.token_type_argument is None:
            return {}
        if family.blocks == "prefix":  # which is type 0, and what is to be written type 1
            return {family.token_type_argument: (blocks < 0).long()}
        return {family.token_type_argument: (input_ids == self.config.image_token_id).long()}

    def forward(self, batch: Batch) -> LossOutput:
        """Losses of one packed row. Under bf16 the caller runs it inside `torch.autocast`."""
        assert not isinstance(batch.pixels, Tensor), "pixels of a stock model come from its own processor"
        features = self.encode_images(batch.pixels)
        if batch.input_ids.device.type == "cpu":
            self._check(batch, features)
        positions = batch.position_ids.unsqueeze(-2)
        states = self.read(
            batch.input_ids[None], features, batch.image_slots, position_ids=positions, use_cache=False,
            **self._packing(batch),
        )[0]  # fmt: skip
        owner = owners(batch.segment_lengths, states.device)
        return LossOutput(*packed_losses(self.llm.lm_head, states, batch, owner))

    def _packing(self, batch: Batch) -> dict[str, Any]:
        decoder = self.llm.model
        return packing_arguments(
            decoder.config._attn_implementation,
            batch.segment_lengths,
            batch.input_ids.device,
            decoder.get_input_embeddings().weight.dtype,
            blocks=batch.blocks,
            block_rule=family_of(self.config.model_type).block_rule,
        )

    def _check(self, batch: Batch, features: Features | None) -> None:
        """The loader's promises that the forward relies on. On a device the checks would wait for it."""
        num_labels, num_tokens = int((batch.labels != IGNORE_INDEX).sum()), len(batch.input_ids)
        assert num_labels == batch.num_label_tokens, f"{num_labels} labels, the batch says {batch.num_label_tokens}"
        assert int(batch.segment_lengths.sum()) == num_tokens == batch.position_ids.shape[-1], (
            f"segments of {batch.segment_lengths.tolist()} in a row of {num_tokens}"
        )
        places = int((batch.input_ids == self.config.image_token_id).sum())
        shown = int(features.tokens[batch.image_slots].sum()) if features is not None else 0
        assert places == shown, f"{places} visual places for image runs of {shown} tokens"

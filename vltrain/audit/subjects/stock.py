"""A vision-language model of transformers as the architecture `stock` trains it, with pictures for its own image
processor."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vltrain.audit.samples import MIXED, segment_of
from vltrain.audit.small.pictures import image_processor, pictures, tensors_of, tokens_of
from vltrain.audit.subject import Made, Reference, reloaded
from vltrain.batch import ImageInputs
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.model.stock import LowRankConfig, NetworkConfig, StockConfig, StockSection
from vltrain.data.pictures import Pictures
from vltrain.families.table import family_of
from vltrain.models.build import build_model
from vltrain.models.resized import RANK
from vltrain.models.stock.fold.merge import merged_network
from vltrain.models.stock.source import network_class
from vltrain.schema import PackedRow, Segment


class Shown:
    """An `ImageReader` of the pictures made here; a picture is its number."""

    counts_matter = False

    def __init__(self, processor: Any, core: Any) -> None:
        self.processor, self.made = processor, pictures()
        self.tokens = [tokens_of(core, tensors_of(processor, [one])) for one in self.made]
        self.filler: PackedRow | None = None

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Of pictures by their numbers."""
        return tensors_of(self.processor, [self.made[int(name)] for name in names]) if names else {}

    def stack(self, pictures: Sequence[np.ndarray], counts: Sequence[int]) -> ImageInputs:
        """All processed together."""
        numbers = [int(one[0]) for one in pictures]
        tokens = torch.tensor([self.tokens[one] for one in numbers], dtype=torch.int64)
        return ImageInputs(tensors=self.tensors([str(one) for one in numbers]), tokens=tokens)

    def blank(self) -> np.ndarray:
        """The first picture."""
        return np.array([0])

    def filler_row(self, image: bool) -> PackedRow:
        """Two tokens of a segment."""
        assert self.filler is not None, "make sets it"
        return self.filler


class StockReference(Reference):
    """The family's own class, which makes positions and masks itself."""

    def __init__(self, network: Any, shown: Shown) -> None:
        super().__init__()
        self.network, self.shown = network, shown
        self.family = family_of(network.config.model_type)

    @property
    def llm(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] a view
        return self.network

    @property
    def reads_ids(self) -> Any:
        return self.network

    def types(self, ids: Tensor) -> Tensor:
        """int64 [L]: 1 where an image stands."""
        return (ids == self.network.config.image_token_id).long()

    def predictions(self, segment: Segment) -> Tensor:
        ids = torch.from_numpy(segment.input_ids).long()
        known = inspect.signature(self.network.forward).parameters
        given = {name: one for name, one in self.shown.tensors(segment.images).items() if name in known}
        if self.family.token_type_argument is not None:
            types = self.types(ids)
            if self.family.blocks == "prefix":
                types = torch.from_numpy(segment.blocks < 0).long()
            given[self.family.token_type_argument] = types[None]
        logits = self.network(input_ids=ids[None], use_cache=False, **given).logits[0, :-1]
        return logits[torch.from_numpy(segment.loss_mask)[1:]]

    def placed(self, segment: Segment) -> Segment:
        """With positions and blocks, as the family's processor has them."""
        ids, core = torch.from_numpy(segment.input_ids).long(), self.network.base_model
        count = len(ids)
        first = self.family.first_position
        positions = np.arange(first, first + count, dtype=np.int32)[None] if first else segment.position_ids
        if hasattr(core, "get_rope_index"):
            known = inspect.signature(core.get_rope_index).parameters
            given = self.shown.tensors(segment.images) | {"mm_token_type_ids": self.types(ids)[None]}
            found, _ = core.get_rope_index(ids[None], **{name: one for name, one in given.items() if name in known})
            positions = found[:, 0].to(torch.int32).numpy()
        return replace(segment, position_ids=positions, blocks=self._blocks(segment))

    def _blocks(self, segment: Segment) -> np.ndarray:
        if not self.family.blocks:
            return segment.blocks
        numbers = np.full(len(segment.input_ids), -1, np.int32)
        if self.family.blocks == "prefix":
            numbers[: int(segment.loss_mask.argmax())] = 0
            return numbers
        places = np.flatnonzero(segment.input_ids == self.network.config.image_token_id)
        runs = np.split(places, np.cumsum(segment.image_tokens)[:-1]) if len(places) else []
        for number, run in enumerate(runs):
            numbers[run] = number
        return numbers


def make(section: StockConfig) -> Made:
    """Of a small section. Raises InputError for one that `stock` refuses."""
    model: Any = build_model(section)
    config = copy.deepcopy(model.config)
    network: Any = network_class(config)._from_config(config, attn_implementation="eager").train()
    shown = Shown(image_processor(config), network.base_model)
    reference = StockReference(network, shown)
    segments = [
        reference.placed(segment_of(shape, number, shown.tokens, config.image_token_id))
        for number, shape in enumerate(MIXED)
    ]
    shown.filler = _filler(next(one for one in segments if not one.images))
    reader: Any = shown

    def folded() -> Reference:
        merged, _ = merged_network(model)
        with tempfile.TemporaryDirectory() as folder:
            return StockReference(reloaded(type(network), merged.config, merged.state_dict(), folder), shown)

    return Made(
        kind=config.model_type,
        model=model,
        reference=reference,
        roots=[(model.network, network)],
        segments=segments,
        pictures=Pictures(reader, lambda name: np.array([int(name)])),
        folded=folded,
    )


def _filler(segment: Segment) -> PackedRow:
    return PackedRow(
        input_ids=segment.input_ids[:2],
        loss_mask=np.zeros(2, bool),
        segment_lengths=np.array([2], np.int32),
        image_ids=np.empty(0, np.int64),
        image_slots=np.empty(0, np.int32),
        sample_ids=("filler",),
        position_ids=segment.position_ids[:, :2],
        blocks=segment.blocks[:2],
    )


def usual_tunings(config: PreTrainedConfig) -> dict[str, StockConfig]:
    """By what they are, in words: the ways to tune that a model is audited with where no recipe names its own."""

    def tuned(**settings: Any) -> StockConfig:
        adapter = settings.pop("adapter", None) or AdapterConfig(vision="none", llm="none")
        section = StockSection(config=config.to_dict(), processor="none", attention="sdpa", **settings)
        return StockConfig(stock=section, adapter=adapter)

    lora = NetworkConfig(peft=LowRankConfig(kind="lora", rank=RANK))
    return {
        "all weights": tuned(tune="full"),
        "adapters": tuned(adapter=AdapterConfig(dim=8, bias=False, vision="attention", llm="both")),
        "LoRA": tuned(vision=lora, llm=lora),
        "projector": tuned(tune="projector"),
    }

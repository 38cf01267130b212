"""A vision-language model of transformers as the architecture `stock` trains it, with pictures for its own image
processor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vltrain.audit.pieces import Piece
from vltrain.audit.small.pictures import image_processor, pictures, tensors_of, tokens_of
from vltrain.audit.small.sizes import VOCABULARY
from vltrain.audit.small.weights import disturb
from vltrain.audit.subject import RESERVED, Subject, Tuning, copy_weights
from vltrain.audit.text_model import RANK
from vltrain.audit.vision_answers import Shown, decode
from vltrain.batch import Batch, ImageInputs
from vltrain.config.model.mmt import AdapterConfig
from vltrain.config.model.stock import LowRankConfig, NetworkConfig, StockConfig, StockSection
from vltrain.families.family import Family
from vltrain.families.table import family_of
from vltrain.models.build import build_model
from vltrain.models.stock.build import trained_parts
from vltrain.models.stock.fold.merge import merged_network
from vltrain.models.stock.source import network_class
from vltrain.schema import IGNORE_INDEX

# Of each segment: runs of text tokens (numbers) and images (letters); the last run carries the labels.
SHAPES: tuple[tuple[int | str, ...], ...] = (
    (4, "a", 9), (2, "b", 3, "a", 6), (17,), (3, "c", 8), (1, "a", 7), (12,),
)  # fmt: skip


class VisionPieces:
    """Segments with images for a family, and what they are packed and fed to the reference with."""

    def __init__(self, config: PreTrainedConfig, reference: Any) -> None:
        self.config, self.reference = config, reference
        self.family: Family = family_of(config.model_type)
        self.processor = image_processor(config)
        self.pictures = pictures()
        core = reference.base_model
        self.tokens = [tokens_of(core, tensors_of(self.processor, [one])) for one in self.pictures]
        self.first_special = VOCABULARY - RESERVED
        generator = torch.Generator().manual_seed(0)
        self.pieces = [self._piece(shape, generator) for shape in SHAPES]

    def _piece(self, shape: Sequence[int | str], generator: torch.Generator) -> Piece:
        images = tuple("abc".index(run) for run in shape if isinstance(run, str))
        runs = [
            torch.full((self.tokens["abc".index(run)],), self.config.image_token_id)
            if isinstance(run, str)
            else torch.randint(3, self.first_special, (run,), generator=generator)
            for run in shape
        ]
        ids = torch.cat(runs)
        answer = len(ids) - len(runs[-1]) // 2  # where it begins; half of the last run still asks
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[answer - 1 : -1] = ids[answer:]
        if not images:
            labels[:-1] = ids[1:]
            answer = 1
        number = torch.full_like(ids, -1)
        if self.family.blocks == "prefix":
            number[:answer] = 0
            labels[: answer - 1] = IGNORE_INDEX
        elif self.family.blocks == "images":
            place = 0
            for count, run in enumerate(runs):
                if isinstance(shape[count], str):
                    number[place : place + len(run)] = count
                place += len(run)
        return Piece(
            input_ids=ids,
            labels=labels,
            position_ids=self._positions(ids, images),
            blocks=number if self.family.blocks else torch.empty(0, dtype=torch.int64),
            images=images,
            first_special=self.first_special,
        )

    def _positions(self, ids: Tensor, images: tuple[int, ...]) -> Tensor:
        core = self.reference.base_model
        if not hasattr(core, "get_rope_index"):
            return torch.arange(len(ids)) + self.family.first_position
        known = inspect.signature(core.get_rope_index).parameters
        given = tensors_of(self.processor, [self.pictures[one] for one in images]) if images else {}
        given |= {"mm_token_type_ids": self.types(ids)[None]}
        positions, _ = core.get_rope_index(ids[None], **{name: one for name, one in given.items() if name in known})
        return positions[:, 0]

    def prompts(self) -> list[Piece]:
        """Questions: the segments without what they answer, in the order in which `generate` takes them."""
        asked = [_question(piece) for piece in self.pieces]
        return sorted(asked, key=lambda one: (len(one.input_ids), one.images))

    def types(self, ids: Tensor) -> Tensor:
        """int64 [L]: 1 where an image stands."""
        return (ids == self.config.image_token_id).long()

    def row(self, pieces: Sequence[Piece]) -> Batch:
        """A packed row in which each distinct image stands once; one without has an image that no token shows, as where
        other ranks have some."""
        shown = [image for piece in pieces for image in piece.images]
        distinct = list(dict.fromkeys(shown)) or [0]
        tensors = tensors_of(self.processor, [self.pictures[one] for one in distinct])
        return Batch(
            input_ids=torch.cat([one.input_ids for one in pieces]),
            labels=torch.cat([one.labels for one in pieces]),
            position_ids=torch.cat([one.position_ids for one in pieces], dim=-1),
            segment_lengths=torch.tensor([len(one.input_ids) for one in pieces]),
            pixels=ImageInputs(tensors=tensors, tokens=torch.tensor([self.tokens[one] for one in distinct]).long()),
            image_slots=torch.tensor([distinct.index(one) for one in shown], dtype=torch.int64),
            blocks=torch.cat([one.blocks for one in pieces]),
            sample_ids=tuple(str(place) for place in range(len(pieces))),
            num_label_tokens=sum(one.num_labels for one in pieces),
            label_lengths=torch.tensor([one.num_labels for one in pieces]),
        )

    def arguments(self, piece: Piece) -> dict[str, Any]:
        """What the family's forward takes for a segment alone: it makes positions and masks itself."""
        known = inspect.signature(self.reference.forward).parameters
        given: dict[str, Any] = {"input_ids": piece.input_ids[None]}
        if piece.images:
            tensors = tensors_of(self.processor, [self.pictures[one] for one in piece.images])
            given |= {name: one for name, one in tensors.items() if name in known}
        if self.family.token_type_argument is not None:
            types = self.types(piece.input_ids)
            if self.family.blocks == "prefix":
                types = (piece.blocks < 0).long()
            given[self.family.token_type_argument] = types[None]
        return given


def _question(piece: Piece) -> Piece:
    """A segment up to where its labels begin."""
    labelled = int((piece.labels != IGNORE_INDEX).nonzero()[0]) + 1
    end = labelled if piece.images else len(piece.input_ids) // 2
    return replace(
        piece,
        input_ids=piece.input_ids[:end],
        labels=piece.labels[:end],
        position_ids=piece.position_ids[..., :end],
        blocks=piece.blocks[:end] if not len(piece.blocks) or piece.images else piece.blocks[:end].clamp(max=-1),
    )


def stock_model(config: PreTrainedConfig, **tuned: Any) -> StockConfig:
    """A recipe's model of random weights of a small config, without adapters unless `tuned` has some."""
    adapter = tuned.pop("adapter", None) or AdapterConfig(vision="none", llm="none")
    section = StockSection(config=config.to_dict(), processor="none", attention="sdpa", **tuned)
    return StockConfig(stock=section, adapter=adapter)


def vision_subject(config: PreTrainedConfig) -> Subject:
    """Of a small config of a vision-language model. Raises InputError for one that `stock` refuses."""
    model: Any = build_model(stock_model(config, tune="full"))
    reference = network_class(config)._from_config(config, attn_implementation="eager").train()
    disturb(model, model.llm.lm_head)
    made = VisionPieces(config, reference)
    subject = Subject(
        kind=config.model_type,
        model=model,
        reference=reference,
        names={name: name.removeprefix("network.") for name, _ in model.named_parameters()},
        pieces=made.pieces,
        row=made.row,
        arguments=made.arguments,
        prompts=made.prompts(),
        decode=partial(decode, model, Shown(made)),
    )
    copy_weights(subject)
    return subject


def usual_tunings(config: PreTrainedConfig) -> dict[str, StockConfig]:
    """By what they are, in words: the ways to tune that a model is audited with where no recipe names its own."""
    lora = NetworkConfig(peft=LowRankConfig(kind="lora", rank=RANK))
    return {
        "adapters": stock_model(config, adapter=AdapterConfig(dim=8, bias=False, vision="attention", llm="both")),
        "LoRA": stock_model(config, vision=lora, llm=lora),
        "projector": stock_model(config, tune="projector"),
        "all weights": stock_model(config, tune="full"),
    }


def vision_tuning(title: str, section: Any, subject: Subject) -> Tuning:
    """A small model tuned as a section says, with rows that every rank may get."""
    model: Any = build_model(section)
    disturb(model, model.llm.lm_head)
    beside = subject.row([piece for piece in subject.pieces if not piece.images])
    parts = trained_parts(section)
    return Tuning(
        title=title,
        model=model,
        rows={
            "a row with images": subject.row(subject.pieces),
            "a row of text, with an image for other ranks' sake": beside,
            "a filler": replace(beside, is_filler=True),
        },
        trained=frozenset(name for name, _ in model.named_parameters() if model.part_of(name) in parts),
        merged=lambda: merged_network(model)[0],
    )

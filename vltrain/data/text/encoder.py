"""How one model's samples become tokens: tokenizer, template and what an image takes, as one object that packing,
questions, ranking and everything else ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from vltrain.data.text.conversation import (
    Template,
    encode_candidate,
    encode_prompt,
    encode_sample,
    find_template,
    fingerprint,
    stop_ids,
)
from vltrain.data.text.pairs import Pair, encode_pairs
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.schema import Sample, Segment

SizeOf: TypeAlias = Callable[[str], tuple[int, int]]
"""(height, width) in pixels of a sample's image, upright, by the name that the sample gives it."""


class SampleEncoder(Protocol):
    """Samples to tokens. Picklable.

    template       its name, as a recipe and the packs' manifest say it
    visual_tokens  placeholders that every image takes; 0 where they depend on its size
    multi_turn     whether a conversation may have several questions
    needs_image    whether a question must show an image
    counts_matter  whether what an image takes depends on whether it stands alone in its sample
    padded         whether samples are rows of an encoder-decoder's batch instead of segments of a pack
    stop_ids       ids after which a generated answer is complete
    fingerprint    SHA-256 (hex) of all that decides the tokens; shards that were packed with another are refused
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def template(self) -> str: ...
    @property
    def visual_tokens(self) -> int: ...
    @property
    def multi_turn(self) -> bool: ...
    @property
    def needs_image(self) -> bool: ...
    @property
    def counts_matter(self) -> bool: ...
    @property
    def padded(self) -> bool: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def fingerprint(self) -> str: ...

    def sample(self, sample: Sample, size_of: SizeOf, *, askable: bool = False) -> Segment:
        """A whole sample. Raises InputError for one that cannot be trained on; with `askable` also where an answer's
        prompt by itself would have other tokens, so that evaluation would ask something else."""
        ...

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair | None]:
        """`sample` of many questions with one answer each, at once; None for each of which only a sample tells all."""
        ...

    def prompt(self, sample: Sample, size_of: SizeOf) -> Segment:
        """Everything before the last answer: a prefix, id for id, of what `sample` gives. `loss_mask` is true on
        earlier answers."""
        ...

    def candidate(self, sample: Sample, text: str, whole: bool, size_of: SizeOf) -> Segment:
        """The sample with `text` in the place of its last answer, the only tokens that `loss_mask` marks. `whole`: with
        the tokens that end an answer."""
        ...


@dataclass(frozen=True)
class TemplateEncoder:
    """A `SampleEncoder`: a template of `vltrain.data.text.conversation`, and so many tokens for every image."""

    tokenizer: Tokenizer
    template: str
    visual_tokens: int
    counts_matter: bool = False

    @property
    def _template(self) -> Template:
        return find_template(self.template)

    @property
    def multi_turn(self) -> bool:
        return self._template.multi_turn

    @property
    def needs_image(self) -> bool:
        return self._template.needs_image

    @property
    def padded(self) -> bool:
        return self._template.padded

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return stop_ids(self.tokenizer, self.template)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.tokenizer, self.template)

    def sample(self, sample: Sample, size_of: SizeOf, *, askable: bool = False) -> Segment:
        return encode_sample(sample, self.tokenizer, self.template, self.visual_tokens, askable)

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair | None]:
        return (
            [None] * len(texts) if self.template != "mmt" else encode_pairs(texts, self.tokenizer, self.visual_tokens)
        )

    def prompt(self, sample: Sample, size_of: SizeOf) -> Segment:
        return encode_prompt(sample, self.tokenizer, self.template, self.visual_tokens)

    def candidate(self, sample: Sample, text: str, whole: bool, size_of: SizeOf) -> Segment:
        return encode_candidate(sample, text, whole, self.tokenizer, self.template, self.visual_tokens)

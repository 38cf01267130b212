"""What a vocabulary loses of samples' texts: parts that become the unknown token, and answers that do not read back
from their own tokens.

A model learns what its tokens say. Where the vocabulary lacks `{`, it learns and says something else than the
reference, and no training mends that.
Nothing is refused for it, since an odd character in a million samples is no reason to stop; it is counted, kept in the
packs' manifest and told.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vltrain.data.text.tokenizer import Tokenizer
from vltrain.schema import Sample, Segment, unescape_markers

MOST_PARTS = 20  # that a manifest lists, of those that most samples have
MOST_EXAMPLES = 3
_PART_LENGTH, _EXAMPLE_LENGTH = 20, 80  # characters
_RARE = "\ue123 ☃ 𝄞"  # what a vocabulary of words has not, and one of bytes spells


@dataclass(kw_only=True)
class Spelling:
    """Counts over samples, which can be added up.

    unknown   samples with something that the LLM's vocabulary cannot spell
    parts     what that is -> in how many samples
    altered   samples with an answer that does not read back as it is, and `examples` of them: id, answer, how it reads
    prompts   samples whose prompt the Q-Former's vocabulary cannot spell
    """

    unknown: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    altered: int = 0
    examples: list[list[str]] = field(default_factory=list)
    prompts: int = 0

    def add(self, sample_id: str, lost: Lost) -> None:
        """Counts what is lost of a sample."""
        self.unknown += bool(lost.parts)
        self.parts.update(lost.parts)
        self.altered += lost.altered is not None
        if lost.altered is not None and len(self.examples) < MOST_EXAMPLES:
            self.examples.append([sample_id, *(text[:_EXAMPLE_LENGTH] for text in lost.altered)])
        self.prompts += lost.prompt

    def merge(self, other: dict[str, Any]) -> None:
        """Adds the counts of `to_json`."""
        self.unknown, self.altered, self.prompts = (
            self.unknown + other["unknown"],
            self.altered + other["altered"],
            self.prompts + other["prompts"],
        )
        self.parts.update(other["parts"])
        self.examples = [*self.examples, *other["examples"]][:MOST_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        """All counts, ready for `merge`."""
        return {**vars(self), "parts": dict(self.parts)}

    def for_manifest(self) -> dict[str, Any] | None:
        """What a manifest keeps; None where nothing is lost."""
        if not (self.unknown or self.altered or self.prompts):
            return None
        most = sorted(self.parts.items(), key=lambda one: (-one[1], one[0]))[:MOST_PARTS]
        return {**vars(self), "parts": dict(most)}


class Lost(NamedTuple):
    """What is lost of one sample: parts that are unknown; an answer that reads otherwise, and how; whether the
    Q-Former cannot spell the prompt."""

    parts: frozenset[str] = frozenset()
    altered: tuple[str, str] | None = None
    prompt: bool = False


def lost_of(sample: Sample, segment: Segment, tokenizer: Tokenizer, ends: Collection[int]) -> Lost:
    """What of a sample its segment does not say; `ends`: ids that end an answer."""
    parts: set[str] = set()
    if tokenizer.unk_id is not None and tokenizer.unk_id in segment.input_ids:
        parts.update(
            part[:_PART_LENGTH]
            for turn in sample.turns
            for part in tokenizer.unknown_parts(unescape_markers(turn.text))
        )
    elif drops_unknown(tokenizer):
        parts.update(*(_dropped(turn.text, tokenizer) for turn in sample.turns))
    both = _read_back(sample, segment, tokenizer, ends)
    altered = next(((said, read) for said, read in both if said.strip() != read.strip()), None)
    instruction = tokenizer.instruction
    prompt = instruction is not None and instruction.num_unknown(segment.instruction_ids.tolist()) > 0
    return Lost(frozenset(parts), altered, prompt) if parts or altered or prompt else NOTHING_LOST


NOTHING_LOST = Lost()


def _read_back(
    sample: Sample, segment: Segment, tokenizer: Tokenizer, ends: Collection[int]
) -> Iterator[tuple[str, str]]:
    """Each answer, and how it reads from the tokens that are predicted of it."""
    answers = [unescape_markers(turn.text) for turn in sample.turns if turn.role == "assistant"]
    bounds = _runs(segment.loss_mask.tobytes())
    if len(bounds) == len(answers):
        for text, (first, last) in zip(answers, bounds, strict=True):
            last -= segment.input_ids[last - 1] in ends
            yield text, _text_of(tokenizer, segment.input_ids[first:last].tobytes())
    else:  # nothing stands between two of them
        yield from ((text, tokenizer.decode(tokenizer.encode(text))) for text in answers)


def _runs(mask: bytes) -> list[tuple[int, int]]:
    """(first, end) of each run of ones. On bytes, since NumPy takes longer to be called than an answer to be looked
    through."""
    runs: list[tuple[int, int]] = []
    first = mask.find(1)
    while first >= 0:
        end = mask.find(0, first)
        end = len(mask) if end < 0 else end
        runs.append((first, end))
        first = mask.find(1, end)
    return runs


@functools.lru_cache(maxsize=4096)  # short answers come again and again
def _text_of(tokenizer: Tokenizer, ids: bytes) -> str:
    return tokenizer.decode(np.frombuffer(ids, np.int32).tolist())


@functools.lru_cache(maxsize=4)
def drops_unknown(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has no unknown token and leaves out what it cannot spell."""
    return tokenizer.unk_id is None and tokenizer.decode(tokenizer.encode(_RARE)) != _RARE


def _dropped(text: str, tokenizer: Tokenizer) -> set[str]:
    return set(text) - set(tokenizer.decode(tokenizer.encode(text)))


def describe_lost(lost: dict[str, Any] | None, num_samples: int) -> list[str]:
    """Lines on what `Spelling.for_manifest` gave."""
    if lost is None:
        return []
    lines: list[str] = []
    if lost["unknown"]:
        parts = ", ".join(f"{part!r} in {count}" for part, count in list(lost["parts"].items())[:8])
        lines.append(
            f"{lost['unknown']} of {num_samples} samples contain text that the vocabulary cannot encode (unknown "
            f"tokens): {parts}"
        )
    if lost["altered"]:
        name, answer, read = lost["examples"][0]
        lines.append(
            f"the answers of {lost['altered']} of {num_samples} samples decode differently from their tokens, and "
            f"that is what is learned: '{name}': "
            f"{answer!r} as {read!r}"
        )
    if lost["prompts"]:
        lines.append(
            f"the Q-Former's vocabulary cannot spell the prompts of {lost['prompts']} of {num_samples} samples"
        )
    return lines

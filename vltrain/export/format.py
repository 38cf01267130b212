"""What an export format is, and what it is given: the words that the table and the files behind it share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vltrain.config.schema import Config
from vltrain.data.text.asked import Asked
from vltrain.data.text.instruction import InstructionSource
from vltrain.export.questions import as_asked
from vltrain.schema import Sample
from vltrain.train.checkpoints.checkpoint import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that is exported.

    checkpoint  the tuned weights; None: the model before tuning
    before      where `checkpoint` is None: the trained weights that the run began with (`train.init_from`), or None for
                fresh ones
    tokenizer   the arguments of `vltrain.data.text.tokenizer.load_tokenizer`
    asked       how the training's questions were put, where that is known
    max_new_tokens  that an answer may have: the recipe's, or as evaluation derives it from the references
    facts       which weights these are, plain JSON: see `vltrain.inference.run.weights_used`
    """

    run: Path
    config: Config
    checkpoint: Checkpoint | None
    tokenizer: tuple[str, InstructionSource | None]
    before: Checkpoint | None = None
    max_new_tokens: int = 64
    asked: Asked | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Checkpoint | None:
        """The trained weights to export; None for fresh ones."""
        return self.checkpoint or self.before


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the command line asks of a format. `engine`: the one that is to load the folder, None where none was
    named."""

    dtype: str = "fp32"
    engine: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format has to say of a folder that it wrote.

    notes: lines to print and to put into the model card: which programs load it, rounding. facts: plain JSON, for the
    origin file"""

    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How a folder is read: lines of Python that its model card shows and its proof runs.

    load    with `folder`: gives what `ask` needs
    ask     with `image` (of Pillow, a list of several, or None), `question` and `max_new_tokens`: sets `answer`, a
            text, and `new`, its tokens int64 [A] or [A + 1] with the one that ended it, where it
            has them; where `answer` is None the largest logits tell it
    logits  after `ask`, with `answer_ids` int64 [1, A]: sets `logits` [S, vocabulary] that follow the prompt and each
            token of the answer, S > A. The three may also use `base` (the folder of the base, where there is one),
            `run`, and the sample as the run reads it: `case["prompt"]` (int64 [L], placeholders below zero),
            `case["read"]` (what a Q-Former reads), `case["pixels"]` (uint8 [K, 3, H, W]) and `case["pixel_values"]`
            (the same, normalised); a card shows no `ask` that uses them
    question  the sample's question as `ask` gets it
    takes     which samples can be asked like that
    drafts    JPEGs far larger than the model's images are opened as the run opens them, at a fraction of their size,
              since stock processors decode them whole:
            values differ by some 1 of 255, which is no fault of the folder
    base      where the base lies that the folder is put on, which it may write into the folder that it is given; None:
              it needs none
    is_ours   read by vltrain itself, in another process
    """

    load: str
    ask: str
    logits: str
    question: Callable[[Sample], Any] = as_asked
    takes: Callable[[Sample], bool] = lambda sample: True
    base: Callable[[Source, Path], str] | None = None
    drafts: bool = False
    is_ours: bool = False


def _refuse_nothing(source: Source, choices: Choices) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a trained model.

    summary      what it writes, for the help
    loads        what loads it, for the help
    write        (folder, source, choices): fills the folder, which appears under its name when it is whole; what it has
                 to say. Raises InputError
    proof        how the folder is read, by its users and by the proof
    refuse       raises InputError for what the format cannot hold, by the recipe alone: before any weight is read
    card         lines of Markdown that tell how it is loaded, FOLDER its name; None: the proof's lines
    library      the library that loads it, in the words of model cards
    options      the fields of `Choices` that it reads: another one on the command line is refused, since it would have
                 no effect
    reads_base   whether the frozen weights are read, so that their digests are compared with those of the training
    needs_tuned  whether there must be tuned weights: `--checkpoint none` is refused
    """

    summary: str
    loads: str
    write: Callable[[Path, Source, Choices], Written | None]
    proof: Proof
    refuse: Callable[[Source, Choices], None] = _refuse_nothing
    card: str | None = None
    library: str = "transformers"
    options: frozenset[str] = frozenset()
    reads_base: bool = True
    needs_tuned: bool = True

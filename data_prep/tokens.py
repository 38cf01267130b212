"""Samples -> tokens, in several processes; and a part's tokens on disk, for the merge.

tokens.bin, mask.bin     int32 tokens and bool loss mask of all samples, one after another
instruction.bin          int32 tokens by which a Q-Former reads their prompts, likewise
positions.bin            int32 positions of a stock model's samples, all rows of each; blocks.bin likewise
samples.jsonl            per chunk of samples their ids, images and lengths in tokens
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.parallel import in_chunks, ordered_map
from data_prep.prepare import MAX_IMAGE_PIXELS
from data_prep.sources.splits.drawn import share_of
from vltrain.config.model.base import ProcessorPlaces
from vltrain.console import Progress
from vltrain.data.images import sizes_below
from vltrain.data.text.encoder import SampleEncoder, SizeOf, TemplateEncoder
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.pairs import Pair
from vltrain.data.text.spelling import NOTHING_LOST, Lost, Spelling, lost_of
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.files.strict_json import is_blank, parse_json, parse_line, read_lines, require_plain_file
from vltrain.schema import IMAGE_MARKER, Sample, Turn, path_fault, question_and_answer

_LINES_PER_CHUNK = 512
# Questions and answers that are remembered with their tokens, in a process, and how long both together are at most, in
# characters: some 20 MB.
_MOST_KNOWN, _SHORT = 1 << 14, 256


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How samples become packs.

    Args:
        tokenizer: any notation of `vltrain.files.locate`.
        template: a name of `vltrain.data.text.conversation.TEMPLATES`.
        visual_tokens: V, tokens that an image takes.
        pack_length: tokens that a pack holds.
        max_images: images that a pack may hold; None: no bound.
        seed: of the assignment to packs.
        over_long: "error" or "drop", for samples that do not fit into a pack.
        max_image_pixels: larger images are refused.
        instruction: the Q-Former's tokenizer, for templates that one reads.
        processor: of a stock model, which decides tokens in the place of tokenizer, template and visual tokens.
        fraction: share of the samples that is packed, see `drawn`.
        fraction_seed: which they are.
    """

    tokenizer: str
    template: str = "mmt"
    visual_tokens: int
    pack_length: int
    max_images: int | None = None
    seed: int = 0
    over_long: str = "error"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    instruction: InstructionSource | None = None
    processor: ProcessorPlaces | None = None
    fraction: float = 1.0
    fraction_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction: found {self.fraction:g}, expected a share above 0, at most 1")

    def none_drawn(self, count: int) -> InputError:
        """The error where none of so many samples is drawn."""
        named = f"fraction {self.fraction:g} with seed {self.fraction_seed}"
        return InputError(f"{named} draws none of {count} samples; raise it (in a recipe: data.fraction)")

    def share(self) -> dict[str, Any]:
        """What packs of a share of the samples are told to be made with; nothing of packs of all."""
        return {} if self.fraction == 1 else {"fraction": self.fraction, "fraction_seed": self.fraction_seed}

    def drawn(self, ids: list[str]) -> np.ndarray:
        """bool [ids], which of them `fraction` draws: by a hash of seed and id, so that a smaller share lies inside of
        a larger one, whatever other samples there are."""
        if self.fraction == 1:
            return np.ones(len(ids), bool)
        shares = (share_of(f"fraction {self.fraction_seed}: {name}") for name in ids)
        return np.fromiter(shares, np.float64, len(ids)) < self.fraction

    def encoder(self) -> SampleEncoder:
        """What makes tokens of samples. Raises InputError for what cannot be loaded."""
        if self.processor is None:
            loaded = load_tokenizer(self.tokenizer, self.instruction)
            return TemplateEncoder(loaded, self.template, self.visual_tokens)
        from vltrain.data.stock.encoder import StockEncoder  # loads transformers and torch
        from vltrain.data.stock.source import StockSource

        return StockEncoder(StockSource.of(self.processor))


def stock_places(place: str) -> ProcessorPlaces:
    """Those of a folder or hub name that has a stock model's processor and its config.json."""
    return ProcessorPlaces(key="--processor", source=place, model=place, config={}, options={})


@dataclass(kw_only=True)
class Tokens:
    """Some tokenised samples, as arrays: cheap to send between processes."""

    ids: list[str] = field(default_factory=list)
    images: list[tuple[str, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_labels: list[int] = field(default_factory=list)
    instruction_lengths: list[int] = field(default_factory=list)
    instruction_cuts: int = 0
    spelling: dict[str, Any] = field(default_factory=lambda: Spelling().to_json())
    input_ids: bytes = b""  # int32
    loss_mask: bytes = b""  # bool
    instruction_ids: bytes = b""  # int32
    # Of a stock model's samples: rows of positions, and placeholders of each image.
    position_rows: int = 0
    image_tokens: list[int] = field(default_factory=list)
    position_ids: bytes = b""  # int32
    blocks: bytes = b""  # int32


def tokenised(
    samples: Path, encoder: SampleEncoder, max_pixels: int, workers: int, span: tuple[int, int] | None = None
) -> Iterator[Tokens]:
    """Tokenises a file of samples, or the lines that begin in `span`: from one byte to before another.

    Raises: InputError if the file cannot be read or a line is no sample.
    """
    require_plain_file(samples, "prepared samples (vltrain prepare), or samples of your own, as JSON Lines")
    try:
        num_bytes = samples.stat().st_size
        stream = samples.open("rb")
    except OSError as error:
        raise InputError(f"{samples}: cannot be read ({error.strerror})") from None
    first, last = span or (0, num_bytes)
    shared = (str(samples), encoder, max_pixels)
    with stream, Progress(total=last - first, title="samples", unit="byte", in_bytes=True) as progress:
        chunks = in_chunks(_lines(stream, first, last), _LINES_PER_CHUNK)
        for tokens in ordered_map(_tokenise, chunks, workers, shared):
            yield tokens
            progress.update(stream.tell() - first - progress.done)


def _lines(stream: BinaryIO, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a binary file that begin in [first, last), with their numbers from 1."""
    number = 1
    if first > 0:
        position = 0
        while position < first - 1:
            block = stream.read(min(1 << 20, first - 1 - position))
            number += block.count(b"\n")
            position += len(block)
        # The rest of the line that holds the byte before: it began earlier, or ends just there.
        number += stream.readline().endswith(b"\n")
    while stream.tell() < last:
        line = stream.readline()
        if not line:
            return
        yield number, line
        number += 1


class _Encoded(NamedTuple):
    """A tokenised conversation, whichever sample it is of; see `Segment`."""

    input_ids: bytes
    loss_mask: bytes
    instruction_ids: bytes
    instruction_cut: int
    position_ids: bytes
    position_rows: int
    blocks: bytes
    image_tokens: list[int]
    lost: Lost


def _tokenise(lines: list[tuple[int, bytes]], file: str, encoder: SampleEncoder, max_pixels: int) -> Tokens:
    """One pass over the lines. Questions with one answer are encoded together, and one that came before, about whatever
    images, not again where every image takes as many tokens; all else, and what is no sample, goes by
    `Sample.from_json`."""
    rows: list[_Encoded | None] = []
    ids: list[str] = []
    images: list[tuple[str, ...]] = []
    waiting: dict[tuple[str, str], list[int]] = {}  # places in rows, by texts
    spelling, size_of = Spelling(), sizes_below(Path(file).parent, max_pixels)
    ends, known = encoder.stop_ids, _known(encoder)
    for number, line in lines:
        if is_blank(line, number):
            continue
        found = pair_of_line(line) if encoder.visual_tokens else None
        record = None if found else parse_line(line, file, number)
        if record is not None and encoder.visual_tokens and (texts := question_and_answer(record)) is not None:
            found = record["id"], tuple(record["images"]), texts
        if found is None:
            sample = Sample.from_json(record, f"{file}:{number}")
            name, shown, row = sample.id, sample.images, _encode(sample, encoder, size_of, ends)
        else:
            name, shown, texts = found
            row = known.get(texts)
            if row is None:
                waiting.setdefault(texts, []).append(len(rows))
        ids.append(name)
        images.append(shown)
        rows.append(row)
    for (texts, places), pair in zip(waiting.items(), encoder.pairs(list(waiting)), strict=True):
        if pair is not None:
            row = _of_pair(pair)
        else:
            asked, said = Turn(role="user", text=texts[0]), Turn(role="assistant", text=texts[1])
            sample = Sample(id=ids[places[0]], turns=(asked, said), images=images[places[0]])
            row = _encode(sample, encoder, size_of, ends)
        for place in places:
            rows[place] = row
        if len(texts[0]) + len(texts[1]) <= _SHORT:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[texts] = row
    done = [row for row in rows if row is not None]
    for name, row in zip(ids, done, strict=True):
        if row.lost is not NOTHING_LOST:
            spelling.add(name, row.lost)
    return _columns(ids, images, done, spelling)


def _of_pair(pair: Pair) -> _Encoded:
    mask = bytes(pair.num_tokens - pair.num_labels) + b"\1" * pair.num_labels
    return _Encoded(pair.input_ids, mask, b"", 0, b"", 0, b"", [], NOTHING_LOST)


_scan_string: Callable[[str, int], tuple[str, int]] = scanstring  # pyright: ignore[reportUnknownVariableType]
_TEXT = r'"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"'
_PAIR = re.compile(
    rf'{{"id": {_TEXT}, "images": \[(?:{_TEXT})?\], "turns": \[{{"role": "user", "text": {_TEXT}}}, '
    rf'{{"role": "assistant", "text": {_TEXT}}}\], "metadata": ({{.*}})}}\n?'
)


def pair_of_line(line: bytes) -> tuple[str, tuple[str, ...], tuple[str, str]] | None:
    """(id, images, (question, answer)) of a line that is, beyond doubt, a sample of those with at most one image, and
    spelled as preparing spells it. None for any other, which may be a sample or none: reading all of it says which."""
    try:
        found = _PAIR.fullmatch(line.decode()) if b"\\u" not in line else None  # which may be half of a character
        if found is None:
            return None
        texts: tuple[str, str | None, str, str, str] = found.groups()  # pyright: ignore[reportAssignmentType]
        identity, image, asked, said, metadata = texts
        if "\\" in identity or image and "\\" in image:
            return None
        asked = _unescaped(asked) if "\\" in asked else asked
        said = _unescaped(said) if "\\" in said else said
        parse_json(metadata.encode(), "")
    except (ValueError, InputError):
        return None
    if (
        identity.strip() and asked.strip() and said.strip()
        and IMAGE_MARKER not in said and asked.count(IMAGE_MARKER) == (image is not None)
        and (image is None or path_fault(image) is None)
    ):  # fmt: skip
        return identity, () if image is None else (image,), (asked, said)
    return None


def _unescaped(text: str) -> str:
    """What a JSON string says. Raises ValueError."""
    return _scan_string(text + '"', 0)[0]


@functools.lru_cache(maxsize=1)
def _known(encoder: SampleEncoder) -> dict[tuple[str, str], _Encoded]:
    """Of one encoder, questions and answers that were met."""
    return {}


def _encode(sample: Sample, encoder: SampleEncoder, size_of: SizeOf, ends: tuple[int, ...]) -> _Encoded:
    one = encoder.sample(sample, size_of, askable=True)
    return _Encoded(
        one.input_ids.tobytes(),
        one.loss_mask.tobytes(),
        one.instruction_ids.tobytes(),
        one.instruction_cut,
        one.position_ids.tobytes(),
        len(one.position_ids),
        one.blocks.tobytes(),
        one.image_tokens.tolist(),
        lost_of(sample, one, encoder.tokenizer, ends),
    )


def _columns(ids: list[str], images: list[tuple[str, ...]], rows: list[_Encoded], spelling: Spelling) -> Tokens:
    return Tokens(
        ids=ids,
        images=images,
        lengths=[len(row.loss_mask) for row in rows],
        num_labels=[row.loss_mask.count(1) for row in rows],
        instruction_lengths=[len(row.instruction_ids) // 4 for row in rows],
        instruction_cuts=sum(row.instruction_cut > 0 for row in rows),
        spelling=spelling.to_json(),
        input_ids=b"".join(row.input_ids for row in rows),
        loss_mask=b"".join(row.loss_mask for row in rows),
        instruction_ids=b"".join(row.instruction_ids for row in rows),
        position_rows=max((row.position_rows for row in rows), default=0),
        image_tokens=[count for row in rows for count in row.image_tokens],
        position_ids=b"".join(row.position_ids for row in rows),
        blocks=b"".join(row.blocks for row in rows),
    )


_FILES = {
    "tokens.bin": "input_ids",
    "mask.bin": "loss_mask",
    "instruction.bin": "instruction_ids",
    "positions.bin": "position_ids",
    "blocks.bin": "blocks",
}
_TOLD = (
    "ids",
    "images",
    "lengths",
    "num_labels",
    "instruction_lengths",
    "instruction_cuts",
    "spelling",
    "position_rows",
    "image_tokens",
)


def write_tokens(chunks: Iterable[Tokens], folder: Path) -> None:
    """Writes a part's tokens into `folder`."""
    with ExitStack() as stack:
        samples = stack.enter_context((folder / "samples.jsonl").open("w", encoding="utf-8"))
        files = {field: stack.enter_context((folder / name).open("wb")) for name, field in _FILES.items()}
        for chunk in chunks:
            for field, file in files.items():
                file.write(getattr(chunk, field))
            told = {name: getattr(chunk, name) for name in _TOLD}
            samples.write(json.dumps({**told, "num_blocks": len(chunk.blocks) // 4}) + "\n")


def read_tokens(folder: Path) -> Iterator[Tokens]:
    """What `write_tokens` wrote, chunk by chunk."""
    with ExitStack() as stack:
        tokens, mask, instruction, positions, blocks = (
            stack.enter_context((folder / name).open("rb")) for name in _FILES
        )
        for _, told in read_lines(folder / "samples.jsonl"):
            total, num_blocks = sum(told["lengths"]), told.pop("num_blocks")
            told["images"] = [tuple(one) for one in told["images"]]
            yield Tokens(
                **told, input_ids=tokens.read(4 * total), loss_mask=mask.read(total),
                instruction_ids=instruction.read(4 * sum(told["instruction_lengths"])),
                position_ids=positions.read(4 * total * told["position_rows"]), blocks=blocks.read(4 * num_blocks),
            )  # fmt: skip

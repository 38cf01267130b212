"""The receipt: a line per step in the run's folder that says what was trained on, each line chained to the one before.

    receipt.jsonl   {"receipt": 1, "run": ..., "data": ..., "packs": ..., "seed": ..., ..., "first_step": 0, ...}
                    {"step": 0, "samples": "9f0c...", "label_tokens": 812, "loss": "0x1.f3a2p+1", "chain": "41d7..."}
                    ...

`chain` is the SHA-256 of the chain before and of the line's other fields, so that no line can be changed, left out or
moved without a trace; the first chain value is that of the first line. A checkpoint holds the chain's head: a receipt
that was written anew does not fit it.

`samples` is the sum, over the step's packs, of a hash of the ids in the pack, as the ranks that trained on them saw
them. A sum has no order, as a step has none, and so it is the same however packs are assigned to ranks, and rides along
with the loss when that is summed over ranks. Trade-off: 128 bits that add up withstand mistakes, not an
adversary who forges sample ids. `loss` is written exactly (`float.hex`).

The header holds digests of the frozen weights at the start, by PART/DTYPE, and so does the line of a step that a
checkpoint follows (`frozen`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vltrain.errors import InputError
from vltrain.files.appended import AppendedFile, OneWriter
from vltrain.files.atomic import write_whole
from vltrain.files.strict_json import is_object, parse_json, require_plain_file

logger = logging.getLogger(__name__)

RECEIPT = "receipt.jsonl"
FORMAT_VERSION = 1
WORDS = 4  # of 32 bits, so that their sums over a million packs are exact in fp64
MAX_LINE_BYTES = 1 << 16


def pack_fingerprint(sample_ids: Sequence[str]) -> tuple[int, ...]:
    """`WORDS` numbers below 2^32 for the samples of a pack."""
    return struct.unpack(f">{WORDS}I", hashlib.sha256(json.dumps(list(sample_ids)).encode()).digest()[: 4 * WORDS])


def fingerprint(packs: Iterable[Sequence[str]]) -> tuple[int, ...]:
    """The sums, word by word, of the packs' fingerprints; of one rank's packs, or of a whole step's."""
    return tuple(map(sum, zip((0,) * WORDS, *map(pack_fingerprint, packs))))


def samples_text(sums: Iterable[float]) -> str:
    """The `samples` of a line: a whole step's fingerprint, 32 hexadecimal digits."""
    return "".join(f"{int(value) % 2**32:08x}" for value in sums)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the steps of a receipt follow from.

    run: SHA-256 of what must be equal for two runs to have the same steps; data: the packs' checksum; packs: their
    folder.
    first_step, previous: where the receipt begins and the chain before that: 0 and null, unless an earlier receipt was
    lost.
    frozen: digests of the frozen weights there (`vltrain.train.zero.frozen`); None in receipts of earlier versions.
    """

    run: str
    data: str
    packs: str
    seed: int
    epochs: float
    packs_per_step: int
    num_steps: int
    first_step: int = 0
    previous: str | None = None
    receipt: int = FORMAT_VERSION
    frozen: dict[str, str] | None = None

    @property
    def chain(self) -> str:
        return _hash(self.previous, self.content())

    def content(self) -> dict[str, Any]:
        """What is written and hashed; `frozen` only where it is known."""
        fields = asdict(self)
        return fields if self.frozen is not None else {name: fields[name] for name in fields if name != "frozen"}

    def dumps(self) -> str:
        return json.dumps(self.content()) + "\n"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step. `skipped`: its update was not applied, see train.on_bad_loss. `frozen`: digests of the frozen weights
    behind it, of a step that a checkpoint follows, or before which the run went on with others. `sets`: of a mixture,
    each set's samples, tokens and mean loss over its samples (`float.hex`, null without one)."""

    step: int
    samples: str
    label_tokens: int
    loss: str
    chain: str
    skipped: bool = False
    frozen: dict[str, str] | None = None
    sets: dict[str, dict[str, Any]] | None = None

    @property
    def loss_value(self) -> float:
        return float.fromhex(self.loss)

    def content(self) -> dict[str, Any]:
        """What is hashed: everything but the chain; `skipped`, `frozen` and `sets` only where they hold."""
        fields = {"step": self.step, "samples": self.samples, "label_tokens": self.label_tokens, "loss": self.loss}
        if self.skipped:
            fields["skipped"] = True
        if self.frozen is not None:
            fields["frozen"] = self.frozen
        if self.sets is not None:
            fields["sets"] = self.sets
        return fields

    def dumps(self) -> str:
        return json.dumps({**self.content(), "chain": self.chain}) + "\n"


def next_line(chain: str, line: Line) -> Line:
    """The line of a step after a chain value, which the line given does not have yet."""
    return replace(line, chain=_hash(chain, line.content()))


def _hash(previous: str | None, content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([previous, content], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A receipt as read. `lines` are those up to the first that does not fit; `problem` says what is wrong there.

    `cut_short`: the last line has no end, as when the process was killed in the middle of writing it. It is not part of
    `lines`.
    """

    path: Path
    header: Header
    lines: list[Line] = field(default_factory=list)
    problem: str | None = None
    cut_short: bool = False

    def chain_at(self, step: int) -> str | None:
        """The chain after `step` steps of the run; None where the receipt does not reach, or begins later."""
        number = step - self.header.first_step
        if not 0 <= number <= len(self.lines):
            return None
        return self.lines[number - 1].chain if number else self.header.chain


def read_receipt(path: Path) -> Receipt:
    """Reads a receipt and follows its chain.

    Raises: InputError if there is none, or nothing of it can be read as one. A broken chain is no exception: see
    `Receipt.problem`.
    """
    try:
        require_plain_file(path, "a run's receipt")
        with path.open("rb") as file:
            texts = file.read().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: not a run's receipt ({error.strerror})") from None
    try:
        header = Header(**_parse(texts[0]))
        _require_digests(header.frozen)
        chain, version = header.chain, header.receipt
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}, line 1: not a receipt's header ({type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: receipt format {version}, this version reads {FORMAT_VERSION}")
    lines: list[Line] = []
    told = {"path": path, "header": header, "lines": lines, "cut_short": texts[-1] != b""}
    for number, text in enumerate(texts[1:-1], start=2):
        step = header.first_step + len(lines)
        try:
            line = Line(**_parse(text))
            _ = line.loss_value
            _require_digests(line.frozen)
            _require_counts(line.sets)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            return Receipt(
                **told, problem=f"line {number}: not a step ({type(error).__name__}: {error}); step {step} was expected"
            )
        if line.step != step:
            return Receipt(**told, problem=f"line {number}: step {line.step}, expected step {step}")
        if line.chain != _hash(chain, line.content()):
            return Receipt(
                **told,
                problem=f"line {number}: step {step} does not follow from the line before: one of them was changed",
            )
        lines.append(line)
        chain = line.chain
    return Receipt(**told)


def _require_digests(frozen: Any) -> None:
    if frozen is not None and not (is_object(frozen) and all(type(one) is str for one in frozen.values())):
        raise ValueError("frozen: expected digests by part and dtype")


def _require_counts(sets: Any) -> None:
    if sets is None:
        return
    kinds = {"samples": (int,), "tokens": (int,), "loss": (str, type(None))}
    for one in sets.values() if is_object(sets) else (None,):
        sound = is_object(one) and one.keys() == kinds.keys() and all(type(one[name]) in kinds[name] for name in kinds)
        if not sound:
            raise ValueError("sets: expected samples, tokens and loss of each set")


def _parse(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_LINE_BYTES:
        raise ValueError(f"{len(text)} bytes in one line")
    fields = parse_json(text, "receipt")
    if not isinstance(fields, dict):
        raise ValueError(f"found {type(fields).__name__}, expected an object")
    return fields


class ReceiptWriter(OneWriter):
    """Appends to a run's receipt, from `first_step` on. On ranks that do not write (`active` false) every method does
    nothing.

    Args:
        folder: the run's.
        header: of this run; used where no receipt is there yet.
        first_step: steps that the run has behind it. What an earlier life of the run wrote after them is cut off: it is
            done again.
        head: the chain after those steps, as the checkpoint says; None at the start, or from a checkpoint without one.

    Raises: InputError if the receipt that is there is broken or another run's.
    """

    def __init__(self, folder: Path, header: Header, *, active: bool, first_step: int, head: str | None) -> None:
        super().__init__(active=active)
        self.run = header.run
        self.head: str | None = head
        self._frozen: dict[str, str] | None = None  # for the next line, see `Line.frozen`
        if not active:
            return
        path = folder / RECEIPT
        receipt = read_receipt(path) if first_step and path.exists() else None
        if receipt is None:
            if first_step:
                logger.warning(
                    "%s: missing; a new receipt starts at step %d and proves nothing about earlier steps",
                    path,
                    first_step,
                )
            begun = replace(header, first_step=first_step, previous=head)
            text, self.head = begun.dumps(), begun.chain
        else:
            lines = _kept(receipt, header, first_step, head)
            text = "".join([receipt.header.dumps(), *(line.dumps() for line in lines)])
            self.head = receipt.chain_at(first_step)
            self._frozen = _other_weights(receipt, lines, header.frozen)
        self._file = _replace(path, text)

    def add(
        self,
        *,
        step: int,
        samples: str,
        label_tokens: int,
        loss: float,
        skipped: bool = False,
        frozen: dict[str, str] | None = None,
        sets: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Appends the line of a step."""
        if self.active:
            assert self.head is not None
            told = {"skipped": skipped, "frozen": frozen or self._frozen, "sets": sets}
            unchained = Line(step=step, samples=samples, label_tokens=label_tokens, loss=loss.hex(), chain="", **told)
            line = next_line(self.head, unchained)
            self._file.write(line.dumps())
            self.head, self._frozen = line.chain, None


def _kept(receipt: Receipt, header: Header, first_step: int, head: str | None) -> list[Line]:
    """The lines of the receipt up to `first_step`. Raises InputError where it is not this run's."""
    again = "restore it, or remove it, and a new one begins at the checkpoint's step"
    found = receipt.chain_at(first_step)
    if receipt.header.run != header.run or receipt.header.data != header.data:
        raise InputError(f"{receipt.path}: the receipt of another run; {again}")
    if found is None:
        reached = receipt.header.first_step + len(receipt.lines)
        why = f"{receipt.problem or f'it ends after {reached} step(s)'}; the checkpoint has {first_step} behind it"
        raise InputError(f"{receipt.path}: {why}: lines are missing or were changed; {again}")
    if head is not None and found != head:
        chains = f"its chain after {first_step} step(s) is {found[:12]}..., the checkpoint says {head[:12]}..."
        raise InputError(f"{receipt.path}: {chains}: it was changed, or is another run's; {again}")
    return receipt.lines[: first_step - receipt.header.first_step]


def _other_weights(receipt: Receipt, lines: list[Line], found: dict[str, str] | None) -> dict[str, str] | None:
    """The digests of the frozen weights that a run goes on with, where the receipt does not say them already: another
    precision, or moved; then with a warning."""
    known = dict(receipt.header.frozen or {})
    for line in lines:
        known.update(line.frozen or {})
    if found is None or (known.keys() >= found.keys() and all(known[key] == found[key] for key in found)):
        return None
    moved = [key for key in found if known.get(key, found[key]) != found[key]]
    if moved:
        logger.warning("%s: goes on with other frozen weights than before: %s", receipt.path, ", ".join(moved))
    return found


def _replace(path: Path, text: str) -> AppendedFile:
    """Puts a file in the place of the one at `path`, which is whole at any time, and opens it for appending by
    lines."""
    write_whole(path, text)
    return AppendedFile(path)

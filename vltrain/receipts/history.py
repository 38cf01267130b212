"""The history: the loss of every sample in every step, 4 bytes each, so that a run can say which data did what to it.

    history.bin   {"history": 1, "run": ..., "data": ..., "first_step": 0}   a line, then a record for each step:
                  uint32    samples of the step
                  float32   of each sample the mean loss per label token; NaN of one without labels

Little-endian. Samples stand in the order of the step's packs in the plan's stream (`Plan.packs_of`) and of each pack's
segments: ids, texts and images are the packs'. The order is the same at any number of ranks. A record is appended as
the step's receipt line is, and a run that goes on from a checkpoint cuts off what it does again. Trade-off: no checksum
of its own; `vltrain check resume` adds a step's losses up to the loss in the receipt, which is chained.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vltrain.errors import InputError
from vltrain.files.appended import AppendedFile, OneWriter
from vltrain.files.atomic import write_whole
from vltrain.files.strict_json import is_object, parse_json, require_plain_file

logger = logging.getLogger(__name__)

HISTORY = "history.bin"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 12
_FIELDS = {"history": int, "run": str, "data": str, "first_step": int}
_COUNT, _LOSS = np.dtype("<u4"), np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class History:
    """A history as read.

    run, data: of the run's receipt, see `vltrain.receipts.receipt.Header`.
    first_step: where it begins: 0, unless the run went on from a checkpoint without one.
    cut_short: the last record has no end, as when the process was killed in the middle of writing it. It is not
    counted.
    """

    path: Path
    run: str
    data: str
    first_step: int
    cut_short: bool
    starts: np.ndarray
    """int64 [num_steps + 1], where each step's losses begin in `words`, behind their number; at last where the next
    would."""
    words: np.ndarray
    """float32, all records."""
    header_bytes: int

    @property
    def num_steps(self) -> int:
        """Steps that it holds, from `first_step` on."""
        return len(self.starts) - 1

    def losses(self, step: int) -> np.ndarray:
        """float32 [samples of the step], the mean loss per label token of each, see the module.

        Raises: InputError for a step that it does not hold.
        """
        number = step - self.first_step
        if not 0 <= number < self.num_steps:
            held = f"steps {self.first_step} to {self.first_step + self.num_steps - 1}" if self.num_steps else "none"
            raise InputError(f"{self.path}: step {step}: not in it, it holds {held}")
        return self.words[self.starts[number] : self.starts[number + 1] - 1]

    def end_of(self, num_steps: int) -> int:
        """Bytes of the file up to the end of its first `num_steps` steps."""
        return self.header_bytes + _LOSS.itemsize * (int(self.starts[num_steps]) - 1)


def read_history(run: Path) -> History:
    """Reads the history in a run's folder, as far as it is whole.

    Raises: InputError if there is none, or nothing of it can be read as one.
    """
    path = run / HISTORY
    require_plain_file(path, "the history of a run's losses, which runs of earlier versions do not have")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a run's history") from None
    head, newline, _ = data[:MAX_HEADER_BYTES].partition(b"\n")
    fields = parse_json(head, f"{path}, its first line") if newline else None
    if not is_object(fields) or {name: type(value) for name, value in fields.items()} != _FIELDS:
        raise InputError(f"{path}: not a run's history, expected a first line with {', '.join(_FIELDS)}")
    if fields.pop("history") != FORMAT_VERSION:
        raise InputError(f"{path}: not of the history format {FORMAT_VERSION}, which this version reads")
    header_bytes = len(head) + 1
    num_words, rest = divmod(len(data) - header_bytes, _LOSS.itemsize)
    words = np.frombuffer(data, _LOSS, num_words, header_bytes)
    starts = _starts(words.view(_COUNT))
    whole = starts[-1] - 1 == num_words and rest == 0
    found = {"starts": starts, "words": words, "header_bytes": header_bytes, "cut_short": not whole}
    return History(path=path, **fields, **found)


def _starts(words: np.ndarray) -> np.ndarray:
    starts = [1]
    while (place := starts[-1]) <= len(words) and place + (count := int(words[place - 1])) <= len(words):
        starts.append(place + count + 1)
    return np.array(starts, np.int64)


class HistoryWriter(OneWriter):
    """Appends to a run's history, from `first_step` on. On ranks that do not write (`active` false) every method does
    nothing.

    Args:
        folder: the run's.
        run, data: of its receipt.
        first_step: steps that the run has behind it. What an earlier life of the run wrote after them is cut off: it is
            done again.

    Raises: InputError if the history that is there is broken or another run's.
    """

    def __init__(self, folder: Path, *, run: str, data: str, active: bool, first_step: int) -> None:
        super().__init__(active=active)
        if not active:
            return
        path = folder / HISTORY
        if not (first_step and path.exists() and _kept(read_history(folder), run, data, first_step)):
            if first_step:
                logger.warning("%s: begins at step %d: of earlier steps it has no losses", path, first_step)
            header = {"history": FORMAT_VERSION, "run": run, "data": data, "first_step": first_step}
            write_whole(path, json.dumps(header) + "\n")
        self._file = AppendedFile(path)

    def add(self, losses: np.ndarray) -> None:
        """Appends a step. `losses`: float [samples of the step], see `History.losses`."""
        if self.active:
            count = np.array([len(losses)], _COUNT)
            self._file.write(count.tobytes() + losses.astype(_LOSS).tobytes())


def _kept(history: History, run: str, data: str, first_step: int) -> bool:
    """Cuts a history to the steps before `first_step`; False where it begins later, and is to begin anew. Raises
    InputError where it is not this run's."""
    again = "restore it, or remove it, and a new one begins at the checkpoint's step"
    if (history.run, history.data) != (run, data):
        raise InputError(f"{history.path}: the history of another run; {again}")
    num_kept = first_step - history.first_step
    if num_kept > history.num_steps:
        raise InputError(
            f"{history.path}: it ends after {history.first_step + history.num_steps} step(s); the checkpoint has "
            f"{first_step} behind it: losses are missing; {again}"
        )
    if num_kept < 0:
        return False
    try:
        os.truncate(history.path, history.end_of(num_kept))
    except OSError as error:
        raise InputError(f"{history.path}: cannot be written ({error.strerror}); {again}") from None
    return True

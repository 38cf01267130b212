"""The models that can be asked, by name: the served one, and beside it the run's other checkpoints, of which one at a
time is in memory.

    quickstart                    what the server was started with
    quickstart@step-00000225      another checkpoint of the run
    quickstart@none               the model before tuning

Another checkpoint is loaded at its first question, by the thread that answers, and takes the place of the other before
it. Before tuning, the served model itself has other trained weights, of which a copy is kept.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vltrain.errors import InputError, nearest
from vltrain.inference.model import LoadedModel
from vltrain.receipts.manifest import BEST, checkpoints_in, pointed
from vltrain.serve.errors import ApiError, unavailable

logger = logging.getLogger(__name__)

Loader = Callable[[str], LoadedModel]
UNTUNED = "none"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model that may be named. `id`: as clients name it; `title`: as a page shows it; `checkpoint`: of
    `vltrain.load`, None for the served one."""

    id: str
    title: str
    checkpoint: str | None


class Shelf:
    """Args: `served` is in memory for good, with its weights before tuning where `others` offer them; the rest of these
    is loaded by `load(checkpoint)`."""

    def __init__(self, name: str, title: str, served: LoadedModel, others: list[Entry], load: Loader) -> None:
        self.entries = (Entry(id=name, title=title, checkpoint=None), *others)
        self.served, self._load = served, load
        self._other: tuple[str, LoadedModel] | None = None

    @property
    def ids(self) -> list[str]:
        return [entry.id for entry in self.entries]

    def entry(self, name: str) -> Entry:
        """Raises ApiError, 404, for a name that is none."""
        found = next((entry for entry in self.entries if entry.id == name), None)
        if found is None:
            raise ApiError(
                404,
                f"model: found {name[:100]!r}; {nearest(name[:100], self.ids)}",
                param="model",
                code="model_not_found",
            )
        return found

    @contextmanager
    def asked(self, name: str) -> Iterator[LoadedModel]:
        """The model for the block, in the answering thread. Raises ApiError for a name that is none, and a checkpoint
        that cannot be loaded any more."""
        entry = self.entry(name)
        if entry.checkpoint is None:
            yield self.served
        elif entry.checkpoint == UNTUNED:
            with self.served.untuned():
                yield self.served
        else:
            yield self._loaded(entry.id, entry.checkpoint)

    def _loaded(self, name: str, checkpoint: str) -> LoadedModel:
        if self._other is None or self._other[0] != name:
            self._other = None
            gc.collect()  # before another one takes its memory
            logger.info("loading %s", name)
            try:
                self._other = (name, self._load(checkpoint))
            except InputError as error:
                raise unavailable(f"{name}: cannot be loaded: {error}", "model_not_loadable") from None
        return self._other[1]


def other_checkpoints(run: Path, name: str, served: Path | None) -> list[Entry]:
    """The run's checkpoints but the served one, the newest first, and the model before tuning unless that is served
    (None)."""
    root = run / "checkpoints"
    best = pointed(root, BEST)
    entries = []
    for path in checkpoints_in(root):
        if served is None or path.resolve() != served.resolve():
            title = f"step {int(path.name[5:]):,}" if path.name[5:].isdigit() else path.name
            is_best = best is not None and path.resolve() == best.resolve()
            entries.append(
                Entry(id=f"{name}@{path.name}", title=f"{title}, the best" if is_best else title, checkpoint=str(path))
            )
    return (
        entries
        if served is None
        else [*entries, Entry(id=f"{name}@{UNTUNED}", title="before tuning", checkpoint=UNTUNED)]
    )

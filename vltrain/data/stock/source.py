"""Where a stock model's processor and its config are, as plain text: what the processes that tokenise and decode are
handed, and load by themselves."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from vltrain.config.model.base import ProcessorPlaces
from vltrain.errors import InputError
from vltrain.families.config import config_from
from vltrain.families.family import Family
from vltrain.families.table import family_of
from vltrain.files.locate import locate
from vltrain.files.strict_json import read_object

OLDEST = (5, 24)
"""Of transformers: the first release whose processors say what stands in an image's place (`replace_image_token`) and
whose models take images that were encoded before."""


@dataclass(frozen=True)
class StockSource:
    """Hashable, so that each process loads it once.

    key        the recipe's key that names the processor, for errors
    processor  folder or hub name, or any notation of `vltrain.files.locate`
    model      the same of the model; None: `config` is its config, as JSON
    options    of the image processor, as JSON
    folder     where relative places are looked for: the same words mean something else once the process has moved
    """

    key: str
    processor: str
    model: str | None
    config: str
    options: str
    folder: str = field(default_factory=os.getcwd)

    @classmethod
    def of(cls, places: ProcessorPlaces) -> StockSource:
        return cls(
            key=places.key,
            processor=places.source,
            model=places.model,
            config=json.dumps(places.config, sort_keys=True),
            options=json.dumps(places.options, sort_keys=True),
        )

    @property
    def given(self) -> dict[str, Any]:
        """Options of the image processor."""
        return json.loads(self.options)


def require_transformers() -> None:
    """Raises InputError for releases of transformers that are too old."""
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        raise InputError(
            f"model.architecture: stock needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, found "
            f"{transformers.__version__} (pip install -U transformers)"
        )


@functools.lru_cache(maxsize=4)
def model_config(source: StockSource) -> Any:
    """The model's config, of transformers. Raises InputError."""
    require_transformers()
    if source.model is None:
        values, where = json.loads(source.config), "model.stock.config"
    else:
        place = locate(source.model)
        path = Path(place, "config.json") if Path(place).is_dir() else _fetched(place, "config.json")
        if path is None:
            raise InputError(f"{place}: it has no config.json, which says what kind of model it is")
        values, where = read_object(path), str(path)
    return config_from(where, values)


def family(source: StockSource) -> Family:
    """What is said of the model's family."""
    return family_of(model_config(source).model_type)


def find(place: str, name: str) -> Path | None:
    """A file of a folder or a hub's repository; None where it has none."""
    if Path(place).is_dir():
        path = Path(place, name)
        return path if path.is_file() else None
    return _fetched(place, name)


def _fetched(place: str, name: str) -> Path | None:
    from transformers.utils import hub

    reach: Any = hub
    try:
        found: str | None = reach.cached_file(
            place,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError) as error:  # the hub knows no such name
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"'{place}': {told}") from None
    return None if found is None else Path(found)

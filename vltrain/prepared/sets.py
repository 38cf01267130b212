"""The sets of a mixture, looked at before the first of them is prepared: hours may lie between that and the last."""

from __future__ import annotations

from pathlib import Path

from vltrain.config.mixture import each_set, of_set
from vltrain.config.schema import OWN, Config
from vltrain.data.remote.address import place_of
from vltrain.data.sample_files import samples_file, samples_folder
from vltrain.data.shards import read_manifest
from vltrain.errors import InputError, nearest
from vltrain.evaluate.ready import missing_split, require_scorer
from vltrain.prepared.ensure_data import require_source


def require_sets(config: Config) -> None:
    """Raises InputError for a set that cannot be prepared, packed or scored as far as that is seen without doing it, or
    of a recipe without a mixture for a source that is not named as it must be."""
    for name, one in each_set(config).items():
        with of_set(name):
            require_source(one.data)
            if one.eval.scorer is not None:
                require_scorer(one)
            if name:
                _require_reader(one)
                _require_packs(one)
                _require_splits(one)


def _require_reader(config: Config) -> None:
    """The reader is known, and so are its options; what it is to read is there, unless that was prepared before."""
    from data_prep.sources import SOURCES, option_texts

    data = config.data
    if data.reader is None:
        return
    if data.reader not in SOURCES:
        raise InputError(f"source: unknown '{data.reader}', {nearest(data.reader, (OWN, *SOURCES))}")
    option_texts(data.reader, data.options)
    if data.input is not None and not Path(data.input).exists() and not samples_folder(config).exists():
        raise InputError(f"input: {data.input}: no such file or folder")


def _require_packs(config: Config) -> None:
    """Packs that are named are there, and of the recipe's length and template."""
    data = config.data
    if data.train_packs is None:
        return
    place = place_of(data.train_packs)
    if isinstance(place, str):  # at an address: whoever opens it compares it
        return
    manifest = read_manifest(place)
    for key in ("pack_length", "template"):
        if getattr(manifest, key) != getattr(data, key):
            raise InputError(
                f"{data.train_packs}: was packed with {key} {getattr(manifest, key)!r}, the mixture's data.{key} is "
                f"{getattr(data, key)!r}; pack it again"
            )


def _require_splits(config: Config) -> None:
    """Of samples that are there, the splits that are trained on and evaluated are among them."""
    data = config.data
    if data.source != OWN and not samples_folder(config).exists():
        return
    wanted = [data.train_split] if data.train_packs is None else []
    for split in (*wanted, *([data.eval_split] if config.eval.scorer is not None else ())):
        file = samples_file(config, split)
        if not file.is_file():
            raise InputError(missing_split(file))

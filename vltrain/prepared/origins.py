"""Whether prepared samples and packs were made from what a recipe names: each difference in words, none where they
match."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vltrain.config.mixture import each_set, sets_of
from vltrain.config.schema import OWN, Config
from vltrain.data.origin import (
    SAMPLES,
    SAMPLES_FILE,
    SAMPLES_RECORD,
    MadeFrom,
    Prepared,
    changes_since,
    read_made_from,
    read_prepared,
    tokenizer_changes,
    write_made_from,
    write_prepared,
)
from vltrain.data.sample_files import samples_file, samples_folder
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import MixedPacks
from vltrain.data.text.asked import Asked, how_asked, in_common
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.files.digest import combined_digest
from vltrain.files.record import FileRecord, is_recorded, look
from vltrain.files.strict_json import read_lines, read_object
from vltrain.train.run.provenance import RUN

logger = logging.getLogger(__name__)

NO_RECORD = "there is no record of what they were made from"


def data_identity(config: Config, split: str) -> str | None:
    """Digest (hex) of the set of samples that a recipe trains on and of which a split is answered; None where it is not
    there, or has no record."""
    if config.data.source != OWN:
        prepared = read_prepared(samples_folder(config))
        return None if prepared is None else prepared.samples
    files = [samples_file(config, name) for name in dict.fromkeys((config.data.train_split, split))]
    if not all(file.is_file() for file in files):
        return None
    return combined_digest({str(number): look(file).digest.hex() for number, file in enumerate(files)})


def samples_differ(config: Config, folder: Path, *, strict: bool = False) -> list[str]:
    """In what the samples of a folder differ from those that the recipe would prepare.

    Args:
        strict: what cannot be told, of samples without a record, counts as a difference.

    Raises: InputError for a damaged record (not if `strict`: that is a difference).
    """
    from data_prep.reading import ELSEWHERE
    from data_prep.sources import places_of

    data = config.data
    try:
        made = read_prepared(folder)
        if data.reader is None:
            return []
        if made is None or made.settled is None:
            return _older_samples_differ(config, folder, made or Prepared(source=None), strict)
        if made.source != data.reader:
            return [f"data.source was {made.name()}, is {data.reader}"]
        differences = _options_differ(made.settled, data.reader, config)
        places = places_of(data.reader, Path(data.input) if data.input else None, data.options)
        roots: dict[str, Path | None] = {SAMPLES: folder, ELSEWHERE: Path("/")}
        renamed = []
        for place in sorted({*made.places, *places}):
            before, now = made.places.get(place), places.get(place)
            if now is not None and now.exists():
                roots[place] = now
                if before is None or str(now) != before:
                    renamed.append(f"{place} was {before}, is {now}")
            elif now is not None and str(now) != before:
                differences.append(f"{place} was {before}, is {now}, which is not there")
            elif now is None and data.input is None and place != "data.input":
                differences.append(f"{place} was {before}, is not named")
            else:
                logger.warning(
                    "data: %s (%s) no longer exists: whether %s was made from it cannot be checked",
                    before,
                    place,
                    folder,
                )
        changed = changes_since(folder, made, roots)
        return [*differences, *(renamed if changed else []), *changed]
    except InputError as error:
        if strict:
            return [str(error)]
        raise


def is_stranger(folder: Path, file: Path) -> bool:
    """Whether a file of samples was put into a folder of prepared ones by someone else: it is there, and not in their
    record."""
    made = read_prepared(folder)
    if made is None or made.settled is None or not file.is_file():
        return False
    return not is_recorded(folder / SAMPLES_RECORD, SAMPLES, file.name, made.files)


def _options_differ(settled: dict[str, str], reader: str, config: Config) -> list[str]:
    from data_prep.sources import option_texts

    given, differences = config.data.options, []
    for name, now in option_texts(reader, given).items():
        if name not in settled and name not in given:
            continue  # an option that the version which prepared them did not have
        if settled.get(name) != now:
            differences.append(
                f"data.options.{name} was {settled.get(name)}, is {now}{'' if name in given else ' (its default)'}"
            )
    return differences


def _older_samples_differ(config: Config, folder: Path, made: Prepared, strict: bool) -> list[str]:
    """Of samples of a version that kept no record of files, or of hands: what they say, and from now on whether they
    change."""
    from data_prep.sources import option_texts

    data = config.data
    assert data.reader is not None
    if made.source is not None:
        if made.source != data.reader:
            return [f"data.source was {made.name()}, is {data.reader}"]
        if differences := _options_differ(option_texts(data.reader, made.options), data.reader, config):
            return differences
    if strict:
        return [NO_RECORD]
    if made.files is not None and (changed := changes_since(folder, made, {SAMPLES: folder})):
        return changed
    what = "what they were made from" if made.source is None else f"the data of {made.source} that they were made from"
    logger.warning(
        "data: %s: no record of %s is there (samples of an older version, or your own): used as they are; --rebuild "
        "makes them again",
        folder,
        what,
    )
    if made.files is None:
        record = FileRecord()
        record.add_all(SAMPLES, ((path.name, look(path)) for path in sorted(folder.glob("*.jsonl"))))
        made.adopted = True
        with suppress(OSError):
            write_prepared(folder, made, record)
    return []


def packs_differ(
    config: Config, folder: Path, samples: Path, tokenizer: Tokenizer, *, strict: bool = False
) -> list[str]:
    """In what packs differ from those that would be packed from a file of samples. `strict`, Raises: as
    `samples_differ`."""
    try:
        made = read_made_from(folder)
        if made is None:
            return [NO_RECORD] if strict else _adopt_packs(folder, samples)
        if made.adopted:
            logger.warning(
                "data: %s: packs of an older version, whose images are not compared; --rebuild makes them again", folder
            )
        differences = tokenizer_changes(made, tokenizer, config.data.template)
        prepared = read_prepared(samples.parent)
        compared = (
            config.data.reader is not None
            and prepared is not None
            and made.prepared is not None
            and prepared.samples == made.prepared
        )
        # Images of the very set that they were packed from have just been compared with its record.
        differences += changes_since(
            folder, made, {SAMPLES_FILE: samples, SAMPLES: None if compared else samples.parent}
        )
        if strict and not differences:  # last, since ranks that wait ask again and again
            PackedDataset(folder, verify=True)
        return differences
    except InputError as error:
        if strict:
            return [str(error)]
        raise


def _adopt_packs(folder: Path, samples: Path) -> list[str]:
    """Of packs of a version that kept no record: whether they hold the file's samples, by their ids."""
    ids = {record.get("id") for _, record in read_lines(samples) if isinstance(record, dict)}
    dataset = PackedDataset(folder, verify=False)
    packed = {name for number in range(len(dataset)) for name in dataset.sample_ids(number)}
    over_long = folder / "over_long.jsonl"
    if over_long.is_file():
        packed |= {record["id"] for _, record in read_lines(over_long)}
    if only := sorted(ids ^ packed, key=str)[:3]:
        return [
            f"samples {', '.join(map(repr, only))}{', ...' if len(ids ^ packed) > 3 else ''} are in one of them only"
        ]
    logger.warning(
        "data: %s: packs of an older version, without a record of what they were packed from: taken, since they "
        "hold the same samples by their ids",
        folder,
    )
    record = FileRecord()
    seen = look(samples)
    record.add(SAMPLES_FILE, ".", seen)
    with suppress(OSError):
        write_made_from(folder, MadeFrom(name=samples.name, samples=seen.digest.hex(), adopted=True), record)
    return []


def require_same_set(config: Config, packs: PackedDataset, samples: Path) -> None:
    """Packs that a recipe names (`data.train_packs`) and the samples that are answered beside them are of one set of
    samples.

    Other ones must be named as such, by `data.source: samples`. Raises InputError if they are not of one set.
    """
    made, prepared = read_made_from(packs.folder), read_prepared(samples.parent)
    if made is None:
        logger.warning(
            "data: %s: packs without a record of what they were packed from: whether %s is of the same data cannot "
            "be checked",
            packs.place,
            samples,
        )
        return
    trained_on = samples.parent / made.name
    packed = {made.prepared, *(one.get("prepared") for one in made.sets.values())} - {None}
    if (prepared is not None and prepared.samples in packed) or (
        trained_on.is_file() and look(trained_on).digest.hex() == made.samples
    ):
        return
    packed_from = f"{made.name}{f' of {made.source}' if made.source else ''}"
    answered = f"{samples}{f' of {prepared.name()}' if prepared is not None else ''}"
    if config.data.source == OWN:
        logger.warning(
            "data: trained on %s, packed from %s; answered is %s, which is of another set",
            packs.place,
            packed_from,
            answered,
        )
        return
    found = (
        f"data.train_packs = {packs.place} were packed from {packed_from}, which is not in {samples.parent} "
        f"(any more), and {answered} would be answered"
    )
    raise InputError(
        f"{found}; name the data.root that they belong to, or the samples to answer: data.source samples, "
        "data.input FOLDER"
    )


def facts_of(config: Config, dataset: PackedDataset) -> dict[str, Any]:
    """What `run.json` says of the data: packs, their checksum and what they were made from, the digest of the samples
    that stand beside them, and how their questions are put; of a mixture each set's, and what their questions have in
    common."""
    if not isinstance(dataset, MixedPacks):
        return _facts_of_set(config, dataset)
    sets = {name: _facts_of_set(one, dataset.sets[name]) for name, one in sets_of(config).items()}
    asked = [Asked.from_json(one["asked"]) for one in sets.values()]
    together = in_common([one for one in asked if one is not None])
    return {
        "packs": str(dataset.folder),
        "checksum": dataset.manifest.checksum,
        "mixture": dataset.manifest.mixture,
        "sets": sets,
        "asked": None if together is None else asdict(together),
    }


def _facts_of_set(config: Config, dataset: PackedDataset) -> dict[str, Any]:
    made, asked = read_made_from(dataset.folder), None
    with suppress(InputError):  # of own packs, samples that are nowhere
        asked = how_asked(samples_file(config, config.data.train_split))
    return {
        "packs": dataset.place,
        "checksum": dataset.manifest.checksum,
        "made_from": None if made is None else asdict(made),
        "samples": data_identity(config, config.data.train_split),
        "asked": None if asked is None else asdict(asked),
    }


def require_trained_set(run: Path, config: Config, overrides: Collection[str]) -> None:
    """The samples that are answered are of the set that stood beside the run's packs when it was trained, unless the
    command line names other data.

    Raises: InputError if they are not. Of other data that is named it is told.
    """
    if not (run / RUN).exists():
        return
    data = read_object(run / RUN, "what the run was made of").get("data", {})
    for name, one in each_set(config).items():
        _require_trained_set(run, one, overrides, data["sets"].get(name, {}) if name and "sets" in data else data)


def _require_trained_set(run: Path, config: Config, overrides: Collection[str], data: dict[str, Any]) -> None:
    """Of one set. `data`: what run.json says of it."""
    before = data.get("samples")
    now = data_identity(config, config.data.train_split)
    if before is None or now is None or before == now:
        return
    found = f"{samples_folder(config)} holds other samples now than when {run} was trained"
    if any(name.startswith("data.") for name in overrides):
        logger.warning("data: %s; they are answered, since the command line names the data", found)
        return
    raise InputError(
        f"{found}; restore them, or name the data to answer: --data.root {config.data.root}, or --data.source "
        "samples --data.input FOLDER"
    )

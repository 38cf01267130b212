"""Makes the data that a recipe names, if it is not there yet, and lets what is there be used only if it was made from
what the recipe names.

One process makes and checks, all others wait before the process group exists. What there is to be compared is in the
records that `vltrain.data.origin` describes: a mismatch is an error that says what changed; with `rebuild` what does
not match is made anew beside, and swapped.
Samples and packs of versions that kept no records are used as they are, with a notice, where nothing contradicts, and
recorded from then on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from vltrain.config.schema import EASYVQA_ROOT, OWN, Config, DataConfig
from vltrain.data.origin import PREPARED
from vltrain.data.shards import FORMAT_VERSION
from vltrain.data.text.encoder import SampleEncoder
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.errors import InputError, require
from vltrain.prepared.made_once import made_once
from vltrain.prepared.origins import is_stranger, packs_differ, samples_differ, samples_file, samples_folder

logger = logging.getLogger(__name__)

OTHER_ROOT = "choose another data.root"
REBUILD = "make them anew with --rebuild"


def require_source(data: DataConfig, asked: str | None = None) -> None:
    """Raises InputError unless the recipe says whose samples are in `data.root`. `asked`: a split that is read beside
    the recipe's own."""
    if data.source is None and not data.is_easyvqa:
        for name in ("input", "options"):
            require(
                not getattr(data, name),
                f"data.{name}",
                getattr(data, name),
                "nothing, since data.source names no reader; name one, or samples",
            )
    if data.source == OWN:
        require(
            data.input is not None,
            "data.input",
            None,
            "a folder of SPLIT.jsonl or a file of samples, for data.source = samples",
        )
        for split, file in data.options.items():
            require(
                isinstance(file, str),
                f"data.options.{split}",
                file,
                "the split's file of samples, for data.source = samples",
            )
            if (
                split not in (data.train_split, data.eval_split, data.test_split, asked)
                and int(os.environ.get("RANK", "0")) == 0
            ):
                named = f"{data.train_split}, {data.eval_split}, {data.test_split}"
                logger.warning(
                    "data.options.%s: names a split that the recipe does not use (%s): %s is not read",
                    split,
                    named,
                    file,
                )
    if data.root == EASYVQA_ROOT and not data.is_easyvqa and not (data.source == OWN and data.train_packs is not None):
        made = f"data.source = {data.source}{f', data.input = {data.input}' if data.input else ''}"
        raise InputError(
            f"data.root: found {data.root!r}, which is kept for easyvqa; expected a folder of its own for {made}"
        )


def ensure_samples(config: Config, split: str, *, rebuild: bool = False) -> Path:
    """The JSONL file of one split's samples, prepared from the raw data if it is missing. Every rank may call this.

    Raises: InputError if the samples that are there were made from something else than the recipe names.
    """
    require_source(config.data, split)
    if config.data.source == OWN:
        return samples_file(config, split)
    folder = samples_folder(config)
    if not folder.exists() or rebuild:
        _require_maker(config, folder)
        made_once(
            lambda: _prepare(config, replace=rebuild),
            folder,
            remedy=OTHER_ROOT,
            is_good=_no_differences(config, folder) if rebuild else None,
        )
    if int(os.environ.get("RANK", "0")) == 0 and (differences := samples_differ(config, folder)):
        way_out = (
            f"{REBUILD}, or {OTHER_ROOT}; or take them as they are: data.source null, without data.input and "
            "data.options"
        )
        raise InputError(
            f"{folder}: its samples were made from other sources than the recipe names: "
            f"{'; '.join(differences)}. Nothing was changed; {way_out}"
        )
    file = samples_file(config, split)
    if int(os.environ.get("RANK", "0")) == 0 and config.data.reader is not None and is_stranger(folder, file):
        way_out = f"name it as what it is (data.source samples, data.input {folder}), or remove it"
        raise InputError(
            f"{file}: was not prepared from {config.data.reader} as the other samples of {folder} were; {way_out}"
        )
    return file


def _require_maker(config: Config, folder: Path) -> None:
    """Raises InputError where nothing says what is to be prepared, or packs of other samples would be evaluated by what
    is."""
    data = config.data
    if data.reader is None:
        way_out = (
            "name what they are prepared from (data.source, data.input), or own samples: data.source samples, "
            "data.input FOLDER"
        )
        raise InputError(f"{folder}: no such folder, and data.source names nothing to make it of; {way_out}")
    if data.train_packs is not None and not folder.exists():
        found = (
            f"data.train_packs = {data.train_packs} are trained on, and {folder}, whose samples would be answered, "
            "is not there"
        )
        raise InputError(
            f"{found}; name theirs: data.root, or data.source samples with data.input FOLDER; or prepare it "
            "first (vltrain prepare)"
        )


def _no_differences(config: Config, folder: Path) -> Callable[[], bool]:
    return lambda: folder.exists() and not samples_differ(config, folder, strict=True)


def packed_folder(config: Config, encoder: SampleEncoder) -> Path:
    """Where the packs of a recipe are: a folder named after everything that they depend on but the samples, of which a
    root has one set."""
    data = config.data
    depends_on = [
        FORMAT_VERSION,
        encoder.fingerprint,
        data.template,
        encoder.visual_tokens,
        data.pack_length,
        data.max_images,
    ]
    if data.over_long == "drop":  # packs made under `error` hold every sample
        depends_on.append("drop")
    if data.fraction < 1:
        depends_on.append({"fraction": data.fraction, "seed": data.fraction_seed})
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    return Path(data.root) / "packed" / f"{data.train_split}-{digest}"


def ensure_packs(
    config: Config,
    folder: Path,
    encoder: SampleEncoder,
    *,
    rebuild: bool = False,
    samples_are_ready: bool = False,
) -> None:
    """Packs the recipe's training split into `folder` if that is missing. Every rank calls this.

    Args:
        rebuild: packs that do not match are made anew, and so are samples.
        samples_are_ready: `ensure_samples` was called.

    Raises: InputError if what is there was packed from other samples.
    """
    split = config.data.train_split
    samples = samples_file(config, split) if samples_are_ready else ensure_samples(config, split, rebuild=rebuild)
    if not samples.is_file():
        there = ", ".join(sorted(path.stem for path in samples.parent.glob("*.jsonl"))) or "none"
        raise InputError(
            f"{samples}: no such file, so there are no samples of data.train_split = {split}; splits there: {there}"
        )
    if not folder.exists() or rebuild:
        is_good = (
            (lambda: folder.exists() and not packs_differ(config, folder, samples, encoder.tokenizer, strict=True))
            if rebuild
            else None
        )
        made_once(
            lambda: _pack(config, samples, folder, encoder, replace=rebuild),
            folder,
            remedy=OTHER_ROOT,
            is_good=is_good,
        )
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if differences := packs_differ(config, folder, samples, encoder.tokenizer):
        found = f"{folder}: was packed from something else than {samples}: {'; '.join(differences)}"
        raise InputError(f"{found}. Nothing was changed; {REBUILD}, or {OTHER_ROOT}")


def _files_of(config: Config) -> dict[str, Path]:
    """The files of samples of the splits that a recipe names and that are there."""
    found: dict[str, Path] = {}
    for split in (config.data.train_split, config.data.eval_split, config.data.test_split):
        try:
            file = samples_file(config, split)
        except InputError:  # of own samples, a split without a file: whoever needs it says so
            continue
        if file.is_file():
            found[split] = file
    return found


def _prepare(config: Config, *, replace: bool) -> None:
    from data_prep.prepare import prepare

    reader = config.data.reader
    assert reader is not None, "_require_maker"
    _require_room_for_images(config.data, reader)
    logger.info("data: preparing %s into %s", reader, samples_folder(config))
    raw = Path(config.data.input) if config.data.input else None
    prepare(
        reader,
        raw,
        samples_folder(config),
        config.data.options,
        max_image_pixels=config.data.max_image_pixels,
        rebuild=replace,
    )


def _require_room_for_images(data: DataConfig, reader: str) -> None:
    """Raises InputError if the first sample of a source that draws its own, such as clips, shows more images than a
    pack may hold: all of them would be drawn before packing says so."""
    from data_prep.sources import SOURCES

    if data.input is not None or data.max_images is None or data.over_long != "error" or data.train_packs is not None:
        return
    first = next(iter(SOURCES[reader](None, data.options)), None)
    if first is not None and len(first.sample.images) > data.max_images:
        found = f"found {data.max_images}, but '{first.sample.id}' of {reader} shows {len(first.sample.images)} images"
        raise InputError(f"data.max_images: {found}, and a pack holds whole samples: raise it, or see data.options")


def _pack(config: Config, samples: Path, folder: Path, encoder: SampleEncoder, *, replace: bool) -> None:
    from data_prep.pack import OVER_LONG, PackSettings, pack
    from data_prep.sources.splits import overlap_of

    logger.info("data: packing %s into %s", samples, folder)
    if not (samples.parent / PREPARED).exists():  # of those that were prepared from raw data it has been told
        for line in overlap_of(_files_of(config)):
            logger.warning("%s: %s", samples.parent, line)
    source, instruction = tokenizer_sources(config)
    settings = PackSettings(
        tokenizer=source,
        template=config.data.template,
        visual_tokens=encoder.visual_tokens,
        pack_length=config.data.pack_length,
        max_images=config.data.max_images,
        over_long=config.data.over_long,
        fraction=config.data.fraction,
        fraction_seed=config.data.fraction_seed,
        max_image_pixels=config.data.max_image_pixels,
        instruction=instruction,
        processor=config.model.processor,
    )
    manifest = pack(samples, folder, settings, rebuild=replace)
    if manifest.over_long:
        logger.warning(
            "data: %d sample(s) do not fit into a pack and were left out; %s lists them",
            manifest.over_long,
            folder / OVER_LONG,
        )

"""The files that a recipe's weights and tokenizer are read from, and their digests: what a run is made of beside its
packs.

Digests are remembered by size, times and inode (`vltrain.files.digest`), so weights are read for them once, at the
first start of a run. Files of a hub name are those in the hub's cache.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vltrain.config.schema import Config
from vltrain.data.text.tokenizer_files import GENERATION, KNOWN_FILES, MERGES, PLAIN, find_in
from vltrain.errors import InputError
from vltrain.files.digest import file_digests
from vltrain.files.locate import locate
from vltrain.models.build import weight_files
from vltrain.train.run.identity import FilesOf

logger = logging.getLogger(__name__)

TOLD_BYTES = 1 << 30  # what takes seconds to read is told before
TOKENIZER_FILES = (*KNOWN_FILES, *PLAIN, GENERATION, MERGES)


def made_of(config: Config, *, verify: bool = False) -> FilesOf:
    """The SHA-256 of each file, by the setting that names it and the file's name.

    Args:
        verify: read every file, though its digest may be known.

    Raises: InputError for what is missing or cannot be read.
    """
    files = {**weight_files(config.model), **_tokenizer_files(config)}
    paths = [path for named in files.values() for path in named.values()]
    size = sum(_size(path) for path in paths)
    if size > TOLD_BYTES:
        how = "all are read" if verify else "those that are known by size, times and inode are not read again"
        logger.info("digests of weights and tokenizer: %d files, %.1f GiB; %s", len(paths), size / 1024**3, how)
    digests = iter(file_digests(paths, verify=verify))
    return {key: {name: next(digests) for name in named} for key, named in files.items()}


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _tokenizer_files(config: Config) -> dict[str, dict[str, Path]]:
    places = config.model.tokenizers
    found = {places.key: _in_folder(places.source, "")}
    if places.instruction is not None:
        found[places.instruction_key] = _in_folder(places.instruction, places.instruction_subfolder)
    return found


def _in_folder(source: str, subfolder: str) -> dict[str, Path]:
    place = Path(found := locate(source))
    if place.is_file() and place.suffix in (".model", ".gguf"):
        return {"file": place}
    find = find_in(str(place.parent) if place.is_file() else found, subfolder)
    return {name: path for name in TOKENIZER_FILES if (path := find(name)) is not None}

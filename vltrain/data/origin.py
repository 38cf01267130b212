"""What prepared samples and packs were made from: a record beside each, and what has changed since.

    samples/prepared.json       source, its places as they were named, every option, and digests of what was read and of
                                what was made
    samples/prepared.arrow      the files read and made; .stats.npy: how they were (`vltrain.files.record`)
    packed/*/made_from.json     digest of the samples file, of the prepared set that it belongs to, the chat template as
                                rendered
    packed/*/made_from.arrow    the samples file and the images that were packed; .stats.npy

The record of packs stands beside their manifest and not in it: the manifest's checksum is of what was packed, by which
runs know their packs, and the same packs may be made from samples that lie elsewhere or differ in what is not trained
on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vltrain.data.text.conversation import PROCESSOR
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.files.record import FileRecord, digest_of, read_record
from vltrain.files.strict_json import expect, read_object

PREPARED, SAMPLES_RECORD = "prepared.json", "prepared.arrow"
MADE_FROM, PACKS_RECORD = "made_from.json", "made_from.arrow"
SAMPLES = "samples"  # the place of prepared files: JSONL and images
SAMPLES_FILE = "samples file"  # the place of the file that was packed
VERSION = 2
_DAMAGED = "its text is not as it was written: changed or damaged; make what is beside it anew with --rebuild"


@dataclass(kw_only=True)
class Prepared:
    """What a set of prepared samples was made from.

    places    the files and folders that were named, by setting, as they were
    options   those that were given, as texts
    settled   every option, as a text; None in a record of an older version, which has no files either
    samples   digest of what was made: the set's identity, wherever it lies
    adopted   the record is of samples that an older version made: of how they were when they were first met
    max_image_pixels  under which limit every image was decoded; None where that is not known
    provenance  what the reader found out about the data set itself: name, revision, licence, ...
    """

    source: str | None
    places: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    settled: dict[str, str] | None = None
    samples: str | None = None
    files: str | None = None
    adopted: bool = False
    version: int = 1
    max_image_pixels: int | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def name(self) -> str:
        """As an error message calls it."""
        named = ", ".join(self.places.values())
        return f"{self.source or 'an unknown source'}{f' ({named})' if named else ''}"


@dataclass(kw_only=True)
class MadeFrom:
    """What a set of packs was made from.

    name       of the samples file
    samples    digest of what was packed: the file and the images
    prepared   `Prepared.samples` of the set that the file belongs to; None where it has no record
    source     what that set was made from, for messages
    rendered   digest of conversations as the chat template wrote them; None without one
    tokenizer  `Tokenizer.state`
    provenance `Prepared.provenance` of that set
    """

    name: str
    samples: str
    prepared: str | None = None
    source: str | None = None
    rendered: str | None = None
    tokenizer: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    files: str | None = None
    adopted: bool = False
    version: int = VERSION
    provenance: dict[str, str] = field(default_factory=dict)
    sets: dict[str, dict[str, str | None]] = field(default_factory=dict)


def write_prepared(folder: Path, made: Prepared, record: FileRecord) -> None:
    """Writes both files of a set of samples into its folder; `samples` and `files` are filled in."""
    made.samples, made.version = record.digest(SAMPLES), VERSION
    _write(folder, PREPARED, SAMPLES_RECORD, made, record)


def write_made_from(folder: Path, made: MadeFrom, record: FileRecord) -> None:
    """Writes both files of a set of packs into its folder; `files` is filled in."""
    _write(folder, MADE_FROM, PACKS_RECORD, made, record)


def _write(folder: Path, name: str, record_name: str, made: Prepared | MadeFrom, record: FileRecord) -> None:
    made.files = record.write(folder / record_name)
    fields = asdict(made)
    for key in ("provenance", "sets"):
        if not fields.get(key, True):  # of most, which older versions read, too
            del fields[key]
    text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def _checksum(fields: dict[str, Any]) -> str:
    return digest_of(json.dumps(fields, sort_keys=True).encode()).hex()


def read_prepared(folder: Path) -> Prepared | None:
    """The record of a set of samples; None where there is none. Raises InputError for a damaged one."""
    return _read(folder / PREPARED, Prepared)


def read_made_from(folder: Path) -> MadeFrom | None:
    """The record of a set of packs; None where there is none. Raises InputError for a damaged one."""
    return _read(folder / MADE_FROM, MadeFrom)


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    content = read_object(path)
    checksum = content.pop("checksum", None)
    is_older = checksum is None and "version" not in content and kind is Prepared  # which had neither
    if not is_older and checksum != _checksum(content):
        raise InputError(f"{path}: {_DAMAGED}")
    for name in ("options", "places", "provenance", "sets"):
        expect(content.get(name, {}), dict, f"{path}: {name}")
    try:
        return kind(**content)
    except TypeError as error:
        raise InputError(f"{path}: not a record of this version ({error}); {_DAMAGED}") from None


def tokenizer_changes(made: MadeFrom, tokenizer: Tokenizer, template: str) -> list[str]:
    """What of the tokenizer has changed since packs were made with it, that its fingerprint does not tell."""
    found: list[str] = []
    now = tokenizer.state()
    if any(now.get(library, digest) != digest for library, digest in made.tokenizer.items()):
        found.append(
            "the tokenizer's files say otherwise by now how a text is split (normalizer, pre-tokenizer, model), "
            "though its vocabulary is the same"
        )
    if made.rendered is not None and rendered_digest(tokenizer, template) != made.rendered:
        found.append("the tokenizer's chat template writes another text")
    return found


def rendered_digest(tokenizer: Tokenizer, template: str) -> str | None:
    """Digest (hex) of a conversation as the tokenizer's chat template writes it, for the template that uses it.

    Raises: InputError if it writes something else each time: what is trained on must be what is asked.
    """
    if template not in ("chat", PROCESSOR):
        return None
    in_lists = template == PROCESSOR
    rendered = {json.dumps([_rendered(tokenizer, roles, in_lists) for roles in _ROLES]) for _ in range(8)}
    if len(rendered) > 1:
        raise InputError("the tokenizer's chat template is not deterministic; use one that is, or data.template: mmt")
    return digest_of(rendered.pop().encode()).hex()


_ROLES = (("user", "assistant"), ("user", "assistant", "user", "assistant"), ("system", "user", "assistant"))
"""Conversations of which a template writes each in a way of its own: first and later turns, and with a system turn."""


def _rendered(tokenizer: Tokenizer, roles: tuple[str, ...], in_lists: bool) -> str:
    texts = [f"turn {number}" for number in range(len(roles))]
    contents = [[{"type": "text", "text": text}] if in_lists else text for text in texts]
    try:
        return tokenizer.render_chat([{"role": role, "content": said} for role, said in zip(roles, contents)])
    except InputError as error:  # of templates without system turns, or for one question and answer
        return str(error)


def changes_since(
    folder: Path, made: Prepared | MadeFrom, roots: Mapping[str, Path | None], *, verify: bool = False
) -> list[str]:
    """What has changed of the files that samples or packs in `folder` were made from, see `FileRecord.changes`.

    What is found unchanged in another place is recorded anew, so that the next time costs a stat. Raises InputError for
    a damaged record.
    """
    path = folder / (SAMPLES_RECORD if isinstance(made, Prepared) else PACKS_RECORD)
    record = read_record(path, made.files)
    found = record.changes(roots, verify=verify)
    if not found:
        _keep_stats(path, record)
    return found


def refresh_stats(path: Path, record: FileRecord, roots: Mapping[str, Path | None]) -> None:
    """Records the stats of files that something was done to which changed none of their bytes."""
    record.take_stats(roots)
    _keep_stats(path, record)


def _keep_stats(path: Path, record: FileRecord) -> None:
    if record.has_new_stats:
        with suppress(OSError):  # a folder that can only be read: its files are compared again the next time
            record.write_stats(path)


def require_whole_record(folder: Path) -> None:
    """Raises InputError if packs have a damaged record of what they were made from; those of older versions have
    none."""
    made = read_made_from(folder)
    if made is not None:
        read_record(folder / PACKS_RECORD, made.files)

"""Which checkpoints a run's folder holds, and what each says of itself: names, manifests and checksums, without torch.

    checkpoints/step-00000200/checkpoint.json    {"format", "step", "belongs_to", "run_state", "files": {name: {"bytes",
    "sha256"}}, "sha256"}
    checkpoints/latest, best                     the name of one

What is there and cannot be used is never taken for absent: whoever looks for the newest checkpoint is told why each one
is not usable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vltrain.errors import InputError
from vltrain.files.digest import sha256_of

logger = logging.getLogger(__name__)
Opened = TypeVar("Opened")

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
LATEST, BEST = "latest", "best"
MAX_MANIFEST_BYTES = 16 * 1024**2
FILE_NAME = re.compile(r"([a-z_]+)-[0-9]{5}\.safetensors")
STEP_NAME = re.compile(r"step-([0-9]{8,})")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's manifest. `digest`: its own checksum, which follows from all that it says, its files' checksums
    too."""

    path: Path
    step: int
    belongs_to: dict[str, Any]
    run_state: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    digest: str = ""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints_in(root: Path) -> list[Path]:
    """The checkpoints' folders, whatever is in them, the newest first; behind them what only begins like one.

    Raises: InputError where `root` is there and cannot be listed.
    """
    try:
        names = [name for name in os.listdir(root) if name.startswith("step-")]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(root):
            return []
        raise InputError(f"{root}: cannot be read ({error.strerror}), expected a run's folder of checkpoints") from None
    named = sorted((name for name in names if STEP_NAME.fullmatch(name)), key=lambda name: int(name[5:]), reverse=True)
    return [root / name for name in (*named, *sorted(set(names) - set(named)))]


def newest_in(root: Path, open_one: Callable[[Path], Opened], until: int | None = None) -> Opened | None:
    """The newest checkpoint that `open_one` takes, none later than step `until`; None where there is none at all.
    Others are told in the log.

    Raises: InputError, with the reason for each one, where there are checkpoints and none is usable.
    """
    paths = checkpoints_in(root)
    reasons = _unfollowed_pointer(root) if until is None else []
    for path in paths:
        try:
            if until is not None and STEP_NAME.fullmatch(path.name) and int(path.name[5:]) > until:
                continue
            _require_own_folder(path)
            return open_one(path)
        except InputError as error:
            logger.warning("skipped a checkpoint: %s", error)
            reasons.append(str(error))
    if reasons:
        causes = "; ".join(reasons)
        raise InputError(
            f"{root}: none of its checkpoints can be used: {causes}. A run with checkpoints does not start at "
            "step 0 by itself: restore one, or choose another output"
        )
    return None


def _unfollowed_pointer(root: Path) -> list[str]:
    try:
        path = pointed(root, LATEST)
        if path is None or os.path.lexists(path):
            return []
        message = f"{root / LATEST}: names {path.name}, which does not exist"
    except InputError as error:
        message = str(error)
    logger.warning("skipped a checkpoint: %s", message)
    return [message]


def _require_own_folder(path: Path) -> None:
    if not STEP_NAME.fullmatch(path.name):
        raise InputError(f"{path}: not named by its step, expected a name such as {checkpoint_name(4)}")
    if path.is_symlink():
        raise InputError(f"{path}: a symbolic link, which is not followed; put the folder itself there")


def pointed(root: Path, pointer: str) -> Path | None:
    """The folder that a pointer names, whether it is there or not; None where there is no pointer. Raises InputError
    for one that names none."""
    try:
        name = (root / pointer).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{root / pointer}: cannot be read ({error}), expected the name of a checkpoint") from None
    if not STEP_NAME.fullmatch(name):
        raise InputError(
            f"{root / pointer}: found {name[:80]!r}, expected the name of a checkpoint beside it, such as "
            f"{checkpoint_name(4)}"
        )
    return root / name


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint's folder, its own checksum checked. Raises InputError."""
    try:
        if not stat.S_ISREG(os.stat(path / MANIFEST).st_mode):  # before it is opened: a named pipe would be waited for
            raise ValueError("no plain file")
        with (path / MANIFEST).open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ValueError(f"larger than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(data)
        claimed = manifest.pop("sha256")
        version = manifest["format"]
        # Its text, too, is as it was written: `1e-5` for `1E-5` would be the same number, but a damaged file all the
        # same.
        whole = checksum(manifest) == claimed and data == dumps(manifest).encode()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a complete checkpoint ({MANIFEST}: {type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION:  # first: how another version writes its checksum is its own
        raise InputError(
            f"{path}: checkpoint format {version!r:.40}, this version reads {FORMAT_VERSION}; go on with the "
            "version that wrote it"
        )
    if not whole:
        raise InputError(f"{path / MANIFEST}: its checksum does not match its content; the file is damaged")
    found = {"path": path, "digest": claimed, **{name: manifest.get(name) for name in ("step", "belongs_to", "files")}}
    return _checked(Manifest(**found, run_state=manifest.get("run_state", {})))


def _checked(manifest: Manifest) -> Manifest:
    where, step = manifest.path / MANIFEST, manifest.step
    sections = all(isinstance(getattr(manifest, name), dict) for name in ("belongs_to", "run_state", "files"))
    listed = sections and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in manifest.files.values()
    )
    if type(step) is not int or step < 0 or not listed:
        raise InputError(
            f"{where}: not a complete checkpoint: expected step, belongs_to, run_state, and files with bytes and sha256"
        )
    called = STEP_NAME.fullmatch(manifest.path.name)
    if called and int(called[1]) != step:
        raise InputError(
            f"{where}: says step {step}, the folder is named {int(called[1])}: it was renamed; restore its name"
        )
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name) or (manifest.path / name).is_symlink():
            raise InputError(
                f"{where}: lists {name!r}, expected plain files of the checkpoint's own folder; do not use it"
            )
    return manifest


def verify_files(manifest: Manifest) -> None:
    """Reads every file that the manifest lists. Raises InputError naming what is missing or damaged."""
    for name, expected in manifest.files.items():
        file = manifest.path / name
        try:
            size = file.stat().st_size if file.is_file() else None
            if size != expected["bytes"]:
                raise InputError(
                    f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {expected['bytes']} "
                    "bytes; the checkpoint is damaged"
                )
            if sha256_of(file) != expected["sha256"]:
                raise InputError(f"{file}: its SHA-256 differs from the manifest's; the checkpoint is damaged")
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None


def dumps(manifest: dict[str, Any]) -> str:
    """The text of a manifest's file, with its checksum."""
    return json.dumps({**manifest, "sha256": checksum(manifest)}, indent=1)


def checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

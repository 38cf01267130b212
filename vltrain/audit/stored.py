"""Reports of models that were audited before, in `$XDG_CACHE_HOME/vltrain/audits` (else `~/.cache`): a file each, named
by what its findings follow from, which is the config, how it is tuned, vltrain's own modules, and the libraries.

Where the cache can't be read or written there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vltrain.audit.findings import Report
from vltrain.errors import InputError
from vltrain.files.atomic import write_json
from vltrain.files.digest import cache_folder
from vltrain.files.strict_json import read_object
from vltrain.shipped import PACKAGE


def stored_report(identity: Mapping[str, Any]) -> Report | None:
    """The report of the same audit, if it was made before."""
    path = _place(identity)
    try:
        return None if path is None else Report.from_json(read_object(path))
    except (InputError, TypeError, KeyError):
        return None


def store_report(identity: Mapping[str, Any], report: Report) -> None:
    """Keeps a report for `stored_report`."""
    path = _place(identity)
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, report.to_json())
    except OSError:
        return


def _place(identity: Mapping[str, Any]) -> Path | None:
    folder = cache_folder("audits")
    said = json.dumps({**identity, "by": _versions()}, sort_keys=True, default=str)
    return None if folder is None else Path(folder, f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json")


@cache
def _versions() -> dict[str, str]:
    own = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        own.update(path.read_bytes())
    libraries = {one: metadata.version(one) for one in ("torch", "transformers", "peft")}
    return {**libraries, "vltrain": own.hexdigest()}

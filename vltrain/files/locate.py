"""Where a model, a tokenizer or a data file is: one notation for shipped, installed, local and hub files.

`asset://NAME` names a file or folder shipped in `vltrain/assets`; `package://MODULE/PATH` one inside an installed
package, found without importing it (importing may be slow or have side effects); a path that exists is itself; what is
left and looks like `name` or `owner/name` is taken for a Hugging Face hub name and returned as it is, if it can be read
(`vltrain.files.hub`). Nothing is downloaded here.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from vltrain.errors import InputError, nearest

ASSETS = Path(__file__).parents[1] / "assets"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_FILE_SUFFIXES = (".model", ".gguf", ".json", ".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def locate(source: str) -> str:
    """The local path that `source` means, or `source` itself where it is a hub name.

    Raises:
        InputError: an asset, package or path that does not exist, a text that can be none of them, or a hub name of
            which nothing can be read.
    """
    scheme, separator, rest = source.partition("://")
    if separator:
        if scheme == "asset":
            return _asset(rest)
        if scheme == "package":
            return _inside_package(rest)
        raise InputError(f"'{source}': unknown scheme '{scheme}://'; {nearest(scheme, ('asset', 'package'))}")
    path = os.path.expanduser(source)
    if os.path.exists(path):
        return path
    if not _HUB_NAME.fullmatch(source) or source.endswith(_FILE_SUFFIXES):
        raise InputError(
            f"'{source}': no such file or folder (looked from {os.getcwd()}), and it cannot be a hub name (owner/name)"
        )
    from vltrain.files.hub import require_reachable  # most names are none of the hub's, whose package takes a while

    require_reachable(source)
    return source


def _asset(name: str) -> str:
    path = ASSETS / name
    if not name or not path.exists():
        known = [entry.name for entry in ASSETS.iterdir() if entry.is_dir()] if ASSETS.is_dir() else []
        raise InputError(f"'asset://{name}': no such asset in {ASSETS}; {nearest(name, known)}")
    return str(path)


def _inside_package(rest: str) -> str:
    module, _, inner = rest.partition("/")
    if not module.isidentifier():
        raise InputError(f"'package://{rest}': expected package://MODULE/PATH with a top-level module name")
    found = importlib.util.find_spec(module)  # of a top-level module: finds without importing
    if found is None:
        raise InputError(
            f"'package://{rest}': package '{module}' is not installed here; install it (pip install) or name "
            "another source"
        )
    for folder in found.submodule_search_locations or ():
        path = Path(folder, inner)
        if path.exists():
            return str(path)
    raise InputError(f"'package://{rest}': package '{module}' is installed but has no '{inner}'")

"""What counts as an fsspec address, and the file system that it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vltrain.errors import InputError, nearest

_SEPARATOR = "://"


def is_address(place: Path | str) -> bool:
    """Whether a folder is named by its address (`PROTOCOL://...`), and not by a path of this machine."""
    return isinstance(place, str) and _SEPARATOR in place


def place_of(text: str) -> Path | str:
    """A folder as a user names it: an address as it stands, else a path."""
    return text.rstrip("/") if is_address(text) else Path(text)


def file_system(address: str) -> tuple[Any, str]:
    """(fsspec's file system of an address, how it calls that folder).

    Raises:
        InputError: it is no address of a folder, its protocol is unknown, or the protocol's package is not installed
            or refuses it before it reads, without a project or credentials.
    """
    protocol = address.partition(_SEPARATOR)[0]
    parts = urlsplit(address)
    if "::" in address or parts.query or parts.fragment:
        raise InputError(f"{address}: expected PROTOCOL://FOLDER, without '::', '?' or '#'")
    if parts.password is not None:
        host = address.rpartition("@")[2]
        raise InputError(
            f"{protocol}://...@{host}: holds a password, which logs and receipts would repeat; leave it where the "
            "protocol's package looks for credentials"
        )
    import fsspec.core  # here, since only addresses need it
    from fsspec.registry import known_implementations

    known = known_implementations.get(protocol)
    if known is None and protocol not in fsspec.available_protocols():
        raise InputError(f"{address}: unknown protocol '{protocol}'; {nearest(protocol, known_implementations)}")
    if known is not None:
        _require_installed(address, protocol, known["class"].partition(".")[0], known.get("err", ""))
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except Exception as error:  # each package raises its own
        raise InputError(f"{address}: {type(error).__name__}: {error}") from None
    return found


def _require_installed(address: str, protocol: str, package: str, hint: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        remedy = hint or str(error) if package == "fsspec" else f"pip install {package}"
        raise InputError(f"{address}: {protocol}:// takes a package that is not installed here; {remedy}") from None

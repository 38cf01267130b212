"""What the `datasets` library, the Hub and pyarrow raise, in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

from vltrain.errors import InputError

_WORDS = 300  # characters of a library's message
TOKEN = "accept its terms on its page, then log in (hf auth login) or set HF_TOKEN"


@contextlib.contextmanager
def one_line_errors(where: str, hub: str | None = None) -> Generator[None]:
    """Whatever the libraries raise in the block becomes an InputError that names `where`. `hub`: the name of a data set
    that is read from the Hub."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # dozens of kinds, of five libraries
        raise as_input_error(error, where, hub) from None


def as_input_error(error: Exception, where: str, hub: str | None = None) -> InputError:
    """As `one_line_errors`, for one that was caught."""
    return InputError(f"{where}: {_told(error, hub)}")


def hush() -> None:
    """The library logs what it also raises, and draws bars of its own."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()


def _told(error: Exception, hub: str | None) -> str:
    chain: list[BaseException] = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 8:
        chain.append(behind)
    text = _shortened(str(error)) or type(error).__name__
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    if hub is None:
        return text
    if "GatedRepoError" in kinds or "is a gated dataset" in text:
        has_token = bool(os.environ.get("HF_TOKEN"))
        return f"is a gated data set{', to which this token has no access' if has_token else ''}; {TOKEN}"
    if "RevisionNotFoundError" in kinds:
        return "has no such revision; name a branch, a tag or a commit of it (revision=)"
    if "RepositoryNotFoundError" in kinds or "doesn't exist on the Hub" in text:
        return (
            "there is no such data set on the Hub, or it is private and this token has no access; is it spelled right?"
        )
    if kinds & {"OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError"}:
        return f"the Hub does not answer ({_shortened(str(chain[-1]))}); {fetch_first(hub)}"
    return text


def fetch_first(hub: str) -> str:
    """What to do where there is no network."""
    return f"fetch it where there is a network: hf download --repo-type dataset {hub}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WORDS else f"{line[: _WORDS - 4]} ..."

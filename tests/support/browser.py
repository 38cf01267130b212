"""A headless Chromium, for pictures of pages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


@contextmanager
def browser_words() -> Iterator[list[str]]:
    """The words that start one, with a profile of its own that is gone afterwards. Raises AssertionError where there is
    none."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    assert program is not None, f"no browser; install one of {', '.join(PROGRAMS)}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        yield [program, *OPTIONS, f"--user-data-dir={profile}"]

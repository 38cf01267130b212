"""Preparing and training from Python: what the commands of these names do, with errors raised in place of exit
codes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vltrain.config.command_line import TRAIN_OPTIONS
from vltrain.config.stages import load_stages
from vltrain.errors import InputError


def train(recipe: str | Path, *, ds: str | Path | None = None, ranks: int | str | None = None, **settings: Any) -> Path:
    """Trains a recipe, as `vltrain train` does.

    Args:
        recipe: a file, or the name of one that comes with vltrain; FILE#NAME: a row of a table, or a stage.
        ds: DeepSpeed's JSON, a file or a name such as `zero2`.
        ranks: None: this process is the only rank, and must call it in its main thread, which handles
            signals meanwhile; or so many processes of this machine (`auto`: one per GPU), which write to this one's
            output.
        settings: the recipe's settings by dotted key (`**{"optim.lr": 1e-3}`), or with `__` for the dots
            (`optim__lr=1e-3`); also `resume` and `rebuild=True`, `quiet=True`, as of `vltrain train`.

    Returns: the run's folder, which `vltrain.load` takes.

    Raises: InputError for a mistake in recipe, settings or data; with `ranks`, where a rank failed, which has told why
    on stderr.

    >>> import vltrain
    >>> vltrain.train("quickstart", ds="zero2", train__max_steps=2, eval__max_samples=8, output="runs/short")
    PosixPath('runs/short')
    """
    words = [f"--recipe={recipe}", *([] if ds is None else [f"--ds={ds}"])]
    for key, value in settings.items():
        name = key.replace("__", ".")
        if name in ("rebuild", "quiet"):
            words += [f"--{name}"] if value else []
        elif value is not None or name != "resume":
            words.append(f"--{name}={_text(value)}")
    output = load_stages(words, program="vltrain.train", options=TRAIN_OPTIONS).folder  # before seconds of imports
    if ranks is not None:
        _on_ranks(words, ranks)
        return output
    from vltrain.programs.train import main

    with _environment_stays():
        main.__wrapped__(words, program="vltrain.train")  # type: ignore[attr-defined]  what `exits_cleanly` wraps: errors are raised
    return output


@contextmanager
def _environment_stays() -> Iterator[None]:
    """Rank, world size and port of a training are set for its processes' libraries, and not for the next one in this
    process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _on_ranks(words: list[str], ranks: int | str) -> None:
    from vltrain.launching.local_ranks import asked_ranks, run_on_ranks

    number = asked_ranks("train", [f"--ranks={ranks}"])
    assert number is not None, "--ranks was asked for"
    code = run_on_ranks("train", words, number)
    if code:
        raise InputError(f"vltrain.train: a rank ended with exit code {code}; its error is on stderr above")


def _text(value: Any) -> str:
    """A setting as the command line writes it."""
    if isinstance(value, (str, Path)):
        return str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value)


def prepare(
    source: str,
    output: str | Path,
    *,
    input: str | Path | None = None,
    workers: int | None = None,
    rebuild: bool = False,
    **options: Any,
) -> dict[str, int]:
    """Prepares a raw data set, as `vltrain prepare` does: samples (JSONL) and images in a new folder.

    Args:
        source: a reader's name: llava_json, scienceqa, easyvqa, shapes, ...
        input: where the raw data is; None where the source finds it by itself.
        workers: processes that check images; None: all usable cores.
        rebuild: what is there already is replaced once the new samples are whole.
        options: of the source, as `--options` takes them.

    Returns: samples per split.

    Raises: InputError for an unknown source or option, malformed data and images, and a folder that is there already.

    >>> import vltrain
    >>> vltrain.prepare("shapes", "data/few", train_images=3, val_images=1, test_images=1, skills=["color"], workers=1)
    {'train': 5, 'val': 1, 'test': 3}
    """
    from data_prep.prepare import prepare as prepare_files

    return prepare_files(
        source, None if input is None else Path(input), Path(output), options, workers=workers, rebuild=rebuild
    )

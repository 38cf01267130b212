"""What `vltrain ask` was asked for, and its answers as a terminal shows them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vltrain.inference.answer import Answer
    from vltrain.inference.model import LoadedModel
    from vltrain.schema import Turn


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for. `question` None: a conversation. `settings`: how to sample, as of
    `LoadedModel.ask`."""

    run: Path
    question: str | None
    images: tuple[Path, ...]
    checkpoint: str | None
    adapters: str | None
    bits: int | None
    device: str | None
    settings: dict[str, Any]
    json: bool
    compare: bool
    as_is: bool


def say_all(model: LoadedModel, request: Request, turns: Sequence[Turn], images: Sequence[Path]) -> Answer:
    """Shows the answer as it comes, and with `--compare` that of the model before tuning below it. Returns the
    first."""
    answer = _say(model, request, turns, images, "tuned:   " if request.compare else "")
    if request.compare:
        with model.untuned():
            _say(model, request, turns, images, "untuned: ")
    return answer


def _say(model: LoadedModel, request: Request, turns: Sequence[Turn], images: Sequence[Path], label: str) -> Answer:
    with model.stream(turns, images, **request.settings) as stream:
        if not images and not label.startswith("untuned"):
            note_missing_image(model)
        sys.stdout.write(label)
        try:
            for piece in stream:
                sys.stdout.write(_shown(piece))
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        answer = stream.answer()
    if not answer.finished:
        tell(f"cut after {len(answer.token_ids)} tokens; --max-new-tokens allows more")
    return answer


def _shown(piece: str) -> str:
    """As a terminal may have it, which obeys control characters; elsewhere as it is."""
    if not sys.stdout.isatty():
        return piece
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape", "surrogatepass").decode()
        for one in piece
    )


def note_missing_image(model: LoadedModel) -> None:
    """Says that a question shows no image where the training's all did: allowed, but nothing the model learned."""
    if model.asked is not None and model.asked.images:
        tell("no image, and all questions that the run was trained on show one (--image FILE)")


def tell(text: str) -> None:
    """A remark on stderr, beside the answers."""
    print(f"note: {text}", file=sys.stderr, flush=True)

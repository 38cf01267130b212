"""`vltrain ask RUN [--image FILE ...] ["question"]`: a tuned model answers; without a question, a conversation in the
terminal.

    vltrain ask runs/quickstart --image shape.png "what color is the shape?"
    vltrain ask runs/quickstart --image a.png --image b.png "which is larger?" --json
    vltrain ask runs/quickstart                        /image FILE, /clear, /quit; Ctrl-D ends it, Ctrl-C an answer

    RUN                  a run's folder (of one in stages the last answers), or one that
    `vltrain export --format adapters` wrote
    --image FILE         an image that the question is about; may be given several times, in the order of the question's
    <image>, or in front of it
    --checkpoint X       a checkpoint's folder, best, or none for the model before tuning; left out: the run's newest
    --adapters FOLDER    the weights of an export of adapters, in place of a checkpoint's
    --bits 4|8|16|32     of the frozen weights; left out: the recipe's
    --device D           cpu, cuda or cuda:N; left out: the GPU where there is one
    --compare            ask the model before tuning, too
    --json               print one JSON object: text, token_ids, tokens, logprobs, finished, and what was asked of which
                         weights
    --as-is              ask the question as it stands; else it is put as the training questions were ("Question:
    ...\\nAnswer:"), where they have that
                         in common
    --max-new-tokens N   tokens that an answer may have; left out: the recipe's eval.max_new_tokens, or 256
    --temperature T, --top-p P, --seed S    left out: the recipe's eval.temperature (0: greedy), eval.top_p and
                                            train.seed

The answer is that of `vltrain evaluate` to the same question, and stands alone on stdout. Exit code: 0, or 2 for a
mistake in the input.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vltrain.config.command_line import COMMAND_LINE, SHORT_NAMES, Arguments, split_arguments
from vltrain.console import logged_from, start_logging
from vltrain.errors import InputError, exits_cleanly
from vltrain.launching.asking import Request, note_missing_image, say_all

if TYPE_CHECKING:
    from vltrain.inference import LoadedModel

FLAGS = ("help", "json", "compare", "as-is")
SAMPLING = {"max-new-tokens": int, "temperature": float, "top-p": float, "seed": int}
OPTIONS = ("image", "checkpoint", "adapters", "bits", "device", *SAMPLING, *FLAGS)


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain ask") -> int:
    """Asks what the command line says. Returns the exit code."""
    arguments = _arguments(argv)
    if ("help", None) in arguments.options:
        print(__doc__)
        return 0
    request = _read(arguments, program)
    start_logging()
    with logged_from(logging.WARNING):  # the answer stands alone; what goes wrong is told
        model = _load(request)
        if request.question is None:
            from vltrain.launching.terminal import converse

            converse(model, request)
        else:
            _answer(model, request, request.question)
    return 0


def _arguments(argv: list[str]) -> Arguments:
    """Options may be spelled with - or _."""
    words = [
        f"--{word[2:].partition('=')[0].replace('_', '-')}{''.join(word.partition('=')[1:])}"
        if word.startswith("--")
        else word
        for word in argv
    ]
    found = split_arguments(words, flags=FLAGS)
    short = {setting: name for name, setting in SHORT_NAMES.items()}
    return Arguments(tuple((short.get(name, name), value) for name, value in found.options), found.positionals)


def _read(arguments: Arguments, program: str) -> Request:
    arguments.require_known(OPTIONS)
    words = arguments.positionals
    if not 1 <= len(words) <= 2:
        more = "; put the question in quotes" if len(words) > 2 else ""
        raise InputError(f'{COMMAND_LINE}: found {list(words)}, expected {program} RUN "question"{more}')
    given = dict(arguments.options)
    question = words[1] if len(words) == 2 else None
    if "json" in given and question is None:
        raise InputError(f'{COMMAND_LINE}: --json: needs a question: {program} RUN --json "question"')
    if "compare" in given and given.get("checkpoint") == "none":
        raise InputError(
            f"{COMMAND_LINE}: --compare: has no effect: --checkpoint none is the model before tuning; leave one out"
        )
    if "adapters" in given and "checkpoint" in given:
        raise InputError(
            f"{COMMAND_LINE}: --adapters: found beside --checkpoint, and both say which weights answer; leave one out"
        )
    images = tuple(
        Path(value).expanduser() for name, value in arguments.options if name == "image" and value is not None
    )
    for image in images:
        if not image.is_file():
            raise InputError(
                f"{COMMAND_LINE}: --image {image}: "
                f"{'not a regular file' if image.exists() else 'no such file'}, expected an image"
            )
    settings = {
        name.replace("-", "_"): _number(name, given[name], kind) for name, kind in SAMPLING.items() if name in given
    }
    bits = _number("bits", given["bits"], int) if "bits" in given else None
    return Request(
        run=Path(words[0]).expanduser(),
        question=question,
        images=images,
        checkpoint=given.get("checkpoint"),
        adapters=given.get("adapters"),
        bits=bits,
        device=given.get("device"),
        settings=settings,
        json="json" in given,
        compare="compare" in given,
        as_is="as-is" in given,
    )


def _number(name: str, text: str | None, kind: type) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise InputError(
            f"{COMMAND_LINE}: --{name}: found {text!r}, expected {'a whole number' if kind is int else 'a number'}"
        ) from None


def _load(request: Request) -> LoadedModel:
    from vltrain.config.stages import last_stage
    from vltrain.inference import load
    from vltrain.inference.run import recipe_of
    from vltrain.train.determinism import set_determinism

    set_determinism(recipe_of(last_stage(request.run)).train.deterministic)
    return load(
        request.run,
        checkpoint=request.checkpoint,
        adapters=request.adapters,
        bits=request.bits,
        device=request.device,
        keep_untuned=request.compare,  # type: ignore[arg-type]
    )


def _answer(model: LoadedModel, request: Request, question: str) -> None:
    """One question, answered on stdout."""
    turn = model.question(question, len(request.images), as_is=request.as_is)
    if not request.json:
        say_all(model, request, [turn], request.images)
        return
    found: dict[str, Any] = asdict(model.chat([turn], request.images, **request.settings))
    if not request.images:
        note_missing_image(model)
    if request.compare:
        with model.untuned():
            found["untuned"] = asdict(model.chat([turn], request.images, **request.settings))
    asked = {
        "question": turn.text,
        "images": [str(image) for image in request.images],
        "run": str(request.run),
        "checkpoint": model.facts["checkpoint"],
    }
    print(json.dumps({**found, **asked}, ensure_ascii=False))

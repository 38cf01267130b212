"""A request to /v1/chat/completions, read strictly: what would change nothing, or what this server cannot do, is
refused and named.

OpenAI's own defaults hold where they say nothing about how an answer is made. Temperature, nucleus and length are the
recipe's where a request leaves them out. `null` is the same as a field left out, since OpenAI's client sends back the
messages it got with their empty fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vltrain.errors import nearest
from vltrain.files.strict_json import shown
from vltrain.schema import IMAGE_MARKER, Turn, escape_markers
from vltrain.serve.errors import bad_request
from vltrain.serve.pictures import ImageReader

MAX_NEW_TOKENS = 65_536  # of a model that has no bound of its own
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 2.0
_ROLES = ("system", "developer", "user", "assistant")
_UNABLE = {
    "tools": "calls no tools",
    "tool_choice": "calls no tools",
    "functions": "calls no functions",
    "function_call": "calls no functions",
    "parallel_tool_calls": "calls no tools",
    "response_format": "writes text as it comes, and follows no schema",
    "modalities": "writes text alone",
    "audio": "writes text alone",
    "logit_bias": "has no biases of tokens",
    "top_logprobs": "gives the log-probability of the chosen tokens alone (logprobs: true)",
    "frequency_penalty": "has no penalties",
    "presence_penalty": "has no penalties",
    "reasoning_effort": "has no efforts to choose from",
    "prediction": "takes no predictions",
    "web_search_options": "searches nothing",
    "store": "stores nothing",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "top_logprobs": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "store": (False,),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
"""Values that ask for what this server does anyway."""
_NAMES_OF_CALLERS = (
    "user",
    "safety_identifier",
    "metadata",
    "prompt_cache_key",
    "service_tier",
)  # say who asks, not what: read over
_KNOWN = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "logprobs",
)


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What is asked, checked as far as it can be without the model.

    model: the id that the client named; images: files' bytes, in the order of the markers in `turns`; None of the
    numbers: the recipe's.
    stop: texts that end the answer and are no part of it; with_usage: a stream ends with the counts of tokens.
    """

    model: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    with_usage: bool = False
    logprobs: bool = False


def read_request(body: Any, images: ImageReader, *, max_images: int) -> ChatRequest:
    """The request in a body's JSON value. Raises ApiError naming the field at fault."""
    if type(body) is not dict:
        raise bad_request(f"found {shown(body)}, expected an object with model and messages")
    given = {key: value for key, value in body.items() if value is not None}
    _require_known(given)
    for required in ("model", "messages"):
        if required not in given:
            raise bad_request(
                f"{required}: found nothing, expected "
                f"{'the id of a model' if required == 'model' else 'a list of messages'}",
                required,
            )
    if given.get("n", 1) != 1 or type(given.get("n", 1)) is not int:
        raise bad_request(
            f"n: found {shown(given['n'])}, expected 1: this server gives one answer to a request; send several", "n"
        )
    turns, pictures = _read_messages(given["messages"], images, max_images)
    stream = _typed(given, "stream", bool, "true or false", False)
    return ChatRequest(
        model=_typed(given, "model", str, "the id of a model (a text)", ""),
        turns=turns,
        images=pictures,
        max_new_tokens=_length(given),
        temperature=_number(
            given, "temperature", lambda value: 0 <= value <= MAX_TEMPERATURE, f"a number from 0 to {MAX_TEMPERATURE:g}"
        ),
        top_p=_number(given, "top_p", lambda value: 0 < value <= 1, "a number above 0 and up to 1"),
        seed=_seed(given),
        stop=_stops(given),
        stream=stream,
        with_usage=_with_usage(given, stream),
        logprobs=_typed(given, "logprobs", bool, "true or false", False),
    )


def _require_known(given: dict[str, Any]) -> None:
    for key, value in given.items():
        if (
            key in _KNOWN
            or key in _NAMES_OF_CALLERS
            or value in _HARMLESS.get(key, ())
            and type(value) is not bool
            or key == "store"
            and value is False
        ):
            continue
        if key in _UNABLE:
            raise bad_request(
                f"{key}: found {shown(value)}: this server {_UNABLE[key]}; leave it out", key, "unsupported_parameter"
            )
        raise bad_request(
            f"{key[:100]!r}: unknown parameter; {nearest(key[:100], _KNOWN)}", key[:100], "unknown_parameter"
        )


def _typed(given: dict[str, Any], key: str, kind: type, expected: str, default: Any) -> Any:
    value = given.get(key, default)
    if type(value) is not kind:
        raise bad_request(f"{key}: found {shown(value)}, expected {expected}", key)
    return value


def _number(given: dict[str, Any], key: str, is_fit: Callable[[float], bool], expected: str) -> float | None:
    value = given.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or not is_fit(value):
        raise bad_request(f"{key}: found {shown(value)}, expected {expected}", key)
    return float(value)


def _length(given: dict[str, Any]) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(names) == 2 and given[names[0]] != given[names[1]]:
        found = f"{shown(given[names[0]])} and {shown(given[names[1]])}"
        raise bad_request(f"max_completion_tokens and max_tokens: found {found}, expected one of the two", names[1])
    if not names:
        return None
    value = given[names[0]]
    if type(value) is not int or not 1 <= value <= MAX_NEW_TOKENS:
        raise bad_request(
            f"{names[0]}: found {shown(value)}, expected a whole number from 1 to {MAX_NEW_TOKENS:,}", names[0]
        )
    return value


def _seed(given: dict[str, Any]) -> int | None:
    value = given.get("seed")
    if value is not None and (type(value) is not int or not -(2**63) <= value < 2**63):
        raise bad_request(f"seed: found {shown(value)}, expected a whole number of 64 bits", "seed")
    return value


def _stops(given: dict[str, Any]) -> tuple[str, ...]:
    found = given.get("stop", [])
    texts = [found] if type(found) is str else found
    if (
        type(texts) is not list
        or len(texts) > MAX_STOPS
        or not all(type(text) is str and 0 < len(text) <= MAX_STOP_CHARACTERS for text in texts)
    ):
        raise bad_request(
            f"stop: found {shown(found)}, expected up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
            "stop",
        )
    return tuple(texts)


def _with_usage(given: dict[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    known = {"include_usage", "include_obfuscation"}
    if (
        type(options) is not dict
        or not options.keys() <= known
        or not all(type(value) is bool for value in options.values())
    ):
        raise bad_request(
            f'stream_options: found {shown(options)}, expected {{"include_usage": true or false}}', "stream_options"
        )
    if options and not stream:
        raise bad_request("stream_options: has no effect without stream: true; leave it out", "stream_options")
    return options.get("include_usage", False)


def _read_messages(messages: Any, reader: ImageReader, max_images: int) -> tuple[tuple[Turn, ...], tuple[bytes, ...]]:
    if type(messages) is not list or not messages:
        raise bad_request(
            f"messages: found {shown(messages)}, expected a list of messages that is not empty", "messages"
        )
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []  # and where they stand
    for number, message in enumerate(messages):
        turns.append(_read_message(message, f"messages[{number}]", urls))
    if len(urls) > max_images:
        raise bad_request(
            f"messages: found {len(urls)} images, expected {max_images} at most (--max-images)",
            "messages",
            "too_many_images",
        )
    return tuple(turns), tuple(reader.read(url, where) for url, where in urls)


def _read_message(message: Any, where: str, urls: list[tuple[str, str]]) -> Turn:
    """One message as a turn; the URLs of its images are added to `urls`."""
    if type(message) is not dict:
        raise bad_request(f"{where}: found {shown(message)}, expected an object with role and content", where)
    given = {key: value for key, value in message.items() if value is not None and value != []}
    for key in given:
        if key not in ("role", "content", "name"):
            raise bad_request(f"{where}: found the key {key[:60]!r}, expected role and content", f"{where}.{key[:60]}")
    role = given.get("role")
    if type(role) is not str or role not in _ROLES:
        hint = nearest(role, _ROLES) if type(role) is str else f"expected one of {', '.join(_ROLES)}"
        raise bad_request(f"{where}.role: found {shown(role)}; {hint}", f"{where}.role")
    role = "system" if role == "developer" else role
    if "content" not in given:
        raise bad_request(f"{where}.content: found nothing, expected a text or a list of parts", f"{where}.content")
    content = given["content"]
    if type(content) is str:
        return Turn(role=role, text=escape_markers(content))
    return Turn(role=role, text=_read_parts(content, role, f"{where}.content", urls))


def _read_parts(parts: Any, role: str, where: str, urls: list[tuple[str, str]]) -> str:
    """A turn's text of a message in parts, joined by line ends.

    Images stand in front of a message's text, as in most training data, also where the client put them behind it; only
    between texts do they stay.
    """
    if type(parts) is not list:
        raise bad_request(f"{where}: found {shown(parts)}, expected a text or a list of parts", where)
    pieces: list[str] = []
    for number, part in enumerate(parts):
        place = f"{where}[{number}]"
        kind = part.get("type") if type(part) is dict else None
        if kind == "text":
            pieces.append(escape_markers(_field(part, "text", place)))
        elif kind == "image_url" and role == "user":
            urls.append((_url(part, place), f"{place}.image_url"))
            pieces.append(IMAGE_MARKER)
        elif kind == "image_url":
            raise bad_request(
                f"{place}: found an image in a message by the {role}, expected it in one by the user", place
            )
        else:
            hint = (
                nearest(kind, ("text", "image_url"))
                if type(kind) is str
                else "expected an object with the type text or image_url"
            )
            raise bad_request(f"{place}: found {shown(part)}; {hint}", place)
    is_image = [piece == IMAGE_MARKER for piece in pieces]
    if True in is_image and is_image == sorted(is_image):  # all of them behind the text
        pieces = [*pieces[is_image.index(True) :], *pieces[: is_image.index(True)]]
    return "\n".join(pieces)


def _field(part: dict[str, Any], key: str, where: str) -> Any:
    """The text `part[key]` of a content part that has nothing else."""
    others = sorted(part.keys() - {"type", key})
    if others:
        raise bad_request(
            f"{where}: found the key {others[0][:60]!r}, expected type and {key}", f"{where}.{others[0][:60]}"
        )
    if type(part.get(key)) is not str:
        raise bad_request(f"{where}.{key}: found {shown(part.get(key))}, expected a text", f"{where}.{key}")
    return part[key]


def _url(part: dict[str, Any], where: str) -> str:
    others = sorted(part.keys() - {"type", "image_url"})
    if others:
        raise bad_request(
            f"{where}: found the key {others[0][:60]!r}, expected type and image_url", f"{where}.{others[0][:60]}"
        )
    image = part.get("image_url")
    if type(image) is not dict or type(image.get("url")) is not str or not image["url"]:
        raise bad_request(
            f'{where}.image_url: found {shown(image)[:80]}, expected {{"url": "data:image/png;base64,..."}}',
            f"{where}.image_url",
        )
    others = sorted(image.keys() - {"url", "detail"})
    if others:
        raise bad_request(f"{where}.image_url: found the key {others[0][:60]!r}, expected url", f"{where}.image_url")
    if image.get("detail") not in (None, "auto"):
        place = f"{where}.image_url.detail"
        raise bad_request(
            f"{place}: found {shown(image['detail'])}: has no effect, the model sees every image at one size; "
            "leave it out",
            place,
        )
    return image["url"]

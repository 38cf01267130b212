"""adapter_config.json of a peft folder, read strictly: what of it `vltrain` reproduces is kept, everything else is
refused by name.

peft ignores keys that it does not know and settings that do not fit together, with a warning; here a folder means what
it says or it is not taken up. Which layers its names and patterns mean is not decided here but by peft itself, see
`vltrain.models.peft.layout`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from vltrain.errors import InputError
from vltrain.files.strict_json import read_object

CONFIG = "adapter_config.json"
TYPES = ("LORA", "ADALORA")
MOST_BYTES = 16 << 20
MOST_REPEATS = 4  # unbounded ones of a pattern: each more multiplies the time that a name takes by its length
# Initialisations that leave the base as it is; all others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA, ...) subtract
# from it what they start with.
KEPT_BASE = (True, False, "gaussian", "orthogonal", "eva")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_pattern_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(check, value.values()))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_flag, value))


# Settings that are taken over or change nothing that the tuned model computes: what each must be. Every other setting
# must be as peft has it by default.
_READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value in TYPES, f"one of {', '.join(TYPES)}"),
    "r": (_is_count, "a whole number of 1 or more"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "target_modules": (lambda value: _is_text(value) or (_is_texts(value) and value), "a list of names, or a pattern"),
    "exclude_modules": (
        _or_null(lambda value: _is_text(value) or _is_texts(value)),
        "null, a list of names, or a pattern",
    ),
    "modules_to_save": (_or_null(_is_texts), "null or a list of names"),
    "layers_to_transform": (
        _or_null(lambda value: _is_index(value) or (isinstance(value, list) and all(map(_is_index, value)))),
        "null, a number or a list of numbers",
    ),
    "layers_pattern": (_or_null(lambda value: _is_text(value) or _is_texts(value)), "null, a name or a list of names"),
    "alpha_pattern": (_or_null(_is_pattern_of(_is_number)), "a mapping of names or patterns to finite numbers"),
    "use_rslora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),  # peft itself takes it back for linear layers, the only ones here
    "base_model_name_or_path": (_or_null(lambda value: isinstance(value, str)), "null or a text"),
    "revision": (_or_null(lambda value: isinstance(value, str)), "null or a text"),
    # others bring layers of their own
    "task_type": (lambda value: value in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"), "null, CAUSAL_LM or SEQ_2_SEQ_LM"),
    "auto_mapping": (_or_null(lambda value: isinstance(value, dict)), "null or a mapping"),
    "peft_version": (_or_null(_is_text), "null or a text"),
    "inference_mode": (_is_flag, "true or false"),
    "megatron_core": (_or_null(_is_text), "null or a text"),
    "qalora_group_size": (_or_null(_is_count), "a whole number"),
    "eva_config": (_or_null(lambda value: isinstance(value, dict)), "null or a mapping"),
    "init_lora_weights": (lambda value: _is_flag(value) or _is_text(value), "true, false or a name"),
}
_READ_OF_TYPE: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "LORA": {
        "rank_pattern": (
            _or_null(_is_pattern_of(_is_count)),
            "a mapping of names or patterns to whole numbers of 1 or more",
        )
    },
    "ADALORA": {
        "rank_pattern": (_or_null(_is_pattern_of(_is_mask)), "null, or a mapping of names to lists of true and false"),
        "init_r": (_is_count, "a whole number of 1 or more"),
        **dict.fromkeys(("target_r", "deltaT", "total_step"), (_is_count, "a whole number of 1 or more")),
        **dict.fromkeys(("tinit", "tfinal"), (_is_index, "a whole number of 0 or more")),
        **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), (_is_number, "a finite number")),
    },
}
_NEEDED = {
    "LORA": ("peft_type", "r", "lora_alpha", "target_modules"),
    "ADALORA": ("peft_type", "init_r", "lora_alpha", "target_modules"),
}
_WHY: dict[str, str] = {
    "use_dora": "magnitudes beside the factors",
    "lora_bias": "a bias beside the factors",
    "layer_replication": "blocks that stand several times",
    "trainable_token_indices": "single rows of an embedding",
    "target_parameters": "parameters that are no linear layer's weight",
    "alora_invocation_tokens": "updates from some token on only",
}


def read_settings(key: str, folder: Path) -> dict[str, Any]:
    """The settings of a peft folder: its own, those that it leaves out as the installed peft has them by default.

    Args:
        key: the recipe's setting that names the folder, for errors.

    Raises: InputError for a file that is missing or broken, and for a setting that is unknown, of a wrong type, or not
    reproduced.
    """
    path = folder / CONFIG
    found = _load(key, path)
    kind = found.get("peft_type")
    where = f"{key}: {path}"
    if kind not in TYPES:
        raise InputError(
            f"{where}: peft_type: found {_told(kind)}, expected one of {', '.join(TYPES)}: other kinds of "
            "updates are not read"
        )
    for name in _NEEDED[kind]:
        if name not in found:
            raise InputError(f"{where}: {name}: found nothing, expected {({**_READ, **_READ_OF_TYPE[kind]})[name][1]}")
    return {**_defaults(kind), **_judged(where, found, kind)}


def _load(key: str, path: Path) -> dict[str, Any]:
    try:
        return read_object(path, "peft's settings", max_bytes=MOST_BYTES)
    except InputError as error:
        raise InputError(f"{key}: {path.parent} is not a peft folder: {error}") from None


def _judged(where: str, found: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings of the file that peft's own configuration is made of."""
    checks, defaults = {**_READ, **_READ_OF_TYPE[kind]}, _defaults(kind)
    judged = {}
    for name, value in found.items():
        if name in checks:
            fits, expected = checks[name]
            if not fits(value):
                raise InputError(f"{where}: {name}: found {_told(value)}, expected {expected}")
        elif not _asks_nothing(name, value) and not (
            name in defaults and value == defaults[name] and type(value) is type(defaults[name])
        ):
            if name not in defaults:
                raise InputError(
                    f"{where}: {name}: found {_told(value)}, a setting that the installed peft does not know; "
                    "it is not reproduced"
                )
            why = f" ({_WHY[name]})" if name in _WHY else ""
            raise InputError(
                f"{where}: {name}: found {_told(value)}, which is not reproduced{why}; expected {_told(defaults[name])}"
            )
        if name in defaults:
            judged[name] = value
    _require_kept_base(where, judged.get("init_lora_weights", True))
    _require_sound_patterns(where, judged, kind)
    return judged


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether a setting is switched off: a newer peft writes what it knows besides, mostly null."""
    if name == "runtime_config":  # of the process that wrote it
        return value is None or (isinstance(value, dict) and not any(value.values()))
    return value is None or value is False or value == [] or value == {}


def _defaults(kind: str) -> dict[str, Any]:
    """The installed peft's settings of that kind, by name."""
    from vltrain.models.peft.layers import load_peft

    peft = load_peft()
    declared = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig}[kind]
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(declared):
        if entry.name == "runtime_config" or not entry.init:
            continue
        has_factory = entry.default_factory is not dataclasses.MISSING
        values[entry.name] = entry.default_factory() if has_factory else entry.default
    return values


def _require_kept_base(where: str, initialised: Any) -> None:
    if initialised in KEPT_BASE:
        return
    raise InputError(
        f"{where}: init_lora_weights: found {_told(initialised)}, which changes the base's own weights, "
        "expected one of true, false, gaussian, "
        "orthogonal, eva; where peft can, convert it: save_pretrained(FOLDER, "
        "path_initial_model_for_weight_conversion=...)"
    )


def _require_sound_patterns(where: str, settings: dict[str, Any], kind: str) -> None:
    """Every text that peft uses as a regular expression is one, and none that takes for ever."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(name), str):
            _require_sound(where, name, settings[name])
    for name in ("modules_to_save", "layers_pattern"):
        value = settings.get(name) or []
        for pattern in [value] if isinstance(value, str) else value:
            _require_sound(where, name, pattern)
    for name in ("alpha_pattern", *(("rank_pattern",) if kind == "LORA" else ())):
        for pattern in settings.get(name) or {}:
            _require_sound(where, name, pattern)


def _require_sound(where: str, name: str, pattern: str) -> None:
    try:
        tree = parser.parse(f"(.*\\.)?({pattern})$")
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{where}: {name}: found {_told(pattern)}, expected a name or a regular expression ({error})"
        ) from None
    if _repeats(tree) > MOST_REPEATS + 1:  # one is ours
        raise InputError(
            f"{where}: {name}: found {_told(pattern)}, a regular expression that may take for ever; expected "
            "fewer, not nested, repetitions"
        )


def _repeats(tree: Any) -> int:
    """Unbounded repetitions of a parsed pattern; a nested one counts as too many."""
    total = 0
    for code, argument in tree:
        inner = _subtrees(argument)
        within = sum(map(_repeats, inner))
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) and argument[1] > 1:
            total += 1 if within == 0 else MOST_REPEATS + 2
        total += within
    return total


def _subtrees(argument: Any) -> list[Any]:
    if isinstance(argument, parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [tree for part in argument for tree in _subtrees(part)]
    return []


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

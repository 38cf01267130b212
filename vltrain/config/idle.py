"""Settings that change nothing beside others: which, and why. One that somebody made fails.

What only an architecture's own settings decide is said where these are declared (`ModelConfig.idle_keys`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from vltrain.config.model.architectures import ARCHITECTURES
from vltrain.config.older_runs import is_default
from vltrain.config.schema import Config
from vltrain.errors import InputError

Rule: TypeAlias = tuple[str, Callable[[Config], bool], str]
"""(dotted key, whether it changes nothing, why then)."""


def _is_off(name: str) -> Callable[[Config], bool]:
    return lambda config: config.eval.scorer is None and bool(getattr(config.train, name))


_OF_ALL: tuple[Rule, ...] = (
    ("model.bits", lambda c: c.model.trains_all, "ViT and LLM are both tuned themselves, in fp32"),
    ("optim.vision_lr", lambda c: not c.model.trains("vision"), "the ViT's own weights are not tuned"),
    ("optim.llm_lr", lambda c: not c.model.trains("llm"), "the LLM's own weights are not tuned"),
    ("optim.projector_lr", lambda c: not c.model.trains("projector"), "the projector is not tuned"),
    ("data.over_long", lambda c: c.data.train_packs is not None, "data.train_packs are packed already"),
    ("data.max_images", lambda c: c.data.train_packs is not None, "data.train_packs are packed already"),
    ("data.fraction", lambda c: c.data.train_packs is not None, "data.train_packs are packed already"),
    ("data.fraction_seed", lambda c: c.data.fraction == 1, "data.fraction = 1 draws every sample"),
    *(
        (f"data.{name}", lambda c: not c.data.is_remote, "data.train_packs is no address (s3://...)")
        for name in ("cache", "cache_gib")
    ),
    *(
        (f"data.{name}", lambda c: bool(c.data.mixture), f"each set of data.mixture has its own {name}")
        for name in ("source", "input", "options", "train_packs")
    ),
    *(
        (f"data.{name}", lambda c: not c.data.mixture, "it is of several sets, and data.mixture names none")
        for name in ("mixture_by", "when_a_set_ends")
    ),
    *(
        (f"eval.{name}", lambda c: c.eval.method == "rank", "eval.method = rank generates nothing")
        for name in ("max_new_tokens", "temperature", "top_p")
    ),
    ("eval.precision", lambda c: c.train.precision == "fp32", "train.precision = fp32 has all products in fp32"),
    ("eval.top_p", lambda c: c.eval.temperature == 0, "eval.temperature = 0 is greedy"),
    *(
        (f"train.{name}", _is_off(name), f"eval.scorer = null evaluates nothing; say --train.{name} {off}")
        for name, off in (
            ("eval_every_steps", 0),
            ("eval_every_epochs", 0),
            ("keep_best", "false"),
            ("early_stopping_patience", "null"),
        )
    ),
    ("eval.normalise_length", lambda c: c.eval.method == "generate", "eval.method = generate ranks nothing"),
)


def _rules() -> Iterator[Rule]:
    """In the order in which they are told."""
    for section in ARCHITECTURES.values():
        yield from ((key, _of_section(section, is_idle), reason) for key, is_idle, reason in section.idle_keys())
    yield from _OF_ALL


def _of_section(section: type, is_idle: Callable[[Any], bool]) -> Callable[[Config], bool]:
    return lambda config: isinstance(config.model, section) and is_idle(config.model)


def refuse_without_effect(config: Config, from_recipe: Mapping[str, Any], overrides: frozenset[str]) -> None:
    """Raises InputError for a setting that somebody made and that changes nothing beside the others.

    A resolved configuration names every key, so a recipe's key with its default value does not count as made.
    """
    idle = idle_settings(config)
    for key in made_settings(from_recipe, overrides):
        if key in idle:
            raise InputError(f"{key}: has no effect: {idle[key]}; leave it out, or change the other")


def made_settings(from_recipe: Mapping[str, Any], overrides: frozenset[str]) -> list[str]:
    """The settings that somebody made, in the order in which their effects are checked."""
    order = dict.fromkeys(key for key, _, _ in _rules())
    return [key for key in order if key in overrides or (key in from_recipe and not is_default(key, from_recipe[key]))]


def idle_settings(config: Config) -> dict[str, str]:
    """Every setting that changes nothing beside the others, and why."""
    idle: dict[str, str] = {}
    for key, is_idle, reason in _rules():
        if is_idle(config):
            idle.setdefault(key, reason)
    return idle

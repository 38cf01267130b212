"""The audit of a model: its config shrunken, all checks on the small copy, a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from vltrain.audit.checks.export import check_export
from vltrain.audit.checks.generation import check_generation
from vltrain.audit.checks.packing import check_alone, check_packing
from vltrain.audit.checks.processor import check_processor
from vltrain.audit.checks.trainer import check_trainer
from vltrain.audit.checks.training import check_shares, check_tuning
from vltrain.audit.findings import Finding, Report
from vltrain.audit.small.config import shrink
from vltrain.audit.small.sizes import VOCABULARY
from vltrain.audit.subject import RESERVED, Subject, Tuning
from vltrain.audit.text_model import text_subject, text_tunings
from vltrain.audit.vision_model import usual_tunings, vision_subject, vision_tuning
from vltrain.config.model.base import ModelConfig
from vltrain.console import logged_from
from vltrain.data.stock.source import StockSource
from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.models.pretrained.checkpoint_config import read_values
from vltrain.models.pretrained.quiet import quiet_transformers

MOST_PARAMETERS = 30_000_000
"""Of a small copy: one with more has a part that does not shrink, and would take minutes."""


def model_values(name: str) -> tuple[str, dict[str, Any]]:
    """(where, values) of the config.json of a folder or a hub's repository. Raises InputError."""
    place = locate(name)
    path = Path(place, "config.json")
    if Path(place).is_dir() and not path.is_file():
        raise InputError(f"{place}: found no config.json, expected the folder of a model, or a recipe")
    return f"{path if path.is_file() else place}", read_values("MODEL", name, place, {})


def config_of(where: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that `values` describe, of transformers' own class. Raises InputError."""
    kind = values.get("model_type")
    if "auto_map" in values and kind not in CONFIG_MAPPING:
        raise InputError(
            f"{where}: a model of type {kind!r:.80} runs code of its own folder (auto_map), which is not run here; "
            "take a conversion to transformers' own classes"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"{where}: model_type: found {kind!r:.80}, which transformers {transformers.__version__} does not know; "
            f"{nearest(str(kind), list(CONFIG_MAPPING))}"
        )
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[kind].from_dict(dict(values))
    except Exception as error:  # whatever transformers' code runs into with such values
        raise InputError(
            f"{where}: no config of type {kind!r} can be made of it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]})"
        ) from None


def is_vision(config: PreTrainedConfig) -> bool:
    """Whether it is of a vision-language model."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def audit(
    name: str,
    config: PreTrainedConfig,
    tunings: Mapping[str, ModelConfig] | None = None,
    *,
    processor: StockSource | None = None,
    trainer: bool = True,
) -> Report:
    """All checks on a small copy of a model of that config.

    Args:
        name: of the model, for the report.
        tunings: by what they are, in words: ways to tune the small copy of a vision-language model; None: the usual.
        processor: where the model's is; None: it has none, and nothing is said of it.
        trainer: also run transformers' Trainer.

    Raises: InputError for a model that cannot be audited: of another kind, or refused.
    """
    started = time.monotonic()
    with (
        quiet_transformers(),
        logged_from(logging.WARNING, "vltrain.ops"),  # which attention it takes is nobody's
        torch.random.fork_rng(devices=[]),
    ):
        try:
            subject, ways = _subject(name, config, tunings)
        except InputError:
            raise
        except Exception as error:  # a family's own code, given sizes that it did not expect
            raise InputError(
                f"{name}: no small copy of a model of type {config.model_type!r} can be made ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]})"
            ) from None
        findings = [] if processor is None else [check_processor(config, processor)]
        findings += _findings(subject, ways, trainer)
    return Report(
        model=name,
        kind=config.model_type,
        small=sum(one.numel() for one in subject.reference.parameters()),
        seconds=time.monotonic() - started,
        findings=findings,
    )


def _findings(subject: Subject, ways: list[Tuning], trainer: bool) -> list[Finding]:
    try:
        packing, reached = check_packing(subject)
    except InputError:
        raise
    except Exception as error:  # a family's own code, given a packed row
        where = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [Finding(what="takes a packed row", passed=False, bound=None, where=where)]
    findings = [*packing, *check_shares(subject)]
    if subject.decode is not None:
        findings += check_generation(subject)
    free = frozenset(name for name, other in subject.names.items() if other not in reached)
    for tuning in ways:
        findings += check_alone(subject, tuning)
        findings += check_tuning(tuning, free)
        findings += check_export(subject, tuning)
    if trainer:
        findings.append(check_trainer(subject, 3, VOCABULARY - RESERVED))
    return findings


def _subject(
    name: str, config: PreTrainedConfig, tunings: Mapping[str, ModelConfig] | None
) -> tuple[Subject, list[Tuning]]:
    if is_vision(config):
        small = shrink(config).config
        subject = vision_subject(small)
        ways: Mapping[str, ModelConfig] = tunings or usual_tunings(small)
        return subject, [vision_tuning(title, one, subject) for title, one in ways.items()]
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        subject = text_subject(shrink(config).config)
        return subject, text_tunings(subject)
    raise InputError(
        f"{name}: a model of type {config.model_type!r} is neither a language model nor a vision-language model of "
        "transformers'"
    )

"""The audit: all checks on small copies of a model, one for each way to tune it, and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from vltrain.audit.checks.export import check_export
from vltrain.audit.checks.generation import check_generation
from vltrain.audit.checks.packing import check_packing
from vltrain.audit.checks.processor import check_processor
from vltrain.audit.checks.trainer import check_trainer
from vltrain.audit.checks.training import check_shares, check_tuning
from vltrain.audit.findings import Finding, Report
from vltrain.audit.subject import Subject
from vltrain.audit.subjects.table import Section, subject_of
from vltrain.console import logged_from
from vltrain.data.stock.source import StockSource
from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import quiet_transformers


def audit(
    name: str,
    ways: Mapping[str, Section],
    *,
    processor: tuple[StockSource, PreTrainedConfig] | None = None,
    trainer: bool = True,
) -> Report:
    """All checks on small copies of a model.

    Args:
        name: of the model, for the report.
        ways: by what they are, in words: small sections, see `Architecture.resized`. All checks are made of the first,
            of the others those of the tuning.
        processor: where the model's is, and the config of the model; None: nothing is said of it.
        trainer: also run transformers' Trainer.

    Raises: InputError for a model that cannot be audited: of another kind, or refused.
    """
    started = time.monotonic()
    findings: list[Finding] = []
    kind, small = "", 0
    with (
        quiet_transformers(),
        logged_from(logging.WARNING, "vltrain.ops"),  # which attention it takes is nobody's
        torch.random.fork_rng(devices=[]),
    ):
        if processor is not None:
            findings.append(check_processor(processor[1], processor[0]))
        for number, (title, section) in enumerate(ways.items()):
            subject = _made(name, title, section)
            kind, small = subject.kind, max(small, sum(one.numel() for one in subject.model.parameters()))
            found = _findings(subject, brief=number > 0, trainer=trainer and number == 0)
            findings += [_titled(one, title) for one in found]
    return Report(model=name, kind=kind, small=small, seconds=time.monotonic() - started, findings=findings)


def _made(name: str, title: str, section: Section) -> Subject:
    try:
        return subject_of(section, title)
    except InputError:
        raise
    except Exception as error:  # a family's own code, given sizes that it did not expect
        raise InputError(
            f"{name}: no small copy of this model can be made ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]})"
        ) from None


def _titled(finding: Finding, title: str) -> Finding:
    return replace(finding, what=f"{finding.what} ({title})") if title and finding.passed is not None else finding


def _findings(subject: Subject, *, brief: bool, trainer: bool) -> list[Finding]:
    try:
        packing = check_packing(subject, brief=brief)
    except InputError:
        raise
    except Exception as error:  # a family's own code, given a packed row
        where = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [Finding(what="takes a packed row", passed=False, bound=None, where=where)]
    network = subject.reference.reads_ids
    told = [check_trainer(network)] if trainer and network is not None else []
    findings = list(packing.findings)
    if not brief:
        findings += check_shares(subject, packing.gradients)
        findings += check_generation(subject)
    findings += check_tuning(subject, packing.free)
    findings += check_export(subject)
    return [*findings, *told]

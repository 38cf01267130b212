"""The table of what can be audited: by a section's `architecture`, the file that makes what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from vltrain.audit.subject import Made, Subject, make_subject
from vltrain.audit.subjects import instructblip, mmt, stock, text
from vltrain.config.model.base import ModelConfig
from vltrain.models.architectures import architecture_of

Section = ModelConfig | text.TextSection
SUBJECTS: dict[str, Callable[[Any], Made]] = {
    "mmt": mmt.make,
    "instructblip": instructblip.make,
    "stock": stock.make,
    "text": text.make,
}


def subject_of(section: Section, title: str = "") -> Subject:
    """Of a small section. Raises InputError for what the architecture refuses."""
    if isinstance(section, text.TextSection):
        parts = text.trained_parts(section)
    else:
        parts = architecture_of(cast(ModelConfig, section)).trained_parts(section)
    return make_subject(SUBJECTS[section.architecture](section), title, parts)


def is_known(section: Section) -> bool:
    """Whether there is something to compare it with."""
    return SUBJECTS.get(section.architecture) is not None

"""Merged and exported = trained: what was tuned, folded into the family's own class, saved, and loaded anew by stock
transformers, makes the trained model's loss."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vltrain.audit.checks.compare import apart
from vltrain.audit.findings import BOUND, Finding
from vltrain.audit.subject import Subject, reference_loss
from vltrain.models.interface import VisionLanguageModel
from vltrain.models.pretrained.quiet import quiet_transformers


@torch.no_grad()
def check_export(subject: Subject, title: str, model: VisionLanguageModel, merged: Mapping[str, Tensor]) -> Finding:
    """One finding.

    Args:
        title: of the way it was tuned, in words.
        model: the trained one.
        merged: its weights folded together, by the reference's names.
    """
    row = subject.row(subject.pieces)
    losses = model(row).segment_losses
    kept = {name: one.detach().clone() for name, one in subject.reference.named_parameters()}
    what = f"merged and exported = trained ({title})"
    try:
        theirs = dict(subject.reference.named_parameters())
        for name, value in merged.items():
            theirs[name].copy_(value)
        again = _reloaded(subject.reference)
    finally:
        for name, one in subject.reference.named_parameters():
            one.copy_(kept[name])
    found = torch.tensor([reference_loss(again, subject, piece)[1] for piece in subject.pieces], dtype=losses.dtype)
    size = apart(found, losses)
    return Finding(
        what=what, passed=size <= BOUND, difference=size,
        where="" if size <= BOUND else "transformers computes something else from the folder than the trained model",
    )  # fmt: skip


def _reloaded(reference: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        reference.save_pretrained(folder)
        again = type(reference).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return again.train()

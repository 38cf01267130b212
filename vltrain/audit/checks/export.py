"""Merged and exported = trained: what was tuned, folded into the family's own class, saved, and loaded anew by stock
transformers, makes the trained model's loss."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from vltrain.audit.checks.compare import apart
from vltrain.audit.findings import BOUND, Finding
from vltrain.audit.subject import Subject, Tuning, reference_loss
from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import quiet_transformers


@torch.no_grad()
def check_export(subject: Subject, tuning: Tuning) -> list[Finding]:
    """One finding about one way to tune; none where nothing is folded."""
    if tuning.merged is None:
        return []
    what = f"merged and exported = trained ({tuning.title})"
    losses = tuning.model(subject.row(subject.pieces)).segment_losses
    try:
        again = _reloaded(tuning.merged())
    except InputError as error:  # of adapters that this family's layers cannot take in
        return [Finding(what=what, passed=None, bound=None, where=f"cannot be folded: {error}")]
    found = torch.tensor([reference_loss(again, subject, piece)[1] for piece in subject.pieces], dtype=losses.dtype)
    size = apart(found, losses)
    where = "" if size <= BOUND else "transformers computes something else from the folder than the trained model"
    return [Finding(what=what, passed=size <= BOUND, difference=size, where=where)]


def _reloaded(network: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        network.save_pretrained(folder)
        again = type(network).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return again.train()

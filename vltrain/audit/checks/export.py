"""Merged and exported = trained: what was tuned, folded into transformers' own classes, saved, and loaded anew by them,
makes the trained model's loss."""

from __future__ import annotations

import torch

from vltrain.audit.checks.compare import apart
from vltrain.audit.checks.packing import loss_of
from vltrain.audit.findings import Finding, compared
from vltrain.audit.subject import Subject
from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import quiet_transformers


@torch.no_grad()
def check_export(subject: Subject) -> list[Finding]:
    """One finding. Uses the model up."""
    what = "merged and exported = trained"
    losses = subject.model(subject.row(subject.segments)).segment_losses
    try:
        with quiet_transformers():
            again = subject.folded().train()
    except InputError as error:  # of adapters that the layers cannot take in
        return [Finding(what=what, passed=None, bound=None, where=f"cannot be folded: {error}")]
    found = torch.stack([loss_of(again, one) for one in subject.segments]).to(losses.dtype)
    size = apart(found, losses)
    return [compared(what, size, "transformers computes something else from the folder than the trained model")]

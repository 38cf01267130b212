"""What a step of training does to the weights: frozen ones stay bit for bit, every trained one is reached by every kind
of row, and the gradient of a step does not depend on how its segments are shared out."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn

from vltrain.audit.checks.compare import worst_named
from vltrain.audit.findings import BOUND, Finding
from vltrain.audit.pieces import Piece
from vltrain.audit.subject import Subject, Tuning
from vltrain.batch import Batch
from vltrain.models.interface import VisionLanguageModel

SHARES = 4  # 2 ranks of 2 micro-steps
LEARNING_RATE = 1e-3


def check_tuning(tuning: Tuning, free: Set[str]) -> list[Finding]:
    """One or two findings about one way to tune.

    Args:
        free: names of parameters that no row can reach, whoever trains them: the family does not use them.
    """
    model, title = tuning.model, tuning.title
    frozen = {name: one.detach().clone() for name, one in model.named_parameters() if name not in tuning.trained}
    missing = {name: _missing(model, row, tuning.trained - free) for name, row in tuning.rows.items()}
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE, weight_decay=0.1
    )
    optimizer.step()
    model.zero_grad(set_to_none=True)
    now = dict(model.named_parameters())
    moved = [name for name, before in frozen.items() if not torch.equal(before, now[name])]
    unreached = [(row, names) for row, names in missing.items() if names]
    stays = Finding(
        what=f"frozen stays frozen ({title})",
        passed=not moved,
        where=f"{len(moved)} frozen parameters change, {moved[0]} first" if moved else "",
    )
    reached = Finding(
        what=f"all trained are reached ({title})",
        passed=not unreached,
        where="; ".join(f"{row}: {len(names)} without gradient, {names[0]} first" for row, names in unreached),
    )
    return [stays, reached] if frozen else [reached]


def _missing(model: VisionLanguageModel, row: Batch, trained: Set[str]) -> list[str]:
    """Trained parameters that the backward of a row gives no gradient; zero is one."""
    model.zero_grad(set_to_none=True)
    model(row).loss_sum.backward()
    return [name for name, one in model.named_parameters() if name in trained and one.grad is None]


def check_shares(subject: Subject) -> list[Finding]:
    """Two findings: the gradient of one pack against that of its segments over two ranks and two micro-steps, and in
    another order."""
    pieces = list(subject.pieces)
    total = sum(one.num_labels for one in pieces)
    whole = _gradients(subject, [pieces], total)
    shared, name = worst_named(_gradients(subject, [pieces[start::SHARES] for start in range(SHARES)], total), whole)
    turned, other = worst_named(_gradients(subject, [pieces[::-1]], total), whole)
    return [
        Finding(
            what="gradient of 2 ranks x 2 micro-steps = whole",
            passed=shared <= BOUND,
            difference=shared,
            where="" if shared <= BOUND else f"largest in {name}",
        ),
        Finding(
            what="gradient in another order = whole",
            passed=turned <= BOUND,
            difference=turned,
            where="" if turned <= BOUND else f"largest in {other}",
        ),
    ]


def _gradients(subject: Subject, packs: Sequence[Sequence[Piece]], total: int) -> dict[str, Tensor]:
    """Summed over packs, of their losses over all label tokens of the step, as the trainer does."""
    model: nn.Module = subject.model
    model.zero_grad(set_to_none=True)
    for pieces in packs:
        (model(subject.row(pieces)).loss_sum / total).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

"""What a step of training does to the weights: frozen ones stay bit for bit, every trained one is reached by every kind
of row, and the gradient of a step does not depend on how its segments are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from vltrain.audit.checks.compare import worst_named
from vltrain.audit.checks.packing import gradients_of
from vltrain.audit.findings import Finding, compared
from vltrain.audit.subject import Subject
from vltrain.batch import Batch
from vltrain.schema import Segment

SHARES = 4  # 2 ranks of 2 micro-steps
LEARNING_RATE = 1e-3


def check_tuning(subject: Subject, free: Set[str]) -> list[Finding]:
    """One or two findings. `free`: names of parameters that no row can reach, whoever trains them: the family does not
    use them."""
    model, trained = subject.model, subject.trained
    frozen = {name: one.detach().clone() for name, one in model.named_parameters() if name not in trained}
    missing = {name: _missing(subject, row, trained - free) for name, row in subject.rows().items()}
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE, weight_decay=0.1
    )
    optimizer.step()
    model.zero_grad(set_to_none=True)
    now = dict(model.named_parameters())
    moved = [name for name, before in frozen.items() if not torch.equal(before, now[name])]
    unreached = [(row, names) for row, names in missing.items() if names]
    stays = Finding(
        what="frozen stays frozen",
        passed=not moved,
        where=f"{len(moved)} frozen parameters change, {moved[0]} first" if moved else "",
    )
    reached = Finding(
        what="all trained are reached",
        passed=not unreached,
        where="; ".join(f"{row}: {len(names)} without gradient, {names[0]} first" for row, names in unreached),
    )
    return [stays, reached] if frozen else [reached]


def _missing(subject: Subject, row: Batch, trained: Set[str]) -> list[str]:
    """Trained parameters that the backward of a row gives no gradient; zero is one."""
    model = subject.model
    model.zero_grad(set_to_none=True)
    model(row).loss_sum.backward()
    return [name for name, one in model.named_parameters() if name in trained and one.grad is None]


def check_shares(subject: Subject, packed: Mapping[str, Tensor]) -> list[Finding]:
    """Two findings: the gradient of one pack against that of its segments over two ranks and two micro-steps, and in
    another order. `packed`: of the summed losses of one pack."""
    segments = list(subject.segments)
    total = sum(int(one.loss_mask.sum()) for one in segments)
    whole = {name: one / total for name, one in packed.items()}
    shared = _gradients(subject, [segments[start::SHARES] for start in range(SHARES)], total)
    turned = _gradients(subject, [segments[::-1]], total)
    return [
        compared(what, size, f"largest in {name}")
        for what, (size, name) in (
            ("gradient of 2 ranks x 2 micro-steps = whole", worst_named(shared, whole)),
            ("gradient in another order = whole", worst_named(turned, whole)),
        )
    ]


def _gradients(subject: Subject, packs: Sequence[Sequence[Segment]], total: int) -> dict[str, Tensor]:
    """Summed over packs, of their losses over all label tokens of the step, as the trainer does."""
    subject.model.zero_grad(set_to_none=True)
    for segments in packs:
        batch = subject.row(segments, blank=any(one.images for one in subject.segments))
        (subject.model(batch).loss_sum / total).backward()
    return {name: one.clone() for name, one in gradients_of(subject).items()}

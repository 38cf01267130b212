"""Answers of a padded batch = each prompt alone: the logits of every step, with a cache and padding, against
transformers' own forward over prompt and answer without either."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vltrain.audit.checks.compare import worst_row
from vltrain.audit.findings import BOUND, Finding
from vltrain.audit.pieces import Piece
from vltrain.audit.subject import Subject

STEPS = 6


def check_generation(subject: Subject) -> list[Finding]:
    """One finding."""
    assert subject.decode is not None, "a subject that answers"
    prompts = list(subject.prompts)
    subject.model.eval()
    try:
        tokens, logits = subject.decode(prompts, STEPS)
    finally:
        subject.model.train()
    alone = [_alone(subject, prompt, answer) for prompt, answer in zip(prompts, tokens, strict=True)]
    worst, row = worst_row(list(logits), alone)
    where = f"prompt {row + 1} of {len(prompts)}, of {len(prompts[row].input_ids)} tokens" if worst > BOUND else ""
    first = next((step for step in range(STEPS) if worst_row([logits[row][step]], [alone[row][step]])[0] > BOUND), 0)
    return [
        Finding(
            what="generation in a padded batch = alone",
            passed=worst <= BOUND,
            difference=worst,
            where=f"{where}, from step {first + 1} of {STEPS} on" if where else "",
        )
    ]


@torch.no_grad()
def _alone(subject: Subject, prompt: Piece, answer: Tensor) -> Tensor:
    """Logits [steps, rows of the head] that follow the prompt and each token of its answer but the last."""
    blocks = F.pad(prompt.blocks, (0, len(answer) - 1), value=-1) if len(prompt.blocks) else prompt.blocks
    whole = replace(prompt, input_ids=torch.cat([prompt.input_ids, answer[:-1]]), blocks=blocks)
    logits = subject.reference(**subject.arguments(whole), use_cache=False).logits[0]
    return logits[len(prompt.input_ids) - 1 :]

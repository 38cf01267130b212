"""Answers of a padded batch = each prompt alone: the logits of every step, by the way that runs answer, against
transformers' own forward over prompt and answer without cache or padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from vltrain.audit.checks.compare import worst_row
from vltrain.audit.findings import BOUND, Finding, compared
from vltrain.audit.samples import LAST_TEXT, answered, question_of
from vltrain.audit.subject import Subject
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.models.adapters.base import Adapter
from vltrain.schema import Segment

STEPS = 6
DROPOUT = 0.5


def check_generation(subject: Subject) -> list[Finding]:
    """One finding. While answering, every dropout would be large if evaluation mode did not switch it off."""
    asked = [one for segment in subject.segments if (one := question_of(segment)) is not None]
    prompts = sorted(asked, key=lambda one: (len(one.input_ids), one.images))  # as `generate` takes them
    subject.model.eval()
    try:
        with _dropouts(subject.model):
            tokens, logits = _answers(subject, prompts)
    finally:
        subject.model.train()
    with torch.no_grad():
        alone = [subject.reference.predictions(answered(prompt, np.array(answer)))
                 for prompt, answer in zip(prompts, tokens, strict=True)]  # fmt: skip
    worst, row = worst_row(list(logits), alone)
    where = ""
    if worst > BOUND:
        step = next(step for step in range(STEPS) if worst_row([logits[row][step]], [alone[row][step]])[0] > BOUND / 10)
        where = (
            f"prompt {row + 1} of {len(prompts)}, of {len(prompts[row].input_ids)} tokens, from step {step + 1} of "
            f"{STEPS} on"
        )
    return [compared("generation in a padded batch = alone", worst, where)]


def _answers(subject: Subject, prompts: Sequence[Segment]) -> tuple[list[list[int]], Tensor]:
    """(tokens of each prompt, logits [B, steps, rows of the head])."""
    seen: list[Tensor] = []
    handle = subject.model.llm.lm_head.register_forward_hook(
        lambda module, given, output: seen.append(output.detach())
    )  # fmt: skip
    try:
        answers = generate(
            subject.model,
            prompts,
            subject.pictures,
            sampling=Sampling(max_new_tokens=STEPS),
            stop_ids=(),
            vocab_size=LAST_TEXT,
            batch_size=len(prompts),
            device="cpu",
        )
    finally:
        handle.remove()
    return answers, torch.stack(seen, 1)


@contextmanager
def _dropouts(model: nn.Module) -> Iterator[None]:
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout" if isinstance(module, Adapter) else None
        if name is not None:
            before.append((module, name, getattr(module, name)))
            setattr(module, name, DROPOUT)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)

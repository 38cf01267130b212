"""What transformers' own Trainer makes of the gradient of a step with two micro-batches of uneven label counts, beside
the exact one. Told, not judged: it is not how we train."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vltrain.audit.findings import Finding
from vltrain.audit.samples import FIRST_TEXT, LAST_TEXT
from vltrain.models.peft.layers import load_peft
from vltrain.schema import IGNORE_INDEX

TOKENS = 32
LABELS = (2, 30)  # of each micro-batch


def check_trainer(network: Any) -> Finding:
    """One finding. `network`: of transformers, with its head; a copy is trained."""
    model = copy.deepcopy(network).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    samples = [
        _sample(torch.randint(FIRST_TEXT, LAST_TEXT, (TOKENS,), generator=generator), labels) for labels in LABELS
    ]
    exact = _exact(model, samples)
    try:
        found = _by_trainer(model, samples)
    except Exception as error:  # whatever a family's forward does not take
        reason = " ".join(str(error).split())[:120]
        return Finding(
            what="transformers' Trainer", passed=None, where=f"does not run: {type(error).__name__}: {reason}"
        )
    cosine = sum(float((found[name] * one).sum()) for name, one in exact.items())
    sizes = [sum(float((one**2).sum()) for one in of.values()) ** 0.5 for of in (exact, {n: found[n] for n in exact})]
    apart = sum(float(((found[name] - one) ** 2).sum()) for name, one in exact.items()) ** 0.5 / sizes[0]
    return Finding(
        what="transformers' Trainer, the same gradient",
        passed=None,
        difference=apart,
        bound=None,
        where=f"accumulation 2, {LABELS[0]} and {LABELS[1]} labels: cosine {cosine / (sizes[0] * sizes[1]):.2f} to the "
        "exact gradient",
    )  # fmt: skip


def _sample(ids: Tensor, labels: int) -> dict[str, Tensor]:
    kept = torch.full_like(ids, IGNORE_INDEX)
    kept[-labels:] = ids[-labels:]
    return {"input_ids": ids, "labels": kept}


def _exact(model: Any, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    total = sum(int((one["labels"][1:] != IGNORE_INDEX).sum()) for one in samples)
    for sample in samples:
        logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1]
        labels = sample["labels"][1:]
        kept = labels != IGNORE_INDEX
        (F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum") / total).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _keeper(callback: Any) -> Any:
    """Takes the gradients before the optimizer's step. `callback`: transformers' TrainerCallback, which is imported
    where it is needed alone."""

    class Keep(callback):
        def __init__(self) -> None:
            self.gradients: dict[str, Tensor] = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            model = named["model"]
            self.gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    return Keep()


def _by_trainer(model: Any, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    load_peft()  # which the Trainer imports, too, aloud
    # What it imports on the way (DeepSpeed) writes to the terminal.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        library = importlib.import_module("transformers")
        keep = _keeper(library.TrainerCallback)
        arguments = library.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(samples),
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = library.Trainer(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
            callbacks=[keep],
        )
        trainer.train()
    return keep.gradients

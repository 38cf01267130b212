"""Every architecture and LLM on this device beside the CPU, tiny and in fp32: answers, ranking, captions, losses; and
InstructBLIP trained here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from tests.gpu.part import Findings, run_part
from tests.gpu.runs import finish, losses, predictions, vltrain
from tests.support.answering_run import KINDS, AnsweringRun, answering_run, asked
from tests.support.blip import blip_config, make_tokenizers
from vltrain.config.recipe import dump_config
from vltrain.inference import load

NEW_TOKENS, STEPS, EMULATED_STEPS = 12, 40, 3
LIMIT = 1e-4  # of a log-probability and of a loss, relative to those that the CPU says
BLIPS = ("llama", "t5")


def find(findings: Findings) -> None:
    for kind in KINDS:
        findings.attempt(kind, lambda: _answers(findings, kind))
    for kind in BLIPS:
        findings.attempt(f"captions by {kind}", lambda: _captions(findings, kind))
    for kind in BLIPS[1:] if findings.emulate else BLIPS:
        findings.attempt(f"{kind}, trained", lambda: _trained(findings, kind))


def _answers(findings: Findings, kind: str) -> None:
    run = answering_run(kind, findings.folder / kind, eval__max_new_tokens=NEW_TOKENS)
    here, there = load(run.folder, device=findings.device), load(run.folder, device="cpu")
    found, expected = (
        [model.chat(asked(one), run.paths(one)) for one in run.samples if one.id != "talk"] for model in (here, there)
    )
    differing = sum(one.text != other.text for one, other in zip(found, expected, strict=True))
    pairs = [
        pair
        for one, other in zip(found, expected, strict=True)
        if one.text == other.text
        for pair in zip(one.logprobs, other.logprobs, strict=True)
    ]
    worst = max(abs(one - other) / max(1.0, abs(other)) for one, other in pairs)
    lost = [model.loss(run.samples, folder=run.images) for model in (here, there)]
    worst_loss = max(abs(one / other - 1) for one, other in zip(*lost, strict=True))
    findings.check(
        "answers beside the CPU's, fp32",
        max(worst, worst_loss),
        LIMIT,
        model=kind,
        questions=len(found),
        tokens=len(pairs),
        different_texts=len({one.text for one in expected}),
        other_answers=differing,
        worst_logprob=worst,
        worst_loss=worst_loss,
    )
    findings.require(not differing, f"{kind}: {differing} of {len(found)} answers are not the CPU's")


def _evaluated(findings: Findings, run: Path, *words: str) -> tuple[list[str], list[str]]:
    """Predictions of this device and of the CPU."""
    said = []
    for on_cpu in (False, True):
        vltrain(["evaluate", str(run), *words], findings.folder / "evaluate.log", on_cpu=on_cpu)
        said.append(predictions(run))
    return said[0], said[1]


def _compare(findings: Findings, what: str, kind: str, said: tuple[list[str], list[str]]) -> None:
    differing = sum(map(str.__ne__, *said))
    findings.row(
        "vltrain evaluate beside the CPU, fp32",
        what=what,
        llm=kind,
        questions=len(said[1]),
        different_texts=len(set(said[1])),
        other_answers=differing,
    )
    findings.require(not differing, f"{what} by {kind}: {differing} answers are not the CPU's")


def _captions(findings: Findings, kind: str) -> None:
    run: AnsweringRun = answering_run(kind, findings.folder / f"captions-{kind}", eval__max_new_tokens=NEW_TOKENS)
    samples = [replace(one, metadata={"captions": ["red circle star", "the blue heart"]}) for one in run.samples]
    (run.images / "test.jsonl").write_text("".join(json.dumps(one.to_json()) + "\n" for one in samples))
    _compare(findings, "captions", kind, _evaluated(findings, run.folder, "--eval.scorer", "caption"))


def _trained(findings: Findings, kind: str) -> None:
    """LoRA on Q-Former and LLM, by the program; then generated and ranked."""
    folder = findings.folder / f"trained-{kind}"
    changes = {
        "qformer_tokens": 48,
        "llm__mode": "lora",
        "data__root": str(folder / "data"),
        "data__pack_length": 192,
        "train__packs_per_step": 3,
        "train__max_steps": EMULATED_STEPS if findings.emulate else STEPS,
        "train__epochs": 99.0,
        "optim__lr": 2e-2,
        "output": str(folder / "run"),
    }
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(
        dump_config(blip_config(kind, make_tokenizers(folder / "tokenizers"), **changes))
    )
    seconds = finish(
        ["--ds", "ds_configs/zero2.json", "--recipe", str(folder / "recipe.yaml")],
        folder / "train.log",
        "launch/train_qformer.py",
    )
    found = losses(folder / "run")
    findings.row(
        "InstructBLIP trained here, fp32",
        llm=kind,
        steps=len(found),
        first_loss=found[0],
        last_loss=found[-1],
        seconds=seconds,
    )
    findings.require(
        findings.emulate or found[-1] < found[0], f"{kind}: the loss did not fall: {found[0]}, {found[-1]}"
    )
    for method in ("generate", "rank"):
        _compare(findings, method, kind, _evaluated(findings, folder / "run", "--eval.method", method))


if __name__ == "__main__":
    sys.exit(run_part("architectures", find, __doc__))

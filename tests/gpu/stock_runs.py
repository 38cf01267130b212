"""Tiny vision-language models of transformers with their processors, through the programs on this device: each way of
training beside the CPU's losses in fp32, answers beside the CPU's, exports that prove themselves."""

from __future__ import annotations

import json
import math
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu.part import Findings, run_items
from tests.gpu.runs import finish, losses, predictions, vltrain
from tests.support.stock_world import stock_recipe
from tests.train.zero.test_equivalence import stage

LORA = {"llm": {"peft": {"kind": "lora", "rank": 4, "targets": ["*_proj"]}}, "projector": {"train": True}}
MODELS: dict[str, dict[str, Any]] = {
    "smolvlm": {"model": LORA, "adapter": {"dim": 8, "vision": "both", "llm": "none"}},
    "qwen3_vl": {"model": {}, "adapter": {"dim": 8, "vision": "none", "llm": "both", "bias": False}},
    "gemma3": {"model": LORA, "adapter": {"vision": "none", "llm": "none"}},
}
NEEDS_TORCHVISION = ("smolvlm", "qwen3_vl")
STEPS, EMULATED_STEPS = 12, 3
FP32_LIMIT, BF16_LIMIT, BITS_LIMIT = 1e-4, 2e-2, 5e-2  # of losses, relative to the CPU's in fp32
WAYS: dict[str, tuple[int, tuple[str, ...], float]] = {  # ZeRO stage, further words, limit
    "fp32": (0, (), FP32_LIMIT),
    "fp32, ZeRO 3": (3, (), FP32_LIMIT),
    "fp32, recomputed": (2, ("--train.activation_checkpointing", "true"), FP32_LIMIT),
    "bf16": (2, ("--train.precision", "bf16"), BF16_LIMIT),
    "bf16, compiled": (2, ("--train.precision", "bf16", "--train.compile", "true"), BF16_LIMIT),
    "4 bits": (2, ("--train.precision", "bf16", "--bits", "4"), BITS_LIMIT),
    "8 bits": (2, ("--train.precision", "bf16", "--bits", "8"), BITS_LIMIT),
}
KEPT = ("--train.keep_image_features", "true")
EMULATED = ("gemma3",)


def find(findings: Findings, kind: str) -> None:
    if kind in NEEDS_TORCHVISION and find_spec("torchvision") is None:
        findings.row("not run", model=kind, reason="its processor needs torchvision")
        return
    steps = EMULATED_STEPS if findings.emulate else STEPS
    shutil.rmtree(findings.folder, ignore_errors=True)  # runs of another time would be resumed
    findings.folder.mkdir(parents=True)
    recipe = stock_recipe(
        kind,
        findings.folder / "world",
        MODELS[kind]["model"],
        adapter=MODELS[kind]["adapter"],
        train={"max_steps": steps},
        eval={"max_new_tokens": 6, "scorer": "exact"},
    )
    findings.attempt("the CPU's run", lambda: _train(findings, recipe, "cpu", 0, (), on_cpu=True))
    ways = dict(WAYS)
    if MODELS[kind]["adapter"]["vision"] == "none" and "projector" not in MODELS[kind]["model"]:
        ways["features kept"] = (0, KEPT, FP32_LIMIT)
        ways["bf16, features kept"] = (2, (*KEPT, "--train.precision", "bf16"), BF16_LIMIT)
    for way in list(ways)[:2] if findings.emulate else ways:
        findings.attempt(f"{kind}, {way}", lambda: _way(findings, recipe, kind, way, *ways[way]))
    findings.attempt(f"{kind}, answers", lambda: _answers(findings, kind))
    for form in ("merged",) if findings.emulate else ("merged", "lora"):
        if form != "lora" or "llm" in MODELS[kind]["model"]:
            findings.attempt(f"{kind}, {form}", lambda: _export(findings, kind, form))


def _run(findings: Findings, name: str) -> Path:
    return findings.folder / "runs" / name.replace(" ", "_").replace(",", "")


def _train(
    findings: Findings, recipe: Path, name: str, number: int, words: tuple[str, ...], *, on_cpu: bool = False
) -> float:
    ds = findings.folder / f"zero{number}.json"
    ds.write_text(json.dumps(stage(number)))
    given = ["--recipe", str(recipe), "--ds", str(ds), "--output", str(_run(findings, name)), *words]
    log = findings.folder / "train.log"
    if on_cpu:
        return vltrain(["train", *given, "--ranks", "1"], log, on_cpu=True)[0]
    return finish(given, log)


def _way(
    findings: Findings, recipe: Path, kind: str, way: str, number: int, words: tuple[str, ...], limit: float
) -> None:
    seconds = _train(findings, recipe, way, number, words)
    found, expected = losses(_run(findings, way)), losses(_run(findings, "cpu"))
    assert len(found) == len(expected) > 0, f"{len(found)} steps, {len(expected)} on the CPU"
    worst = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    findings.check(
        "losses of every step beside the CPU's run in fp32",
        worst if all(map(math.isfinite, found)) else math.nan,
        limit,
        model=kind,
        way=way,
        stage=number,
        steps=len(found),
        first_loss=found[0],
        last_loss=found[-1],
        seconds=seconds,
    )


def _answers(findings: Findings, kind: str) -> None:
    """The run trained here in fp32 answers on this device, in one batch and alone, and on the CPU."""
    run, said = _run(findings, "fp32"), []
    for words, on_cpu in (((), False), (("--eval.batch_size", "1"), False), ((), True)):
        vltrain(["evaluate", str(run), *words], findings.folder / "evaluate.log", on_cpu=on_cpu)
        said.append(predictions(run))
    differing = [sum(map(str.__ne__, one, said[2])) for one in said[:2]]
    findings.row(
        "vltrain evaluate beside the CPU, fp32",
        model=kind,
        questions=len(said[2]),
        different_texts=len(set(said[2])),
        other_answers=differing[0],
        other_answers_alone=differing[1],
    )
    findings.require(not any(differing), f"{kind}: {differing} answers are not the CPU's")


def _export(findings: Findings, kind: str, form: str) -> None:
    folder = findings.folder / form
    words = ["export", str(_run(findings, "fp32")), "--output", str(folder), "--format", form, "--proof-samples", "4"]
    seconds, _ = vltrain(words, findings.folder / "export.log")
    proof = json.loads((folder / "proof.json").read_text())
    findings.row(
        "exports of a run that was trained here",
        model=kind,
        format=form,
        proven=proof["proven"],
        max_relative_error=proof["max_relative_error"],
        seconds=seconds,
    )
    findings.require(proof["proven"] is True, f"{kind}, {form}: unproven")


if __name__ == "__main__":
    chosen = EMULATED if "--emulate" in sys.argv else tuple(MODELS)
    sys.exit(run_items("stock_runs", chosen, find, __doc__))

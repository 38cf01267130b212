"""The proof of an exported folder: a clean process reads it by stock libraries alone and says what the run's own model
says to real samples.

    bound of the logits, relative to the largest of the run's own (fp32): 1e-5 in fp32, 1e-2 in fp16, 5e-2 in bf16
    answers equal; in fp16 and bf16 an answer may differ where the run's two best tokens are nearer to each other than
    twice the error found

A folder that fails is not left behind. What was measured is kept in proof.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vltrain.errors import InputError
from vltrain.export import clean_process
from vltrain.export.format import Choices, Proof, Source
from vltrain.export.reference import MOST_NEW_TOKENS, ProofData, Spoken, spoken
from vltrain.files.atomic import write_json
from vltrain.files.strict_json import read_object
from vltrain.schema import Sample

PROOF = "proof.json"
BOUNDS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
OURS = ("vltrain", "data_prep", "launch", "ds_configs")
REPORTED = 12  # lines of a clean process that failed


class ProofFailed(InputError):
    """The folder does not compute what the run does, or cannot be read."""


def prove(folder: Path, proof: Proof, source: Source, choices: Choices, data: ProofData) -> dict[str, Any]:
    """Writes proof.json into the folder, and returns it. Raises ProofFailed as `measure`."""
    facts = measure(folder, proof, source, choices, data)
    write_json(folder / PROOF, facts)
    return facts


def measure(folder: Path, proof: Proof, source: Source, choices: Choices, data: ProofData) -> dict[str, Any]:
    """What proof.json says of a folder. Raises ProofFailed where what the clean process computes is not what the run's
    model does, or it fails."""
    with tempfile.TemporaryDirectory(prefix="vltrain-proof-") as name:
        job = Path(name)
        base = None if proof.base is None else proof.base(source, job)
        expected = list(spoken(source.config, source.weights, source.tokenizer, data))
        _write_job(job, folder, proof, source, base, data, expected)
        result = _run(job, proof.is_ours)
        logits = load_file(job / "logits.safetensors")
    if result["loaded"] and not proof.is_ours:
        raise AssertionError(f"the clean process has loaded {result['loaded']}")
    cases = [
        _compare(
            sample, one, logits[str(number)], result["answers"][number], BOUNDS[choices.dtype], choices.dtype == "fp32"
        )
        for number, (sample, one) in enumerate(zip(data.samples, expected, strict=True))
    ]
    return {
        "proven": True,
        "read_by": "vltrain in another process" if proof.is_ours else "stock libraries; vltrain could not be imported",
        "versions": result["versions"],
        "dtype": choices.dtype,
        "bound_of_relative_error": BOUNDS[choices.dtype],
        "max_abs_error": max(case["max_abs_error"] for case in cases),
        "max_relative_error": max(case["max_relative_error"] for case in cases),
        "answers_equal": sum(case["equal"] for case in cases),
        "samples_file": str(data.file),
        "samples": cases,
    }


def write_unproven(folder: Path) -> None:
    """Says in the folder that nobody has tried it."""
    write_json(folder / PROOF, {"proven": False, "why": "exported with --proof none"})


def _write_job(
    job: Path, folder: Path, proof: Proof, source: Source, base: str | None, data: ProofData, expected: list[Spoken]
) -> None:
    cases, tensors = [], {}
    for number, (sample, one) in enumerate(zip(data.samples, expected, strict=True)):
        images = [str((data.file.parent / name).resolve()) for name in sample.images]
        most = min(data.max_new_tokens, MOST_NEW_TOKENS)
        cases.append(
            {
                "id": sample.id,
                "images": images,
                "question": proof.question(sample),
                "max_new_tokens": most,
                "draft": one.draft if proof.drafts else None,
            }
        )
        tensors |= {f"{number}.{name}": value for name, value in one.tensors().items()}
    save_file(tensors, job / "cases.safetensors")
    told = {
        "folder": str(folder.resolve()),
        "base": base,
        "run": str(source.run.resolve()),
        "blocked": [] if proof.is_ours else list(OURS),
        "load": proof.load,
        "ask": proof.ask,
        "logits": proof.logits,
        "cases": cases,
    }
    (job / "job.json").write_text(json.dumps(told), encoding="utf-8")


def _run(job: Path, is_ours: bool) -> dict[str, Any]:
    """The clean process. What it might fetch it may not; code of the folder is kept in the job's own cache."""
    settings = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(job / "modules"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if is_ours:  # the very one that exports, wherever it was imported from
        settings["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[2]), settings.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep)
    command = [sys.executable, "-P", clean_process.__file__, str(job)]
    # Relative paths of a recipe are seen from here; the others need none.
    done = subprocess.run(
        command, env=settings, cwd=None if is_ours else job, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-REPORTED:]
        raise ProofFailed(
            f"proof: a clean process could not read the exported folder (exit code {done.returncode}): "
            f"{' | '.join(lines)}"
        )
    return read_object(job / "answers.json")


def _compare(
    sample: Sample, ours: Spoken, found: Tensor, answer: dict[str, Any], bound: float, is_exact: bool
) -> dict[str, Any]:
    """What was found for a sample. Raises ProofFailed where it is not what the run says."""
    where = f"proof: sample '{sample.id}'"
    steps, vocabulary = ours.logits.shape
    if found.ndim != 2 or found.shape[0] < steps or found.shape[1] < vocabulary:
        raise ProofFailed(
            f"{where}: the exported folder gives logits {list(found.shape)}, the run {list(ours.logits.shape)}"
        )
    found = found[:steps, :vocabulary]
    error, largest = float((found - ours.logits).abs().max()), float(ours.logits.abs().max())
    relative = error / max(largest, 1e-30)
    if not relative <= bound:  # also of NaN
        raise ProofFailed(
            f"{where}: the exported folder does not compute what the run does: its logits are off by "
            f"{error:.3g} of {largest:.3g} ({relative:.2g} relative, "
            f"allowed {bound:g})"
        )
    text, equal = _answered(ours, found, answer)
    if not equal and (is_exact or not _is_near_tie(ours, error)):
        raise ProofFailed(f"{where}: the exported folder answers {text!r:.80}, the run {ours.text!r:.80}")
    return {
        "id": sample.id,
        "expected": ours.text,
        "answer": text,
        "equal": equal,
        "tokens": steps,
        "max_abs_error": error,
        "max_relative_error": relative,
    }


def _answered(ours: Spoken, found: Tensor, answer: dict[str, Any]) -> tuple[str, bool]:
    """(the folder's answer, whether it is the run's): token by token where the tokens are known, since texts of broken
    characters are decoded in several ways."""
    text, tokens, known = answer["text"], answer["tokens"], ours.ids.tolist()
    if text is None:  # greedily, which is how the run answered, the tokens are those of the largest logits
        same = torch.equal(found.argmax(-1), ours.logits.argmax(-1))
        return (ours.text, True) if same else ("(other tokens)", False)
    if tokens is None:
        return text, text == ours.text
    return text, tokens[: len(known)] == known and len(tokens) in (len(known), len(ours.logits))


def _is_near_tie(ours: Spoken, error: float) -> bool:
    """Whether at some token of the answer the second best is as near to the best as the error reaches."""
    best = torch.topk(ours.logits, 2, dim=-1).values
    return bool(((best[:, 0] - best[:, 1]) <= 2 * error).any())

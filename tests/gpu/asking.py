"""The quickstart's run asked on this device, from Python and by `vltrain ask`: in 16, 8 and 4 bits, streamed, of
several images, beside a CPU in fp32."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.part import Findings, run_part
from tests.gpu.runs import tuned_run, vltrain
from vltrain.inference import load
from vltrain.inference.model import LoadedModel
from vltrain.schema import Sample

QUESTIONS, STREAMED, EMULATED = 1000, 40, 60
BITS = {None: 0.01, 16: 0.01, 8: 0.02, 4: 0.05}  # how much of the CPU's accuracy they may lose
LOSS_LIMITS = {None: 0.02, 16: 0.02, 8: 0.02, 4: 0.1}  # how far the mean loss may be from the CPU's
TWO_IMAGES = "<image>\n<image>\nQuestion: what is the red shape?\nAnswer:"


@dataclass(frozen=True)
class Expected:
    """What the CPU says to the samples, in fp32."""

    answers: list[str]
    accuracy: float
    loss: float
    two_images: str


def find(findings: Findings) -> None:
    run = tuned_run(findings)
    on_cpu = load(run, bits=32, device="cpu")
    folder = Path(on_cpu.config.data.root) / "samples"
    lines = (folder / "test.jsonl").read_text().splitlines()[: EMULATED if findings.emulate else QUESTIONS]
    samples = [Sample.from_json(json.loads(line), "") for line in lines]
    answers = _answers(on_cpu, samples, folder)
    two = [folder / samples[0].images[0], folder / samples[-1].images[0]]
    expected = Expected(
        answers, _accuracy(answers, samples), _loss(on_cpu, samples, folder), on_cpu.ask(two, TWO_IMAGES).text
    )
    for bits in BITS:
        findings.attempt(f"{bits} bits", lambda: _ask(findings, run, bits, samples, folder, expected))


def _answers(model: LoadedModel, samples: list[Sample], folder: Path) -> list[str]:
    return list(
        model.answer_all([(one.turns[:-1], [folder / name for name in one.images]) for one in samples], batch_size=64)
    )


def _accuracy(answers: list[str], samples: list[Sample]) -> float:
    return sum(answer == one.turns[-1].text for answer, one in zip(answers, samples, strict=True)) / len(samples)


def _loss(model: LoadedModel, samples: list[Sample], folder: Path) -> float:
    losses = model.loss(samples[:STREAMED], folder=folder)
    return sum(losses) / len(losses)


def _ask(findings: Findings, run: Path, bits: Any, samples: list[Sample], folder: Path, expected: Expected) -> None:
    model = load(run, bits=bits, device=findings.device)
    answers = _answers(model, samples, folder)
    alone, streamed, logprobs = [], [], []
    for one in samples[:STREAMED]:
        images = [folder / name for name in one.images]
        with model.stream(one.turns[:-1], images) as stream:
            streamed.append("".join(stream))
        answer = model.chat(one.turns[:-1], images)
        alone.append(answer.text)
        logprobs += answer.logprobs
    first = samples[0]
    words = [
        "ask",
        str(run),
        "--image",
        str(folder / first.images[0]),
        first.turns[0].text,
        "--json",
        *(["--bits", str(bits)] if bits else []),
    ]
    seconds, told = vltrain([*words, "--device", str(findings.device)], findings.folder / "ask.log")
    asked = json.loads(told)
    two = [folder / first.images[0], folder / samples[-1].images[0]]
    accuracy, loss = _accuracy(answers, samples), _loss(model, samples, folder)
    findings.row(
        "asked, beside a CPU in fp32",
        bits=str(bits or "the recipe's"),
        products=str(model.dtype).removeprefix("torch."),
        questions=len(samples),
        accuracy=accuracy,
        cpu_accuracy=expected.mean,
        other_than_cpu=sum(map(str.__ne__, answers, expected.answers)),
        other_alone_than_in_batches=sum(map(str.__ne__, alone, answers)),
        loss=loss,
        cpu_loss=expected.loss,
        two_images=model.ask(two, TWO_IMAGES).text,
        cpu_two_images=expected.two_images,
        command=asked["text"],
        command_seconds=seconds,
    )
    findings.require(
        streamed == alone, f"{bits} bits: the pieces of an answer do not join to it: {streamed[:3]}, {alone[:3]}"
    )
    findings.require(
        asked["text"] == alone[0], f"{bits} bits: `vltrain ask` says {asked['text']!r}, from Python {alone[0]!r}"
    )
    findings.require(all(one <= 0 for one in logprobs), f"{bits} bits: a log-probability above zero, or NaN")
    findings.require(
        accuracy >= expected.mean - BITS[bits] - findings.emulate,
        f"{bits} bits: accuracy {accuracy}, the CPU's {expected.mean}",
    )
    findings.require(
        abs(loss - expected.loss) <= LOSS_LIMITS[bits], f"{bits} bits: loss {loss}, the CPU's {expected.loss}"
    )


if __name__ == "__main__":
    sys.exit(run_part("asking", find, __doc__))

"""`vltrain evaluate` on this device: in the training's precision and in fp32, one question at a time and 64, beside
each other."""

from __future__ import annotations

import sys

from tests.gpu.part import Findings, run_part
from tests.gpu.runs import metrics, predictions, tuned_run, vltrain

QUESTIONS, EMULATED = 600, 40
BATCHES = (64, 1, 256)


def find(findings: Findings) -> None:
    run = tuned_run(findings)
    number = EMULATED if findings.emulate else QUESTIONS
    for precision in ("fp32", "train"):
        said: dict[int, list[str]] = {}
        for batch_size in BATCHES:
            words = [
                "evaluate",
                str(run),
                "--eval.max_samples",
                str(number),
                "--eval.precision",
                precision,
                "--eval.batch_size",
                str(batch_size),
            ]
            seconds, _ = vltrain(words, findings.folder / "evaluate.log")
            said[batch_size] = predictions(run)
            others = sum(map(str.__ne__, said[batch_size], said[BATCHES[0]]))
            findings.row(
                "vltrain evaluate",
                precision=precision,
                batch_size=batch_size,
                questions=len(said[batch_size]),
                accuracy=metrics(run)["accuracy"],
                other_answers_than_in_batches_of_64=others,
                seconds_with_start=seconds,
            )
            findings.require(
                precision != "fp32" or not others, f"in fp32 {others} answers depend on the batch's size, {batch_size}"
            )


if __name__ == "__main__":
    sys.exit(run_part("evaluating", find, __doc__))

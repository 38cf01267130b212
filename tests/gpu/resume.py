"""kill -9 and `--resume auto` on this device: losses, receipt, weights and optimizer states of a run that nobody
killed, bit for bit."""

from __future__ import annotations

import json
import sys

import torch

from tests.gpu.part import Findings, run_items
from tests.gpu.runs import final_tensors, finish, kill_after, losses

STEPS, KILLS = 40, (9, 23)
STAGES = {"zero0": 0, "zero2": 2, "zero3": 3}


def find(findings: Findings, item: str) -> None:
    folder, stage = findings.folder, STAGES[item]
    ds = folder / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    words = [
        "--ds",
        str(ds),
        "--train.max_steps",
        str(STEPS),
        "--train.save_every_steps",
        "5",
        "--train.eval_every_steps",
        "0",
        "--eval.max_samples",
        "8",
    ]
    whole, broken = folder / "whole", folder / "broken"
    finish([*words, "--output", str(whole)], folder / "whole.log")
    killed = [kill_after([*words, "--output", str(broken)], folder / "broken.log", broken, step) for step in KILLS]
    finish([*words, "--output", str(broken)], folder / "broken.log")
    expected, found = final_tensors(whole), final_tensors(broken)
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    same_receipt = (whole / "receipt.jsonl").read_bytes() == (broken / "receipt.jsonl").read_bytes()
    same_losses = losses(whole) == losses(broken) and len(losses(whole)) == STEPS
    told = {"model": "quickstart", "stage": stage, "steps": STEPS, "killed_after": str(killed)}
    findings.row(
        "kill -9 and resume",
        **told,
        losses_equal=same_losses,
        receipts_equal=same_receipt,
        tensors=len(expected),
        tensors_that_differ=len(differing),
    )
    findings.require(
        same_losses and same_receipt and not differing,
        f"ZeRO {stage}: the resumed run is another: {differing[:3]}, receipts {same_receipt}",
    )


if __name__ == "__main__":
    sys.exit(run_items("resume", tuple(STAGES), find, __doc__))

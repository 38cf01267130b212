"""`vltrain export` and `vltrain check export` of a run that was trained on this device, in every format of its
architecture: each proves itself."""

from __future__ import annotations

import json
import sys

from tests.gpu.part import Findings, run_part
from tests.gpu.runs import tuned_run, vltrain

FORMATS = (("mmt", "fp32"), ("lora", "fp32"), ("merged", "fp32"), ("adapters", "fp32"), ("mmt", "bf16"))


def find(findings: Findings) -> None:
    run = tuned_run(findings)
    for form, dtype in FORMATS[:1] if findings.emulate else FORMATS:
        findings.attempt(f"{form} in {dtype}", lambda: _export(findings, run, form, dtype))


def _export(findings: Findings, run, form: str, dtype: str) -> None:
    folder, log = findings.folder / f"{form}-{dtype}", findings.folder / "export.log"
    words = ["--format", form, *(["--dtype", dtype] if dtype != "fp32" else [])]
    seconds, _ = vltrain(["export", str(run), "--output", str(folder), *words], log)
    proof = json.loads((folder / "proof.json").read_text())
    checked, _ = vltrain(["check", "export", str(folder)], log)
    findings.row(
        "exports",
        format=form,
        dtype=dtype,
        read_by=proof["read_by"],
        answers_equal=f"{proof['answers_equal']} of {len(proof['samples'])}",
        max_relative_error=proof["max_relative_error"],
        bound=proof["bound_of_relative_error"],
        export_seconds=seconds,
        check_seconds=checked,
    )
    findings.require(proof["proven"] is True, f"{form} in {dtype}: unproven")


if __name__ == "__main__":
    sys.exit(run_part("exporting", find, __doc__))

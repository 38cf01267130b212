"""What an InstructBLIP is exported as proves itself: peft's folder on its base, the whole network, and the adapters
alone."""

import json

import pytest

from tests.support.export_run import blip_run
from vltrain.export.proof import PROOF
from vltrain.programs.export import export

RUNS = {
    "llama": ("llama", {"qformer__mode": "lora", "llm__mode": "lora"}),
    "t5": ("t5", {"qformer__mode": "lora", "llm__mode": "lora"}),
    "llama, adalora": ("llama", {"qformer__mode": "adalora", "llm__mode": "adalora"}),
    "t5, full": ("t5", {"qformer__mode": "full", "llm__mode": "lora"}),
    "llama, 4 bits": ("llama", {"qformer__mode": "lora", "llm__mode": "lora", "model__bits": 4}),
    "t5, 16 bits": (
        "t5",
        {"qformer__mode": "lora", "llm__mode": "lora", "model__bits": 16, "train__precision": "bf16"},
    ),
}


@pytest.mark.parametrize("form", ["peft", "whole", "adapters"])
@pytest.mark.parametrize("kind", RUNS)
def test_each_format_says_what_the_run_says(kind, form, tmp_path, here):
    llm, changes = RUNS[kind]
    export(blip_run(tmp_path, llm, **changes), tmp_path / "out", form)
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    assert (
        proof["proven"] and proof["answers_equal"] == len(proof["samples"]) >= 2 and proof["max_relative_error"] < 1e-5
    )

"""A run of a vision-language model of transformers, whose own processor reads pictures of many sizes, that is killed
and resumed ends bit for bit as one that was not. Real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks, start_ranks
from tests.support.stock_world import stock_recipe
from tests.train.test_resume import kill_when_logged
from tests.train.zero.test_equivalence import stage
from vltrain.config.command_line import load_settings
from vltrain.data.reading import recipe_tokenizer, sample_encoder
from vltrain.models.build import outline_model
from vltrain.prepared.ensure_data import ensure_packs, packed_folder
from vltrain.receipts.verify import prove


def packed(recipe: Path) -> str:
    """The folder of the recipe's packs, which are made here."""
    config = load_settings(["--recipe", str(recipe)], program="test").config
    encoder = sample_encoder(config, recipe_tokenizer(config), outline_model(config.model))
    folder = packed_folder(config, encoder)
    ensure_packs(config, folder, encoder)
    return str(folder)


@pytest.mark.slow  # mmt's is not, and its way is this one's
@pytest.mark.parametrize(("kind", "number"), [("smolvlm", 3), ("qwen3_vl", 2), ("llava", 3)])
def test_kill_9_and_resume_is_bit_identical(kind: str, number: int, tmp_path: Path) -> None:
    model = {"projector": {"train": True}, "vision": {"peft": {"kind": "lora", "dropout": 0.1}}}
    recipe = stock_recipe(kind, tmp_path, model, adapter={"vision": "none", "dim": 8, "dropout": 0.1})
    packs = packed(recipe)

    def told(output: str, resume: bool) -> str:
        one = {
            "name": output, "packs": packs, "output": str(tmp_path / output), "ds": stage(number),
            "recipe": str(recipe), "changes": {"data__workers": 1, "train__packs_per_step": 3}, "resume": resume,
        }  # fmt: skip
        file = tmp_path / f"{output}-{resume}.json"
        file.write_text(json.dumps([one]))
        return str(file)

    run_ranks("tests.train.worker", [told("whole", False)], 2, tmp_path / "log-whole")
    processes = start_ranks("tests.train.worker", [told("broken", True)], 2, tmp_path / "log-killed")
    kill_when_logged(processes, tmp_path / "broken" / "log.jsonl", 7, delay=0.1)
    assert not (tmp_path / "broken" / "result.safetensors").exists(), "it had ended before it was killed"
    run_ranks("tests.train.worker", [told("broken", True)], 2, tmp_path / "log-last")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert (broken / "receipt.jsonl").read_bytes() == (whole / "receipt.jsonl").read_bytes()
    assert prove(broken, None, whole).failures == []
    expected, found = load_file(whole / "result.safetensors"), load_file(broken / "result.safetensors")
    differing = [
        name for name in expected if not name.startswith("gradient/") and not torch.equal(expected[name], found[name])
    ]
    assert differing == [] and expected["losses"][-1] < expected["losses"][0]

"""Vision-language models of transformers: the same losses, gradients and weights however the work is spread, over 12
steps of mixed images and text; compared with a plain loop in one process that feeds one sample at a time."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_ranks
from tests.support.stock import section
from tests.train.plain_loop import relative_difference
from tests.train.zero.plain_stock_loop import plain_loop
from tests.train.zero.stock_worker import OPTIM
from tests.train.zero.test_equivalence import TOLERANCE, stage
from vltrain.models.build import build_model
from vltrain.train.optim import parameter_groups

GRADIENT_TOLERANCE = 1e-4  # of the largest, or of a thousandth of the model's: small ones carry the rounding of all
ADAPTERS = {"adapter.vision": "both", "adapter.llm": "both", "adapter.dim": 8, "stock.projector.train": True}
UPDATES = {"adapter.vision": "none", "adapter.llm": "none", "stock.vision.peft.kind": "lora"}
KINDS: dict[str, dict[str, Any]] = {
    "llava": {"stock.tune": "full", "adapter.vision": "none", "adapter.llm": "none"},
    "smolvlm": {**UPDATES, "stock.llm.peft.kind": "dora", "stock.projector.train": True},
    "qwen3_vl": ADAPTERS,
}


def plain_run(family: str, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = build_model(section(family, changes))
    core = model.parts.core
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), OPTIM, model.part_of), betas=OPTIM.betas, eps=OPTIM.eps
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return plain_loop(family, core, trained, optimizer, lambda row: model(row).loss_sum)


@functools.cache
def reference(family: str) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    found = plain_run(family, KINDS[family])
    assert found["losses"][-4:].mean() < found["losses"][:4].mean(), "it does not learn"
    assert all(value.any() for name, value in found.items() if name.startswith("gradient/")), "not all is reached"
    return found


def assert_same_as_plain(families: list[str], stages: tuple[int, ...], world_size: int, folder: Path) -> None:
    told = [
        {
            "family": family,
            "changes": KINDS[family],
            "ds": stage(number),
            "output": str(folder / f"{family}-{number}"),
            "checkpointing": number == 3,
        }
        for family in families for number in stages
    ]  # fmt: skip
    file = folder / "scenarios.json"
    file.write_text(json.dumps(told))
    run_ranks("tests.train.zero.stock_worker", [str(file)], world_size, folder / "log")
    for one in told:
        found, expected = load_file(f"{one['output']}.safetensors"), reference(one["family"])
        what = f"{Path(one['output']).name} on {world_size} rank(s)"
        assert found.keys() == expected.keys(), what
        assert relative_difference(found["losses"], expected["losses"]) <= TOLERANCE, what
        gradients = {name: value for name, value in expected.items() if name.startswith("gradient/")}
        least = max(value.abs().max().item() for value in gradients.values()) / 1000
        worst = {name: relative_difference(found[name], value, least) for name, value in gradients.items()}
        bad = {name: value for name, value in worst.items() if not value <= GRADIENT_TOLERANCE}
        assert not bad, f"{what}: {bad}"


def test_two_ranks_under_zero3_give_the_plain_loops_losses_and_gradients(tmp_path: Path) -> None:
    assert_same_as_plain(["qwen3_vl"], (3,), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("family", KINDS)
def test_every_stage_and_number_of_ranks_gives_the_plain_loops_losses_and_gradients(
    family: str, world_size: int, tmp_path: Path
) -> None:
    """Slow, since each is a run of twelve steps: a minute in all."""
    assert_same_as_plain([family], (0, 1, 2, 3), world_size, tmp_path)

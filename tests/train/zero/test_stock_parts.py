"""Parts of a stock model that are tuned themselves at rates of their own, others frozen, the head trained with its
softcap or with the embeddings that share its weight: at every ZeRO stage the losses, gradients and weights of a plain
loop over single samples by transformers' own forward, under a plain AdamW whose groups are written out here."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_stock import alone, plain_of
from tests.support.processes import run_ranks
from tests.support.stock import CONFIGS, section
from tests.train.plain_loop import relative_difference
from tests.train.zero.plain_stock_loop import plain_loop
from tests.train.zero.test_equivalence import GRADIENT_TOLERANCE, TOLERANCE, stage
from vltrain.models.build import build_model

WEIGHT_TOLERANCE = 1e-4  # after steps of AdamW: a gradient that is all but zero makes whole ones
NO_ADAPTERS = {"adapter.vision": "none", "adapter.llm": "none"}
CAPPED = {
    **CONFIGS["paligemma2"],
    "text_config": {**CONFIGS["paligemma2"]["text_config"], "final_logit_softcapping": 0.5},
}
TIED = {**CONFIGS["qwen3_vl"], "tie_word_embeddings": True}
RATES = {"vision_lr": 1e-3, "projector_lr": 1e-2, "llm_lr": 3e-3}
# What is tuned, and the rates by the beginnings of transformers' names, of which the first that fits counts. Nothing
# reads what a SigLIP pools.
KINDS: dict[str, tuple[dict[str, Any], dict[str, float | None]]] = {
    "paligemma2": (
        {**NO_ADAPTERS, "stock.config": CAPPED, "stock.tune": "full"},
        {
            "model.vision_tower.head.": None,
            "model.vision_tower.": 1e-3,
            "model.multi_modal_projector.": 1e-2,
            "model.language_model.": 3e-3,
        },
    ),
    "qwen3_vl": (
        {**NO_ADAPTERS, "stock.config": TIED, "stock.llm.train": True, "stock.projector.train": True},
        {
            "model.visual.merger.": 1e-2,
            "model.visual.deepstack_merger_list.": 1e-2,
            "model.visual.": None,
            "model.language_model.": 3e-3,
        },
    ),
}


def plain_run(family: str) -> dict[str, torch.Tensor]:
    changes, rates = KINDS[family]
    model = build_model(section(family, changes))
    assert model.llm.lm_head.weight is model.network.get_input_embeddings().weight, "tied"
    core, plain = model.parts.core, plain_of(model).train()
    groups: list[dict[str, Any]] = []
    for name, parameter in plain.named_parameters():
        rate = next(rate for start, rate in rates.items() if name.startswith(start))
        parameter.requires_grad_(rate is not None)
        if rate is not None:
            groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.02 if parameter.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    trained = {f"network.{name}": one for name, one in plain.named_parameters() if one.requires_grad}
    return plain_loop(family, core, trained, optimizer, lambda row: alone(family, plain, row))


@functools.cache
def reference(family: str) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    found = plain_run(family)
    assert found["losses"][-4:].mean() < 0.9 * found["losses"][:4].mean(), "it does not learn"
    return found


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> float:
    """The norm of all differences of a kind of entries, as a share of the norm of all."""
    names = [name for name in expected if name.startswith(kind)]
    squares = [((found[name] - expected[name]).double().square().sum(), expected[name].double().square().sum())
               for name in names]  # fmt: skip
    return float((sum(one for one, _ in squares) / sum(whole for _, whole in squares)) ** 0.5)


def assert_same_as_transformers(families: list[str], stages: tuple[int, ...], world_size: int, folder: Path) -> None:
    told = [
        {
            "family": family,
            "changes": KINDS[family][0],
            "optim": RATES,
            "ds": stage(number),
            "output": str(folder / f"{family}-{number}"),
        }
        for family in families for number in stages
    ]  # fmt: skip
    (folder / "scenarios.json").write_text(json.dumps(told))
    run_ranks("tests.train.zero.stock_worker", [str(folder / "scenarios.json")], world_size, folder / "log")
    for one in told:
        found, expected = load_file(f"{one['output']}.safetensors"), reference(one["family"])
        what = f"{Path(one['output']).name} on {world_size} rank(s)"
        assert found.keys() == expected.keys(), what
        assert relative_difference(found["losses"], expected["losses"]) <= TOLERANCE, what
        assert off(found, expected, "gradient/") <= GRADIENT_TOLERANCE, what
        assert off(found, expected, "weight/") <= WEIGHT_TOLERANCE, what


def test_two_ranks_under_zero3_compute_what_transformers_and_a_plain_adamw_do(tmp_path: Path) -> None:
    assert_same_as_transformers(["paligemma2"], (3,), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_computes_what_transformers_and_a_plain_adamw_do(world_size: int, tmp_path: Path) -> None:
    """Slow, since each is a run of twelve steps."""
    assert_same_as_transformers(list(KINDS), (0, 1, 2, 3), world_size, tmp_path)

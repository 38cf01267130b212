"""The runs whose losses are kept, and how they are made: ten steps each by the real trainer, in one process of its
own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.support.blip import make_tokenizers, segments_of
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.models.adapters.table import ADAPTERS

KEPT = Path(__file__).with_name("losses.json")
STEPS = 10
COMMON = {"train__max_steps": STEPS, "train__epochs": 50.0, "train__packs_per_step": 2, "train__log_every_steps": 1}
BOTH = {"model__adapter__vision": "both", "model__adapter__llm": "both"}
NONE = {"model__adapter__vision": "none", "model__adapter__llm": "none"}
ADALORA = {"init_rank": 4, "target_rank": 2, "tinit": 2, "tfinal": 2, "delta_t": 2}
MORE = {
    "repadapter": {"model__adapter__scale": 0.5},
    "loha_silu": {"model__adapter__dim": 16},
    "loha_weighted": {"model__adapter__dim": 16},
}

MMT: dict[str, dict[str, Any]] = {
    **{
        kind: {
            "model__adapter__kind": kind,
            **BOTH,
            **MORE.get(kind, {}),
            **({"model__adapter__rank": 2} if kind.startswith("loha") else {}),
        }
        for kind in ADAPTERS
    },
    "bottleneck without biases": {**BOTH, "model__adapter__bias": False},
    "linear neck": {"model__neck__kind": "linear"},
    "lora": {**NONE, "model__llm__peft__kind": "lora", "model__llm__peft__targets": ["q_proj", "down_proj"]},
    "adaption_prompt": {**NONE, "model__llm__peft__kind": "adaption_prompt"},
    "full": {**NONE, "model__tune": "full"},
    "checkpointing": {**BOTH, "train__activation_checkpointing": True},
}
BLIP: dict[str, dict[str, Any]] = {
    "lora": {"qformer__mode": "lora", "llm__mode": "lora"},
    "adalora": {
        "qformer__mode": "adalora",
        "llm__mode": "adalora",
        **{f"adalora__{name}": value for name, value in ADALORA.items()},
    },
    "full": {"vision": "full", "qformer__mode": "full", "llm__mode": "full"},
}


def scenarios(folder: Path) -> list[dict[str, Any]]:
    """The runs, as tests.train.worker takes them, with their packs written."""
    packs = write_packs(folder / "packs", make_segments(8))
    told = [
        {"name": f"mmt, {name}", "packs": str(packs), "changes": {**COMMON, **changes}} for name, changes in MMT.items()
    ]
    places = make_tokenizers(folder / "tokenizers")
    for kind in ("llama", "t5"):
        segments = segments_of(kind, places, 16)
        packs = write_packs(folder / f"packs_{kind}", [segments[first : first + 2] for first in range(0, 16, 2)])
        told += [
            {
                "name": f"instructblip with {kind}, {name}",
                "blip": kind,
                "packs": str(packs),
                "changes": {**COMMON, **changes},
            }
            for name, changes in BLIP.items()
        ]
    return [
        {**one, "ds": {"zero_optimization": {"stage": 0}}, "output": str(folder / one["name"].replace(" ", "_"))}
        for one in told
    ]


def losses_now(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms of each step, by run."""
    told = scenarios(folder)
    file = folder / "scenarios.json"
    file.write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(file)], 1, folder / "log")
    found = {one["name"]: load_file(Path(one["output"]) / "result.safetensors") for one in told}
    return {name: {key: result[key].tolist() for key in ("losses", "grad_norms")} for name, result in found.items()}


def kept() -> dict[str, dict[str, list[float]]]:
    return json.loads(KEPT.read_text())


def difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """The largest of a run's, as a share of the value."""
    pairs = [pair for key, values in expected.items() for pair in zip(found[key], values, strict=True)]
    return max(abs(one - other) / max(abs(other), 1e-6) for one, other in pairs)

"""A recipe of a tiny vision-language model of transformers, with its processor, samples with pictures of many sizes,
and packs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tests.support.processors import config_of, make_processor

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200)}


def stock_recipe(kind: str, folder: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """Writes processor, samples and recipe. `model`: its section `stock`, without config and processor; `sections`:
    those of the recipe, and `adapter`."""
    make_processor(kind, folder / "processor")
    draw = random.Random(0)
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                file.write(json.dumps(_sample(folder, split, number, draw)) + "\n")
    stock = {"config": config_of(kind), "processor": str(folder / "processor"), **model}
    settings: dict[str, Any] = {
        "model": {"architecture": "stock", "stock": stock, "adapter": sections.pop("adapter", {"dim": 8})},
        "data": {
            "source": "samples", "template": "processor", "input": str(folder), "root": str(folder / "data"),
            "pack_length": 256, "workers": 0,
            **sections.pop("data", {}),
        },
        "train": {
            "precision": "fp32", "epochs": 40, "max_steps": 12, "save_every_steps": 3, "log_every_steps": 1,
            **sections.pop("train", {}),
        },
        "optim": {"lr": 0.01},
        "output": str(folder / "run"),
        **sections,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _sample(folder: Path, split: str, number: int, draw: random.Random) -> dict[str, Any]:
    """Every fifth is of text alone, every seventh shows two pictures."""
    colour = list(COLOURS)[number % 2]
    picture = f"{split}-{number}.png"
    Image.new("RGB", (draw.choice((32, 48, 64)), draw.choice((32, 40, 64))), COLOURS[colour]).save(folder / picture)
    shown = [] if number % 5 == 4 else [picture]
    shown += [f"{split}-{number - 1}.png"] if number % 7 == 3 else []
    question = "<image>" * len(shown) + ("what colour?" if shown else f"say {colour}")
    return {
        "id": f"{split}{number}",
        "images": shown,
        "turns": [{"role": "user", "text": question}, {"role": "assistant", "text": colour}],
        "metadata": {"candidates": list(COLOURS), "answer": number % 2},
    }

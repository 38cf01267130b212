"""Whole forwards of recipes under CUDA's own autocast, on tensors without memory: bf16 products, none of several dtypes
or devices.

Needs torch's CUDA build (4.7 GB, no driver): `bash tests/fake_cuda.sh` makes an environment beside .venv for it and
runs what is marked `fake_cuda`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vltrain.config.recipe import build_config, read_recipe
from vltrain.data.loader import batch_of
from vltrain.data.pictures import SquareReader
from vltrain.models.build import build_model
from vltrain.models.instructblip.model import InstructBlip
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Segment

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PLAIN = {"model.adapter.impl": "torch"}  # the kernel's products are its own
SMOLLM2 = {  # random weights of its size
    "model.llm.source": None,
    "model.llm.config": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "model.llm.tokenizer": "none",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("quickstart", PLAIN),
    "smollm2_easyvqa": ("smollm2_easyvqa", {**PLAIN, **SMOLLM2}),
    "qformer_shapes": ("qformer_shapes", {}),
    "router": ("quickstart", {"model.adapter.kind": "router"}),
    "lora": ("quickstart", {**PLAIN, "model.llm.peft.kind": "lora", "model.adapter.llm": "none"}),
}


def some_batch(model):
    """Six questions, of different lengths, about three images; one has none."""
    draw, size, segments = np.random.default_rng(0), model.image_size, []
    for number in range(6):
        shown = () if number == 5 else (f"{number % 3}.png",)
        head = [IMAGE_TOKEN] * (model.visual_tokens * len(shown))
        if not isinstance(model, InstructBlip):
            head = [IMAGE_MODALITY_TOKEN if shown else TEXT_MODALITY_TOKEN, *head]
        ids = np.array([*head, *draw.integers(3, 60, 40 + 8 * number)], np.int32)
        mask = np.zeros(len(ids), bool)
        mask[-7:] = True
        asked = np.array([4, 5, 6 + number], np.int32)
        segments.append(
            Segment(sample_id=str(number), input_ids=ids, loss_mask=mask, images=shown, instruction_ids=asked)
        )
    return batch_of(
        segments, {f"{number}.png": np.zeros((3, size, size), np.uint8) for number in range(3)}, SquareReader(size=size)
    )


@pytest.mark.fake_cuda
@pytest.mark.parametrize("name", CASES)
def test_a_recipes_forward_multiplies_in_bf16(name):
    if torch.version.cuda is None:
        pytest.skip("torch's CPU build; bash tests/fake_cuda.sh makes an environment with its CUDA build")
    from tests.support.fake_cuda import products_of_forward

    recipe, changes = CASES[name]
    config = build_config({**read_recipe(RECIPES / f"{recipe}.yaml"), **changes})
    model = build_model(config.model, dtype=torch.bfloat16, runs_on="cpu")
    products = products_of_forward(model, some_batch(model))
    assert not products.mixed
    assert products.by_dtype[torch.bfloat16] > 0 and products.fp32_share <= 0.01, products.wide.most_common(5)

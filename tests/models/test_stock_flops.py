"""The closed form of a stock model's images, at the sizes that they have, against torch's counter of what runs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.support.processors import config_of
from tests.support.stock import CONFIGS
from vltrain.data.flat.index import Index
from vltrain.data.plan import PackCost, Plan
from vltrain.models.stock.features import DEEP, POOLED, rows_of
from vltrain.models.stock.flops import count_flops
from vltrain.models.stock.parts import Parts, parts_of
from vltrain.schema import ImageSize

LOOSE = {"gemma3": 0.05, "llava_next": 0.05}
EDGE = 128  # of a square tower's picture: 16 x 16 patches


def parts(kind: str, *, trained: bool = False) -> Parts:
    values = config_of(kind) if kind not in CONFIGS else CONFIGS[kind]
    vision = dict(values["vision_config"])
    if "image_size" in vision:
        vision["image_size"] = [EDGE, EDGE] if kind == "internvl" else EDGE
    more: dict[str, Any] = {"mm_tokens_per_image": 64} if kind == "gemma3" else {}
    if kind.startswith("llava"):
        more["vision_feature_layer"] = -1
    if kind == "llava_next":
        more["image_grid_pinpoints"] = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE]]
    config = CONFIG_MAPPING[values["model_type"]].from_dict({**values, "vision_config": vision, **more})
    network = AutoModelForImageTextToText.from_config(config).requires_grad_(trained)
    return parts_of(network)


def qwen(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(rows * columns, 3 * 2 * 64),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def tiles(*shape: int, **sizes: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*shape, 3, EDGE, EDGE), **sizes}


def wide(height: int, width: int) -> Tensor:
    return torch.tensor([[height, width]])


PICTURES: dict[str, list[dict[str, Tensor]]] = {
    "qwen3_vl": [qwen(8, 8), qwen(24, 40)],
    "qwen2_5_vl": [qwen(8, 8), qwen(24, 40)],
    "smolvlm": [tiles(1, 1), tiles(1, 5)],
    "internvl": [tiles(1), tiles(4)],
    "llava_next": [
        tiles(1, 3, image_sizes=wide(EDGE, 2 * EDGE)), tiles(1, 5, image_sizes=wide(2 * EDGE, 2 * EDGE))
    ],
    "gemma3": [tiles(1), tiles(3)],
    "llava": [tiles(1), tiles(2)],
}  # fmt: skip


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", PICTURES)
def test_an_image_costs_what_torch_counts(kind: str, trained: bool) -> None:
    """Exactly, but for Gemma's projection, which is a bare weight, and the tokens that LLaVA-NeXT puts at each line's
    end, which no patch stands for."""
    found = parts(kind, trained=trained)
    flops = count_flops(found)
    for picture in PICTURES[kind]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = found.core.get_image_features(**picture, return_dict=True)
            features = [rows_of(one) for one in (output[POOLED], *(output.get(DEEP) or ()))]
            if trained:
                torch.stack([one.sum() for one in features]).sum().backward()
        one, tokens = np.ones(1), np.array([len(features[0])])
        images = float(flops.image.images(one, tokens, tokens**2)[0])
        expected = images * flops.per_image
        assert math.isclose(expected, counter.get_total_flops(), rel_tol=LOOSE.get(kind, 1e-9))


def test_what_no_layer_reads_costs_nothing() -> None:
    """LLaVA reads the last but one of its tower's two blocks."""
    values = config_of("llava")
    last = {**values, "vision_feature_layer": -1}
    read = [
        count_flops(parts_of(AutoModelForImageTextToText.from_config(CONFIG_MAPPING["llava"].from_dict(one))))
        for one in (values, last)
    ]
    assert 0.5 < read[0].per_image / read[1].per_image < 0.75


def test_ranks_are_evened_out_by_the_sizes_of_images() -> None:
    """Packs of one image each: two ranks get as many tokens of images, and steps say how many images of the nominal
    size they show."""
    tokens = np.array([100, 10, 60, 50])
    ones = np.ones(4, np.int32)
    index = Index(
        num_tokens=128 * ones,
        num_label_tokens=ones,
        num_images=ones,
        num_samples=ones,
        sum_squares=ones.astype(np.int64),
    )
    size = ImageSize(tokens=50, quadratic=0.25)
    plan = Plan(
        index, seed=0, epochs=1.0, packs_per_step=4, world_size=2,
        cost=PackCost(
            per_token=0.0, per_image=1.0, images=lambda some: size.images(ones[some], tokens[some], tokens[some] ** 2)
        ),
    )  # fmt: skip
    step = plan.step(0)
    assert step.packs.tolist() == [[0, 2], [1, 3]]
    expected = 0.75 * tokens.sum() / 50 + 0.25 * (tokens**2).sum() / 2500
    assert step.sized_images == pytest.approx(expected) and step.num_images == 4

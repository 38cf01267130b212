"""Low-rank updates in the vision tower (`model.vision.peft`): what they compute in towers of all families, which layers
have them, and what a step with them costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_backbones import PIXELS, SQUARE, all_vits, vit
from test_build import LLAMA_2_7B, VIT_L_336
from test_lora import assert_counted
from tiny_models import mixed_batch, randomise_adapters, tiny_config

from vltrain.config.model.mmt import (
    AdapterConfig,
    LLMConfig,
    MmtConfig,
    PeftConfig,
    TowerPeftConfig,
    VisionConfig,
)
from vltrain.errors import InputError
from vltrain.models.backbones.table import TOWERS
from vltrain.models.build import build_model, count_parameters
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.peft.lora import is_peft_parameter, outer_linears

NO_ADAPTERS = {"vision": "none", "llm": "none"}
# One kind in each family; every family's linear layers all updated.
KINDS = {
    "clip_vision_model": "pissa",
    "siglip_vision_model": "lora",
    "siglip2_vision_model": "rslora",
    "dinov2": "dora",
    "dinov2_with_registers": "pissa",
    "dinov3_vit": "dora",
}


def tuned(vision: dict[str, Any], peft: TowerPeftConfig = TowerPeftConfig(), **changes: Any) -> MultimodalModel:
    """With those updates in the tower; no others, and no adapters, unless `changes` say so."""
    return build_model(tiny_config(vision={**vision, "peft": peft}, **{"adapter": NO_ADAPTERS, **changes}))


def moved(model: MultimodalModel) -> MultimodalModel:
    """Every factor off its start."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if is_peft_parameter(name):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def by_hand(layer: Any, kind: str, rank: int) -> torch.Tensor:
    """The weight that a layer computes with, as the papers have it."""
    scale = 16 / (rank**0.5 if kind == "rslora" else rank)
    weight = layer.base_layer.weight + scale * layer.lora_B.default.weight @ layer.lora_A.default.weight
    if kind == "dora":
        weight = layer.lora_magnitude_vector.default.weight[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return weight.detach()


@pytest.mark.parametrize("model_type", all_vits())
def test_a_tower_of_every_family_computes_with_its_updated_weights(model_type: str) -> None:
    family, kind = next(one for one in TOWERS.values() if model_type in one.model_types), KINDS[model_type]
    peft = TowerPeftConfig(kind=kind, rank=3, targets=family.targets)  # pyright: ignore[reportArgumentType]
    model, plain = tuned(vit(model_type), peft).double(), tuned(vit(model_type)).double()
    untuned = plain.vision(PIXELS)
    torch.testing.assert_close(model.vision(PIXELS), untuned, rtol=1e-5, atol=1e-5)
    moved(model)
    for ours, theirs in zip(model.vision.live_blocks, plain.vision.live_blocks, strict=True):
        layers = dict(outer_linears(ours))
        assert {name.rpartition(".")[2] for name in layers} == set(family.targets), "no layer is left out"
        for name, layer in layers.items():
            theirs.get_submodule(name).weight.data = by_hand(layer, kind, rank=3)
    found = model.vision(PIXELS)
    torch.testing.assert_close(found, plain.vision(PIXELS), rtol=1e-6, atol=1e-6)
    assert (found - untuned).abs().max() > 0.01 * untuned.abs().max()
    found.square().sum().backward()
    for name, parameter in model.vision.named_parameters():
        assert parameter.requires_grad == is_peft_parameter(name) == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_blocks_that_nothing_reads_have_no_updates() -> None:
    model = tuned({}, TowerPeftConfig(kind="lora"))  # taps after 2 and 4 of 5 blocks
    names = {name.partition(".self_attn.")[0] for name, _ in model.named_parameters() if is_peft_parameter(name)}
    assert names == {f"vision.clip.encoder.layers.{block}" for block in range(4)}


def test_updates_stand_beside_adapters_and_merge_with_them() -> None:
    peft = TowerPeftConfig(kind="dora", targets=("q_proj", "fc1"))
    both = {"adapter": {"vision": "both", "llm": "both"}, "llm": {"peft": PeftConfig(kind="pissa")}}
    model, plain = moved(tuned({}, peft, **both)), build_model(tiny_config())
    randomise_adapters(model)
    expected = model.eval()(mixed_batch()).segment_losses
    assert not torch.allclose(expected, plain(mixed_batch()).segment_losses, rtol=1e-3)
    merge_adapters(model)
    assert {name for name, _ in model.vision.named_parameters()} == {
        name.replace(".norm.", ".") for name, _ in plain.vision.named_parameters() if ".adapter." not in name
    }
    torch.testing.assert_close(model(mixed_batch()).segment_losses, expected, rtol=1e-5, atol=1e-5)


def test_the_first_stage_has_none() -> None:
    model = tuned({}, TowerPeftConfig(kind="lora"), tune="neck")
    assert count_parameters(model)["peft"] == (0, 0)


def test_trained_parameters_at_the_papers_size() -> None:
    config = MmtConfig(
        vision=VisionConfig(
            config=VIT_L_336, tap_every=4, peft=TowerPeftConfig(kind="lora", targets=("q_proj", "fc2"))
        ),
        llm=LLMConfig(config=LLAMA_2_7B, tokenizer="none"),
        adapter=AdapterConfig(**NO_ADAPTERS),  # pyright: ignore[reportArgumentType]
    )
    count = count_parameters(build_model(config, device="meta"))
    assert count["peft"] == (24 * 8 * (1024 + 1024 + 4096 + 1024),) * 2 and count["vision"][1] == 0


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({}, ("q_proj", "v_proj")),
        ({"adapter": {"vision": "both", "groups": 1}}, ("k_proj", "out_proj", "fc1", "fc2")),
        ({"tune": "full"}, ("q_proj", "fc2")),
    ],
)
def test_operations_are_what_torch_counts(changes: dict[str, Any], targets: tuple[str, ...]) -> None:
    peft = TowerPeftConfig(kind="lora", rank=4, targets=targets)
    assert_counted(tuned({}, peft, llm={"attention": "eager"}, **changes))


@pytest.mark.parametrize(
    ("vision", "targets", "named"),
    [
        ({}, ("o_proj",), "a CLIP ViT's blocks have no linear layer 'o_proj', did you mean 'out_proj'"),
        (vit("siglip_vision_model"), ("fc3",), "a SigLIP ViT's .* 'fc3', did you mean 'fc[12]'"),
        (  # those of another network of its family
            vit("dinov3_vit", config={"model_type": "dinov3_vit", **SQUARE}),
            ("gate_proj",),
            "a DINOv3 ViT's blocks have no linear layer 'gate_proj', did you mean '._proj'",
        ),
    ],
)
def test_layers_that_are_not_there_are_named(vision: dict[str, Any], targets: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=f"model.vision.peft.targets: {named}"):
        tuned(vision, TowerPeftConfig(kind="lora", targets=targets))


@pytest.mark.parametrize(("settings", "named"), [
    ({"bits": 4, "kind": "pissa"}, "model.vision.peft.kind: found 'pissa', expected lora or rslora"),
    ({"bits": 8, "kind": "dora"}, "model.vision.peft.kind: found 'dora', expected lora or rslora"),
    ({"rank": 0}, "model.vision.peft.rank: found 0"),
    ({"targets": ("fc1", "fc1")}, "model.vision.peft.targets: .* each once"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], named: str) -> None:
    more = {"bits": settings.pop("bits")} if "bits" in settings else {}
    with pytest.raises(InputError, match=named):
        tiny_config(vision={"peft": TowerPeftConfig(**settings)}, **more)


def test_a_runs_identity_is_that_of_older_runs_without_updates() -> None:
    assert "peft" not in tiny_config().identity()["vision"]
    told = tiny_config(vision={"peft": TowerPeftConfig(kind="lora")}).identity()
    assert told["vision"]["peft"]["kind"] == "lora"

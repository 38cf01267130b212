"""Whole models as recipes tune them: all checks pass on `mmt` and `instructblip`, every adapter, update and kind of
visual tokens."""

from dataclasses import replace

import pytest

from tests.audit.recipes import CLIP, blip, both, mmt, subject
from tests.support.stock import tiny
from vltrain.audit.recipe import question_of
from vltrain.audit.run import audit
from vltrain.config.model.mmt import NeckConfig, PeftConfig, TowerPeftConfig
from vltrain.config.model.stock import LowRankConfig, NetworkConfig
from vltrain.models.adapters.table import ADAPTERS

LORA = {"targets": ("q_proj", "v_proj")}
DINOV2 = {name: size for name, size in CLIP.items() if name != "intermediate_size"}
TOWERS = {
    "clip": {},
    "siglip": {"config": {**CLIP, "model_type": "siglip_vision_model"}, "tokens": "pooler"},
    "siglip2": {"config": {"model_type": "siglip2_vision_model"}, "tokens": "patches"},
    "dinov2": {"config": {**DINOV2, "model_type": "dinov2"}, "tokens": "patches", "pool": 2, "image_size": 448},
    "dinov3": {"config": {**CLIP, "model_type": "dinov3_vit", "patch_size": 16}, "tokens": "cls", "tap_every": 5},
}
RECIPES = {
    **{f"adapter {kind}": mmt(adapter={"kind": kind, "vision": "both", "llm": "both"}) for kind in ADAPTERS},
    **{f"tower {kind}": mmt(vision=section, neck=NeckConfig(kind="mlp")) for kind, section in TOWERS.items()},
    **{
        kind: mmt(
            vision={"peft": TowerPeftConfig(kind=kind, targets=("q_proj", "fc1"))},
            llm={"peft": PeftConfig(kind=kind, **LORA)},
            adapter={"llm": "none"},
        )
        for kind in ("lora", "dora", "rslora", "pissa")
    },
    "prompts": mmt(llm={"peft": PeftConfig(kind="adaption_prompt")}, adapter={"vision": "none", "llm": "none"}),
    "gemma2, without a norm's place": mmt(llm={"config": {"model_type": "gemma2"}}, adapter={"bias": False}),
    "olmo2, post-norm": mmt(llm={"config": {"model_type": "olmo2"}}, adapter={"llm": "both"}),
    "neck alone": mmt(tune="neck"),
    "all weights": mmt(tune="full"),
    "blip lora": blip(**both("lora")),
    "blip adalora": blip(**both("adalora")),
    "blip full": blip(**both("full"), vision="full"),
    "blip t5 lora": blip("instructblip-flan-t5-xl", **both("lora")),
    "blip t5 adalora": blip("instructblip-flan-t5-xl", **both("adalora")),
}
QUICK = ("adapter loha_router", "dora", "prompts", "blip adalora", "blip t5 lora")


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in RECIPES]
)
def test_all_checks_pass(name):
    report = audit(name, question_of(RECIPES[name]).ways)
    assert report.passed, report.to_text()
    titles = [one.what for one in report.findings]
    for said in ("embeddings packed", "gradient packed", "2 ranks", "generation", "are reached", "exported"):
        assert any(said in title for title in titles), said


PACKED = {
    "lora and adapters": mmt(llm={"peft": PeftConfig(kind="lora", **LORA)}, adapter={"vision": "both", "llm": "both"}),
    "rslora": mmt(
        vision={"peft": TowerPeftConfig(kind="rslora", targets=("q_proj", "fc1"))},
        llm={"peft": PeftConfig(kind="rslora", **LORA)},
        adapter={"llm": "none"},
    ),
    "prompts": RECIPES["prompts"],
    "router": mmt(adapter={"kind": "router", "vision": "both", "llm": "both"}),
    "blip lora": RECIPES["blip lora"],
    "blip adalora": RECIPES["blip adalora"],
    "blip t5 lora": RECIPES["blip t5 lora"],
    "qwen3_vl": tiny("qwen3_vl", llm=NetworkConfig(peft=LowRankConfig(kind="lora"))),
    "gemma3": tiny("gemma3", vision=NetworkConfig(peft=LowRankConfig(kind="lora"))),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "name", [one if one in ("blip lora", "qwen3_vl") else pytest.param(one, marks=pytest.mark.slow) for one in PACKED]
)
def test_a_small_copy_keeps_the_recipes_bits_and_computes_what_the_unpacked_weights_do(name, bits):
    pytest.importorskip("bitsandbytes", reason="install the extra `quant`")
    ways = question_of(replace(PACKED[name], bits=bits)).ways
    assert {way.bits for way in ways.values()} == {bits}
    report = audit(f"{bits} bits", ways)
    assert report.passed, report.to_text()


def test_a_small_copy_is_tuned_as_its_recipe_says():
    made = subject(mmt(adapter={"kind": "router", "llm": "both"}, llm={"peft": PeftConfig(kind="lora", **LORA)}))
    parts = {made.model.part_of(name) for name in made.trained}
    assert parts == {"adapter", "peft", "neck", "modality"}
    assert made.trained == {name for name, one in made.model.named_parameters() if one.requires_grad}
    assert made.reference.num_apart == 1
